"""R28 to R31: rewards that keep their promises or fail alone, and data with everything that real data have."""

import contextlib
import math
import warnings
from pathlib import Path

import pytest
import torch

from diffalign import FlowGRPOTrainer
from diffalign.cli import main
from diffalign.data.config import PreferenceDataConfig
from diffalign.data.pairs import load_pairs
from diffalign.data.prompts import LINE_ERRORS, load_prompts
from diffalign.data.validation import DataWarning, printable
from diffalign.rewards import get_reward
from diffalign.rewards.base import names, needs_groups, registered
from diffalign.rollout.scoring import score
from diffalign.structures import Prompt
from tests.data.preference_files import encoded, jsonl, picture
from tests.data.test_images import BAD, GOOD
from tests.reliability.compare import rows
from tests.reliability.trainers import short
from tests.trainers.made_refl import close, differentiable, gradients, redness, trainer_of
from tests.trainers.made_refl import config as made_refl

ASKING = (
    "judge",
    "ocr",
    "remote",
    "combined",
    "vlm_rating",
    "vlm_checklist",
    "vlm_pairwise",
    "editscore",
    "shapes_edit",
    "shapes_edit_kept",
    "shapes_edit_strict",
    "source_similarity",
)  # networks, a server, other rewards, or the source of an edit
WITHOUT_WEIGHTS = [name for name in names() if not registered(name).facts.weights and name not in ASKING]


@pytest.mark.parametrize("name", WITHOUT_WEIGHTS)
def test_r28_a_reward_judges_each_image_by_itself_and_leaves_it_as_it_is(name):
    """Those with networks, with small ones, and gradients too: tests/rewards/test_contract.py."""
    reward = get_reward(name)
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    spec = {"include": [{"class": "circle", "count": 1, "color": "red"}], "tag": "colors", "text": "sign"}
    before, texts, specs = images.clone(), ["a red circle"] * 4, [spec] * 4
    groups = [torch.zeros(4, dtype=torch.long)] if needs_groups(reward) else []
    found = reward(images, texts, specs, *groups)
    values = found[0] if isinstance(found, tuple) else found
    assert torch.equal(images, before)
    assert values.isfinite().all()
    order = [2, 0, 3, 1]
    swapped = reward(images[order], texts, specs, *groups)
    swapped = swapped[0] if isinstance(swapped, tuple) else swapped
    torch.testing.assert_close(swapped, values[order], rtol=1e-5, atol=1e-5)


def test_r28_there_are_rewards_to_hold_to_it():
    assert {"shapes", "brightness", "jpeg_compressibility"} <= set(WITHOUT_WEIGHTS)


PROMPTS = [Prompt(text) for text in ("a", "b", "c", "d", "e", "f")]
IMAGES = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def light(images, prompts, metadata):
    return images.mean((1, 2, 3))


@pytest.mark.parametrize("fault", ["raises", "nan", "infinite", "times out"])
def test_r29_a_sample_that_a_reward_fails_on_changes_no_other(fault):
    def judge(images, prompts, metadata):
        values = light(images, prompts, metadata)
        if "c" in prompts:
            if fault in ("raises", "times out"):
                raise TimeoutError("no answer") if fault == "times out" else ZeroDivisionError("c")
            values[prompts.index("c")] = math.nan if fault == "nan" else math.inf
        return values

    with pytest.warns(UserWarning, match="failed on 1 of 6 samples.*'c'"):
        found = score({"judge": get_reward(judge)}, IMAGES, PROMPTS)["judge"]
    alone = [0, 1, 3, 4, 5]
    without = score({"judge": get_reward(light)}, IMAGES[alone], [PROMPTS[i] for i in alone])["judge"]
    assert found.isnan().tolist() == [text == "c" for text in "abcdef"]
    assert torch.equal(found[alone], without)


def test_r29_another_shape_of_scores_is_an_error_that_names_the_reward():
    def square(images, prompts, metadata):
        return torch.zeros(len(images), 2)

    with pytest.raises(ValueError, match=r"reward 'square' returned shape \(6, 2\) for 6 images"):
        score({"square": get_reward(square)}, IMAGES, PROMPTS)


@pytest.mark.parametrize(("bad", "stops"), [(1, True), (0, False)])
def test_r29_too_many_failures_stop_the_run(tmp_path, bad, stops):
    def judge(images, prompts, metadata):
        values = light(images, prompts, metadata)
        values[:bad] = math.nan
        return values

    trainer = FlowGRPOTrainer(args=short("flow_grpo", tmp_path, max_train_steps=2), reward_funcs=judge)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if stops:
            with pytest.raises(ValueError, match=r"rewards failed on 50% of the images, more than max_unscored 20%"):
                trainer.train()
        else:
            trainer.train()
    assert not stops or not [row for row in rows(tmp_path) if "loss" in row]


