"""``diffalign relabel``: labels from rewards, resuming, and detection of changed data."""

import json
import math
import sys

import datasets
import pytest
import torch

from diffalign.cli import main
from diffalign.commands import relabel as module
from diffalign.commands.relabel import RelabelConfig, relabel
from diffalign.data.ai_labels import RULES, Labels, labels_path, read_table
from diffalign.data.config import PreferenceDataConfig
from diffalign.data.pairs import load_pairs
from diffalign.data.stream import stream_pairs
from diffalign.rewards import get_reward
from tests.data.preference_files import encoded, pick_a_pic, pick_row

pytestmark = pytest.mark.filterwarnings("ignore::diffalign.data.validation.DataWarning")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """The copies that ``datasets`` makes of tables stay with the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


ROWS = [
    pick_row(0, 1),
    pick_row(1, 0.5),
    pick_row(2, None, has_label=False),
    pick_row(3, 0, jpg_1=encoded(7, (48, 40))),
    pick_row(4, 1),
]
AI = PreferenceDataConfig(labels="ai", ties="soft")


@pytest.fixture
def path(tmp_path):
    return pick_a_pic(tmp_path / "pick.parquet", ROWS)


def config(*rewards, **fields):
    return RelabelConfig(rewards=rewards or ("brightness",), **fields)


def scores_of(data, name):
    """What the reward says of both images, asked one by one."""
    reward = get_reward(name)
    every = []
    for i in range(len(data)):
        images = [torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8) for p in data.load(i)[1]]
        sizes = [p.size for p in data.load(i)[1]]
        images = [x.view(h, w, 3).permute(2, 0, 1)[None] / 255 for x, (w, h) in zip(images, sizes, strict=True)]
        every.append([reward(image, [""], [{}]).item() for image in images])
    return every


def test_labels_lie_beside_the_data_and_replace_its_own(path):
    written = relabel(path, config())
    assert written == path.parent / ".labels/pick.parquet/ai.parquet"
    data = load_pairs(path, settings=AI)
    assert len(data) == 5, "ties and pairs that nobody judged have a label now"
    wanted = scores_of(data, "brightness")
    assert [data[i].label for i in range(5)] == [float(first > second) for first, second in wanted]
    rows = read_table(written)
    assert [[row["brightness/0"], row["brightness/1"]] for row in rows] == [pytest.approx(s) for s in wanted]
    about = json.loads(written.with_suffix(".json").read_text())
    assert about["rewards"] == {"brightness": {"reward": "", "options": {}}}
    assert (about["rule"], about["weights"]) == ("vote", {"brightness": 1.0})
    assert len(load_pairs(path)) == 3, "without a name the data's own labels count"


def test_soft_labels_are_the_sigmoid_of_the_scaled_weighted_gap(path):
    options = {"brightness": 2.0, "sharpness": -1.0}
    relabel(path, config("brightness", "sharpness", reward_options=options, rule="soft", scale=7.0))
    data = load_pairs(path, settings=AI)
    bright, sharp = scores_of(data, "brightness"), scores_of(data, "sharpness")
    gaps = [2 * (b[0] - b[1]) - (s[0] - s[1]) for b, s in zip(bright, sharp, strict=True)]
    assert [data[i].label for i in range(5)] == pytest.approx([1 / (1 + math.exp(-7 * gap)) for gap in gaps])


@pytest.mark.parametrize(
    ("gaps", "voted", "softened"),
    [
        ([(1, 0.2), (1, 0.1), (1, -5.0)], 1.0, 1 / (1 + math.exp(4.7 * 3))),
        ([(1, 0.2), (1, -0.1)], 0.5, 1 / (1 + math.exp(-0.1 * 3))),
        ([(1, 0.0), (1, -0.1)], 0.0, 1 / (1 + math.exp(0.1 * 3))),
        ([(1, None), (1, -0.1)], 0.0, None),
        ([(3, 0.1), (1, -0.1), (1, -0.1)], 1.0, 1 / (1 + math.exp(-0.1 * 3))),
        ([(1, None)], None, None),
        ([(1, 1e9)], 1.0, 1.0),
    ],
)
def test_the_rules(gaps, voted, softened):
    assert RULES["vote"](gaps, 3.0) == voted
    assert RULES["soft"](gaps, 3.0) == (None if softened is None else pytest.approx(softened))


@pytest.fixture
def spied(monkeypatch):
    """How many images each call of ``score`` saw."""
    seen = []
    real = module.score
    monkeypatch.setattr(module, "score", lambda r, images, *rest: seen.append(len(images)) or real(r, images, *rest))
    return seen


def test_pairs_of_one_size_are_scored_together(path, spied):
    relabel(path, config(batch_size=3))
    assert spied == [6, 1, 1, 2], "three pairs, a pair of two sizes image by image, and what is left"


def test_an_interrupted_run_resumes_and_scores_nothing_twice(path, spied, monkeypatch):
    real = module.judge
    notes = path.parent / ".labels/pick.parquet/ai.jsonl"
    for images in (4, 8):

        def stops(rewards, batch, images=images):
            if sum(spied) >= images:
                raise KeyboardInterrupt
            return real(rewards, batch)

        monkeypatch.setattr(module, "judge", stops)
        with pytest.raises(KeyboardInterrupt):
            relabel(path, config(batch_size=1))
        with notes.open("a") as file:
            file.write('{"content": "cut sh')
    monkeypatch.setattr(module, "judge", real)
    with pytest.raises(ValueError, match=r"ai\.jsonl holds scores of other rewards: delete it"):
        relabel(path, config("sharpness"))
    relabel(path, config(batch_size=1))
    assert sum(spied) == 10, "each of ten images once"
    assert not notes.exists()
    fresh = relabel(path, config(labels="fresh"))
    assert read_table(fresh) == read_table(labels_path(path, "ai"))


def test_another_rule_scores_nothing_again_and_another_reward_everything(path, spied):
    relabel(path, config())
    before = sum(spied)
    relabel(path, config(rule="soft"))
    assert sum(spied) == before
    assert load_pairs(path, settings=AI)[0].label not in (0, 1)
    relabel(path, config("sharpness"))
    assert sum(spied) == 2 * before


def test_only_pairs_that_changed_are_scored_again(tmp_path, path, spied):
    relabel(path, config())
    before = sum(spied)
    rows = [*ROWS[:4], pick_row(4, 1, jpg_0=encoded(50))]
    pick_a_pic(path, rows)
    with pytest.raises(
        ValueError, match=r"ai\.parquet: .*row 4 differs from the labelled pair: the data changed, relabel"
    ):
        load_pairs(path, settings=AI)
    unseen = load_pairs(path, settings=PreferenceDataConfig(labels="ai", ties="soft", scan=0))
    assert unseen.load(0)[0].prompt.text == "caption 0"
    with pytest.raises(ValueError, match="row 4 differs from the labelled pair"):
        unseen.load(4)
    with pytest.raises(ValueError, match=r"has no label for .*row 4: the data changed"):
        stream_pairs(path, settings=AI)
    pick_a_pic(path, [*rows, pick_row(9)])
    with pytest.raises(ValueError, match=r"has no label for pair 5\.0: the data changed"):
        load_pairs(path, settings=AI)
    relabel(path, config())
    assert sum(spied) == before + 4, "two pairs are new"
    assert len(load_pairs(path, settings=AI)) == 6
    pick_a_pic(path, rows[::-1])
    relabel(path, config())
    assert sum(spied) == before + 4, "another order is known by its content"


def test_a_stream_is_labelled_and_read_by_content(path, tmp_path):
    whole = relabel(path, config())
    streamed = relabel(path, config(labels=str(tmp_path / "s.parquet"), streaming=True))
    known = {row["content"]: row["label"] for row in read_table(whole)}
    assert {row["content"]: row["label"] for row in read_table(streamed)} == known
    table = load_pairs(path, settings=AI)
    settings = PreferenceDataConfig(labels=str(streamed), ties="soft")
    found = [(pair.prompt.text, pair.label) for pair in stream_pairs(path, settings=settings).once()]
    assert found == [(table[i].prompt.text, table[i].label) for i in range(5)]


def test_a_pair_that_no_reward_can_judge_has_no_label(tmp_path):
    path = pick_a_pic(tmp_path / "a.parquet", [pick_row(0), pick_row(1, jpg_0=b"broken"), pick_row(2)])

    def fails(images, prompts, metadata):
        means = images.mean((1, 2, 3)).tolist()
        return torch.tensor([math.nan if text == "caption 2" else m for text, m in zip(prompts, means, strict=True)])

    sys.modules["judging"] = type(sys)("judging")
    sys.modules["judging"].fails = fails
    with pytest.warns(UserWarning, match="failed on 2 of 4 samples"):
        written = relabel(path, config("judging:fails", allow_reward_code=True))
    assert [row["label"] is None for row in read_table(written)] == [False, True, True]
    data = load_pairs(path, settings=AI)
    assert (len(data), data.quarantine.skipped) == (1, {"unlabelled": 2})
    assert Labels.load(path, "ai").of("2.0") is None


def test_a_reward_that_ranks_sees_a_pair_as_a_group(tmp_path):
    class Ranks:
        name, differentiable, range, needs_groups = "ranks", False, (0.0, 1.0), True

        def __call__(self, images, prompts, metadata, groups):
            means = images.mean((1, 2, 3))
            assert sorted(groups.tolist()) == [0, 0, 1, 1]
            return torch.stack([(means >= means[groups == group].max())[i] for i, group in enumerate(groups)]).float()

    sys.modules["ranking"] = type(sys)("ranking")
    sys.modules["ranking"].ranks = Ranks
    path = pick_a_pic(tmp_path / "a.parquet", [pick_row(0), pick_row(1)])
    relabel(path, config("ranking:ranks", allow_reward_code=True))
    data = load_pairs(path, settings=AI)
    means = [[sum(p.tobytes()) for p in data.load(i)[1]] for i in range(2)]
    assert [data[i].label for i in range(2)] == [float(first > second) for first, second in means]


def test_the_command(path, tmp_path, capsys):
    assert main(["relabel", str(path), "--rewards", "brightness,sharpness", "--labels", "both", "--rule", "soft"]) == 0
    assert "both.parquet: 5 pairs, first image preferred in" in capsys.readouterr().out
    assert main(["check", str(path), "--labels", "both"]) == 0
    printed = capsys.readouterr().out
    assert "0 ties, 0 unlabelled, 5 soft" in printed
    assert "different_size: 1" in printed
    pick_a_pic(path, [*ROWS[:4], pick_row(4, 1, jpg_0=encoded(50))])
    assert main(["check", str(path), "--labels", "both"]) == 2
    assert "row 4 differs from the labelled pair: the data changed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name preference data: diffalign relabel"),
        (["DATA"], "rewards is missing: write --rewards pickscore"),
        (["DATA", "--rewards", "brightnes"], "did you mean 'brightness'"),
        (["a/b", "--rewards", "brightness"], "'a/b' is not in the local cache, and HF_HUB_OFFLINE=1 forbids"),
        (["DATA", "DATA", "--rewards", "brightness", "--labels", "a.parquet"], "is one file for 2 sources"),
    ],
)
def test_user_errors_have_a_hint(arguments, message, path, capsys):
    assert main(["relabel", *(argument.replace("DATA", str(path)) for argument in arguments)]) == 2
    assert message in capsys.readouterr().err


def test_labels_that_are_not_there_are_named_with_those_that_are(path):
    relabel(path, config(labels="one"))
    with pytest.raises(FileNotFoundError, match=r"no labels at .*ai\.parquet; there are one: make them"):
        load_pairs(path, settings=AI)


def test_labels_in_a_folder_of_data_are_not_taken_for_data(tmp_path):
    pick_a_pic(tmp_path / "train.parquet", ROWS)
    assert relabel(tmp_path, config()) == tmp_path / ".labels/ai.parquet"
    assert len(load_pairs(tmp_path, settings=AI)) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch_size", "0"], "batch_size must be at least 1, got 0"),
        (["--rule", "soft", "--scale", "-1"], "scale must be more than 0, got -1"),  # it would turn every label round
        (["--rewards", "shapes=2"], "write --rewards shapes --reward_options '{shapes: 2}'"),
    ],
)
def test_settings_that_would_judge_wrongly_are_refused(options, message, path, capsys):
    given = options if "--rewards" in options else ["--rewards", "shapes", *options]
    assert main(["relabel", str(path), *given]) == 2
    assert message in capsys.readouterr().err