@pytest.mark.parametrize("fault", ["raises", "nan", "infinite"])
def test_r29_such_a_sample_gives_refl_no_gradient_and_changes_no_other(tmp_path, fault):
    """The reference weighs it with nothing."""

    def judge(images, prompts, metadata):
        bad, found = torch.tensor([text == "c" for text in prompts]), redness(images, prompts, metadata)
        if fault == "raises" and bad.any():
            raise ZeroDivisionError("c")
        return found * torch.where(bad, {"nan": math.nan, "infinite": math.inf}.get(fault, 1), 1)

    def without(images, prompts, metadata):
        return redness(images, prompts, metadata) * torch.tensor([text != "c" for text in prompts])

    made = [
        trainer_of(made_refl(tmp_path, "draft_1", max_unscored=0.3), PROMPTS[:4], reward=differentiable(function))
        for function in (judge, without)
    ]
    found, expected = map(gradients, made)
    close(found, expected, 1e-6)
    assert "failed on 1 of 4 samples" in made[0].algorithm.judge.failures(some=True)


@pytest.mark.parametrize(("limit", "stops"), [(0.3, False), (0.2, True)])
def test_r29_refl_names_such_a_sample_and_stops_where_there_are_too_many(tmp_path, limit, stops):
    def judge(images, prompts, metadata):
        return redness(images, prompts, metadata) * torch.tensor([math.nan if text == "c" else 1 for text in prompts])

    args = made_refl(tmp_path, "draft_1", max_unscored=limit, train_batch_size=1, max_train_steps=2)
    trainer = trainer_of(args, PROMPTS[:4], reward=differentiable(judge))
    too_many = pytest.raises(ValueError, match="rewards failed on 25% of the images, more than max_unscored 20%")
    with (
        pytest.warns(UserWarning, match="failed on 1 of 4 samples.*train nothing: 'c'"),
        too_many if stops else contextlib.nullcontext(),
    ):
        trainer.train()
    found = [row for row in rows(args.output_dir) if "loss" in row]
    assert len(found) == (1 if stops else 2)  # the step that was taken is kept
    assert all(math.isfinite(row["reward/mean"]) and row["unscored"] == 0.25 for row in found)


FILES = {name: make for name, (make, _) in {**BAD, **GOOD}.items()}


def pairs_of(folder: Path, names) -> Path:
    """A pair of each file and a good picture, among good ones."""
    folder.mkdir()
    table = []
    for name in names:
        path = folder / name
        if name in FILES:
            FILES[name](path)
        else:
            path.write_bytes(encoded(7))
        other = folder / f"other-{len(table)}.jpg"
        picture(len(table) + 50).save(other)
        row = {"prompt": printable(name), "chosen": printable(path), "rejected": str(other)}
        table.append(row)
    return jsonl(folder / "pairs.jsonl", table)


def test_r30_fourteen_odd_files_are_read_or_named_once_and_the_good_keep_their_order(tmp_path):
    assert len(FILES) >= 14
    good = [f"good-{i}.jpg" for i in range(40)]
    mixed = [name for pair in zip(good, list(FILES) + good[len(FILES) :], strict=False) for name in pair]
    names = list(dict.fromkeys(mixed))
    path = pairs_of(tmp_path / "mixed", names)
    with pytest.raises(ValueError, match=r"more than max_bad_share 1\.0%") as caught:
        load_pairs(path)
    for name in BAD:
        assert name in str(caught.value) or "and 2 more" in str(caught.value)
    settings = PreferenceDataConfig(max_bad_share=0.3, on_fault={"different_size": "keep", "too_small": "keep"})
    with pytest.warns(DataWarning, match="unreadable: 7"):
        data = load_pairs(path, settings=settings)
    assert len(data.quarantine.dropped) == len(BAD)
    read = [data[i].prompt.text for i in range(len(data)) if data[i].key not in data.quarantine.dropped]
    assert read == [name for name in names if name not in BAD]
    seen = [data.load(i)[0].prompt.text for i in range(len(data))]
    assert not set(seen) & set(BAD)


def test_r31_what_files_of_prompts_may_hold_is_defined(tmp_path):
    long, emoji = "word " * 2000 + "end", "a 🦊 on a 🏔️"
    text = b"\xef\xbb\xbfa cat\r\n\r\n  \ta dog\t\r\na cat\n" + f"{emoji}\n{long}".encode()
    (tmp_path / "a.txt").write_bytes(text)
    found = [prompt.text for prompt in load_prompts(tmp_path / "a.txt")]
    assert found == ["a cat", "a dog", "a cat", emoji, long]
    (tmp_path / "empty.txt").write_bytes(b"\xef\xbb\xbf\r\n \n")
    with pytest.raises(ValueError, match="holds no prompt: write one per line"):
        load_prompts(tmp_path / "empty.txt")
    (tmp_path / "column.jsonl").write_text('{"caption": "a cat"}\n')
    with pytest.raises(ValueError, match='line 1: no "prompt" among caption'):
        load_prompts(tmp_path / "column.jsonl")
    (tmp_path / "latin.txt").write_bytes("ein Bär".encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8"):
        load_prompts(tmp_path / "latin.txt")


ODD_LINES = [
    (b"fine", None, None),
    (b"\t ", None, None),
    (b"a \xf0\x9f\x91\xa9\xe2\x80\x8d\xf0\x9f\x9a\x80 on a \xf0\x9f\x8f\x94\xef\xb8\x8f", None, None),
    (b"fine", "repeated", "line 1 again"),
    (b"word " * 2000, "long", "2,000 words"),
    (b"a\x00b\xe2\x80\xae", "control", "U+0000, U+202E"),
    ("ein Bär".encode("latin-1"), "not_utf8", "not UTF-8"),
]
BAD_JSON = [
    (b'{"prompt": "fine"}', None, None),
    (b'{"prompt": "a"', "bad_json", "bad JSON"),
    (b"[" * 100_000, "bad_json", "nested too deeply"),
    (b'["a"]', "bad_json", "expected an object"),
    (b'{"prompt": "\\ud83d"}', "bad_json", "half of a surrogate pair"),
    (b'{"caption": "a"}', "no_prompt", 'no "prompt" among caption'),
    (b'{"prompt": " "}', "empty_prompt", "must be a text that is not empty"),
    (b'{"prompt": null, "text": "a"}', "empty_prompt", "got None"),
    (b'{"text": " fine "}', "repeated", "line 1 again"),
]


@pytest.mark.parametrize(("name", "lines", "good"), [("a.txt", ODD_LINES, 5), ("a.jsonl", BAD_JSON, 2)])
@pytest.mark.parametrize("ends", [b"\n", b"\r\n"])
def test_r31_check_names_file_and_line_of_whatever_is_odd(tmp_path, name, lines, good, ends, capsys):
    path = tmp_path / name
    path.write_bytes(b"\xef\xbb\xbf" + ends.join(line for line, _, _ in lines))
    assert main(["check", str(path), "--prompts"]) == 1
    said = capsys.readouterr().out
    assert f"{path}: {good} prompts, {int(name == 'a.txt')} blank lines" in said
    assert said.count("a byte order mark") == 1
    assert ("line ends CRLF" in said) == (ends == b"\r\n")
    for number, (_, kind, detail) in enumerate(lines, start=1):
        named = [line for line in said.splitlines() if line.startswith(f"  {path}, line {number}: ")]
        assert len(named) == (kind is not None), number
        assert kind is None or detail in named[0]
    for kind in {kind for _, kind, _ in lines if kind}:
        assert f"{kind}: {sum(kind == other for _, other, _ in lines)} (" in said
    first = next(number for number, (_, kind, _) in enumerate(lines, 1) if kind in LINE_ERRORS)
    with pytest.raises(ValueError, match=rf"{name}, line {first}: ") as stopped:
        load_prompts(path)
    assert f"a run would stop: {stopped.value}\n" in said


def test_r31_check_compares_files_and_says_which_holds_nothing(tmp_path, capsys):
    train, held_out, empty = (tmp_path / name for name in ("train.txt", "held_out.txt", "empty.TXT"))
    train.write_text("a cat\na dog\n")
    held_out.write_text("a bird\n\na dog")
    empty.write_bytes(b"\xef\xbb\xbf\r\n \n")
    assert main(["check", str(train), str(held_out)]) == 0
    said = capsys.readouterr().out
    assert "4 prompts, 3 different" in said
    assert f"{held_out}, line 3: {train}, line 2 again" in said
    assert main(["check", str(train), str(empty), "--json"]) == 1
    assert "empty.TXT has no prompts: write one per line" in capsys.readouterr().out
    assert main(["check", str(tmp_path / "nowhere.txt")]) == 2
    assert "there is no file" in capsys.readouterr().err


def test_r31_a_run_takes_prompts_of_any_length_and_script(tmp_path):
    (tmp_path / "a.txt").write_text("🦊\n" + "word " * 2000 + "\nein Bär")
    args = short("flow_grpo", tmp_path / "run", train_prompts=tmp_path / "a.txt", max_train_steps=2, num_groups=3)
    FlowGRPOTrainer(args=args).train()
    assert all(math.isfinite(row["loss"]) for row in rows(tmp_path / "run") if "loss" in row)
