"""Training a judge: data, split, resume, report and errors."""

import dataclasses
import io
import json
import re

import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image
from transformers import AutoModel

from diffalign import RewardTrainer, RewardTrainerConfig
from diffalign.cli import main
from diffalign.commands.label.config import LabelConfig
from diffalign.commands.label.order import ORDERS
from diffalign.commands.label.sources import collect
from diffalign.config import parse
from diffalign.config.sections import JUDGE_FILES, LoraConfig, RewardConfig
from diffalign.data.config import PreferenceDataConfig
from diffalign.rewards import get_reward
from diffalign.rewards.support.images import from_pil
from diffalign.runtime.products import EXPORTS
from diffalign.runtime.tracking import MetricsLog
from diffalign.structures import ImageSource, Pair, Prompt
from diffalign.trainers.reward.data import Example, read_judge_data, split_by_prompt
from diffalign.trainers.reward.figures import Judged
from diffalign.trainers.reward.label_next import Candidate, choose
from scripts.studies import own_judge
from tests.conftest import ROOT
from tests.rewards import tiny_judges
from tests.store import opened

BACKBONE, SHAPES = ROOT / "assets/judges/pickscore", ROOT / "assets/preferences/shapes.parquet"
SMALL = {"backbone": str(BACKBONE), "max_train_steps": 4, "num_pairs": 8, "learning_rate": 1e-2, "label_next": 0}


@pytest.fixture(scope="module")
def table():
    return parquet.read_table(SHAPES).slice(0, 180).to_pylist()


def written(path, rows):
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


@pytest.fixture
def pairs(table, tmp_path):
    raters = ["ann", "bob", "", None]
    return written(tmp_path / "pairs.parquet", [{**row, "user_id": raters[i % 4]} for i, row in enumerate(table[:24])])


@pytest.fixture
def judge_folder(tmp_path):
    return tiny_judges.own_judge(tmp_path / "mine", BACKBONE)


def trained(pairs, folder, **changes):
    args = RewardTrainerConfig(**{**SMALL, "train_data": (pairs,), "output_dir": folder, **changes})
    trainer = RewardTrainer(args=args)
    return trainer, trainer.train()


# Training -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{}, {"train": "lora", "lora": LoraConfig(rank=2)}, {"train": "full", "train_batch_size": 4},
     {"prototypes": 2}, {"tie_model": "davidson", "ema_decay": 0.5},
     pytest.param({"prototypes": 2, "rater_model": "pal_a"}, marks=pytest.mark.slow),
     pytest.param({"tie_model": "rao_kupper"}, marks=pytest.mark.slow)],
    ids=lambda changes: "_".join(changes) or "head",
)  # fmt: skip
def test_a_judge_trains_and_scores_what_the_network_scored(changes, pairs, tmp_path):
    trainer, result = trained(pairs, tmp_path / "judge", **changes)
    rows = MetricsLog.read(tmp_path / "judge/metrics.jsonl")
    assert sum("grad_norm" in row for row in rows) == 4
    assert set(result.evaluations) == {0, 4}
    assert result.weights == (tmp_path / "judge/model.safetensors",)

    reward = get_reward("judge", path=str(tmp_path / "judge"))
    position = trainer.run.data.held_out[0]
    images = torch.stack([from_pil(image) for image in trainer.run.data.load(position)[1]])
    own = reward(images, [trainer.run.data.examples[position].text] * 2, [{}] * 2)
    with trainer.outputs.averaged():
        margin = trainer.outputs.judged([position]).margin
    torch.testing.assert_close((own[0] - own[1]).double(), margin.squeeze(), rtol=1e-4, atol=1e-3)

    plain = get_reward("pickscore", path=str(BACKBONE), tokenizer=str(BACKBONE))
    before = plain(images, [trainer.run.data.examples[position].text] * 2, [{}] * 2)
    assert not torch.allclose(own, before, atol=1e-3)


@pytest.mark.parametrize("train", ["head", "lora"])
def test_siglip_trains_too(train, pairs, tmp_path):
    backbone = tiny_judges.siglip(tmp_path / "siglip")
    trained(pairs, tmp_path / "judge", backbone=str(backbone), train=train, prototypes=2, max_train_steps=2)
    before, after = (AutoModel.from_pretrained(folder).state_dict() for folder in (backbone, tmp_path / "judge"))
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name].float(), after[name])}
    tower = {"text_model.head.weight", "text_model.head.bias", "logit_scale"}
    assert moved >= tower
    assert any(name.endswith("q_proj.weight") for name in moved) == (train == "lora")
    assert moved == tower or train == "lora"


@pytest.mark.parametrize("kind", ["pal_b", pytest.param("pal_a", marks=pytest.mark.slow)])
def test_a_run_that_is_resumed_ends_with_the_same_weights(kind, pairs, tmp_path):
    once, twice = tmp_path / "once", tmp_path / "twice"
    options = {"prototypes": 2, "rater_model": kind, "checkpointing_steps": 2, "lr_scheduler": "constant"}
    trained(pairs, once, **options)
    trained(pairs, twice, **options, max_train_steps=2)
    trained(pairs, twice, **options, resume_from_checkpoint="latest")
    for name in ("model.safetensors", "raters.safetensors"):
        assert (once / name).read_bytes() == (twice / name).read_bytes()
    _, result = trained(pairs, twice, **options, resume_from_checkpoint="latest")  # nothing to do
    assert result.step == 4
    with pytest.raises(ValueError, match=r"(?s)another configuration:.*tie_model"):
        trained(pairs, twice, **options, tie_model="davidson", resume_from_checkpoint="latest")


def test_a_run_is_copied_to_a_store_and_goes_on_from_there(pairs, tmp_path, monkeypatch):
    store, where = opened(monkeypatch, tmp_path / "cache"), "store://b/runs/judge"
    options = {"checkpointing_steps": 2, "output_copy": where}
    trained(pairs, tmp_path / "here", **options, max_train_steps=2)
    assert store.cat_file("/b/runs/judge/model.safetensors") == (tmp_path / "here/model.safetensors").read_bytes()
    _, result = trained(pairs, tmp_path / "there", **options, resume_from_checkpoint="latest")
    assert result.step == 4
    assert [row["step"] for row in MetricsLog.read(tmp_path / "there/metrics.jsonl") if "loss" in row] == [1, 2, 3, 4]


def test_the_command_trains_reports_and_its_judge_is_a_reward(pairs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["train", "reward", "--config", str(ROOT / "configs/reward/shapes.yaml"), "--backbone", str(BACKBONE)]
    words += ["--train_data", pairs, "--max_train_steps", "2", "--num_pairs", "8", "--output_dir", "judge"]
    words += ["--judges", "{brightness: 1.0}"]
    assert main([*words, "--dry_run"]) == 0
    assert "held out" in capsys.readouterr().out
    assert not (tmp_path / "judge").exists()
    assert main(words) == 0

    figures = json.loads((tmp_path / "judge/report.json").read_text())
    assert figures["raters"].keys() == {"ann", "bob"}
    assert figures["judges"].keys() == {"brightness"}
    assert 0 <= figures["accuracy"]["low"] <= figures["accuracy"]["rate"] <= figures["accuracy"]["high"] <= 1
    card = (tmp_path / "judge/README.md").read_text()
    assert "mine: {path: judge}" in card
    assert "| brightness |" in card
    manifest = json.loads((tmp_path / "judge" / EXPORTS).read_text())["files"]
    assert {"model.safetensors", "judge.json", "report.json", "README.md"} <= manifest.keys()
    assert {*manifest} - {"README.md", "curves.png", "report.json", "label_next.parquet"} <= {*JUDGE_FILES}

    score = ["score", str(ROOT / "assets/pictures/hero.png"), "--prompt", "a red circle", "--output_dir", "score"]
    assert main([*score, "--rewards", "mine", "--reward_options", "{mine: {path: judge}}"]) == 0
    assert main([*score, "--rewards", "mine", "--reward_options", "{mine: {path: gone}}"]) == 2
    assert "diffalign train reward" in capsys.readouterr().err


# Data ---------------------------------------------------------------------------------------------------------------


def test_no_prompt_is_in_both_parts_whatever_its_case():
    texts = [f"prompt {i // 3}" if i % 2 else f"Prompt  {i // 3}" for i in range(90)]
    examples = [Example(0, i, text, 1.0, "") for i, text in enumerate(texts)]
    train, held_out = split_by_prompt(examples, 0.2, 0)
    key = lambda i: " ".join(texts[i].lower().split())  # noqa: E731
    assert sorted([*train, *held_out]) == list(range(90))
    assert len({key(i) for i in held_out}) == 6
    assert not {key(i) for i in train} & {key(i) for i in held_out}
    more = [*examples, Example(0, 90, "prompt 3", 0.0, "")]
    assert split_by_prompt(more, 0.2, 0)[1][:10] == held_out[:10]
    assert split_by_prompt(examples, 0.2, 1)[1] != held_out


def test_held_out_data_of_their_own_take_their_prompts_out_of_the_training(table, tmp_path):
    train = written(tmp_path / "train.parquet", table[:40])
    held_out = written(tmp_path / "held_out.parquet", table[:5])
    config = RewardTrainerConfig(**SMALL, train_data=(train,), eval_data=(held_out,))
    data = read_judge_data(config)
    texts = [{data.examples[i].text for i in part} for part in (data.train, data.held_out)]
    assert len(data.held_out) == sum(row["label_0"] is not None for row in table[:5])
    assert texts[1] == {row["caption"] for row in table[:5]}
    assert not texts[0] & texts[1]


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda rows: [{**row, "label_0": 0.5, "label_1": 0.5, "best_image_uid": "tie"} for row in rows], {},
         r"train_data: all \d+ labels .* are 0.5, ties"),
        (lambda rows: [{**row, "caption": "one"} for row in rows], {}, r"no pairs are left to train on|hold out"),
        (lambda rows: [{k: v for k, v in row.items() if k != "jpg_1"} for row in rows], {}, "jpg_1|column"),
        (lambda rows: rows, {"prototypes": 2, "rater_column": "nobody"}, "column 'nobody': set rater_column"),
        (lambda rows: rows, {"backbone": str(ROOT / "assets/shapes-sd3/text_encoder")}, "clip, siglip"),
        (lambda rows: rows, {"backbone": str(ROOT / "assets/prompts")}, "backbone"),
        (lambda rows: rows, {"judges": {"nobody": 1.0}}, "unknown reward 'nobody'"),
        (lambda rows: rows, {"train": "lora", "lora": LoraConfig(rank=0)}, "lora.rank 0 adapts nothing"),
        (lambda rows: rows, {"train": "lora", "lora": LoraConfig(targets=("nothing",))}, "lora.targets: no layer"),
        (lambda rows: rows, {"lora": LoraConfig(rank=4)}, "lora.rank: read only with train: lora"),
        (lambda rows: rows, {"data": PreferenceDataConfig(mask="m")}, "data.mask: is read by"),
        (lambda rows: rows, {"data": PreferenceDataConfig(source="s")}, "data.source: is read by"),
        (lambda rows: rows, {"backbone": ""}, "backbone is missing"),
        (lambda rows: rows, {"train_data": ()}, "train_data is missing"),
    ],
)  # fmt: skip
def test_what_cannot_train_is_said_in_a_sentence(change, options, message, table, tmp_path):
    path = written(tmp_path / "pairs.parquet", change([{**row, "user_id": "ann"} for row in table[:12]]))
    args = {**SMALL, "train_data": (path,), "output_dir": tmp_path / "judge", **options}
    with pytest.raises(ValueError, match=message) as caught:
        RewardTrainer(args=RewardTrainerConfig(**args))
    assert len(str(caught.value)) < 2000


# Figures ------------------------------------------------------------------------------------------------------------


def test_figures_by_hand():
    labels = [1.0, 0.0, 1.0, 0.5, 0.0]
    examples = [Example(0, i, f"p{i}", label, "ab"[i % 2]) for i, label in enumerate(labels)]
    margin = torch.tensor([2.0, -1.0, -3.0, 1.0, 0.0], dtype=torch.float64)
    other = torch.tensor([1.0, 1.0, 1.0, 1.0, float("nan")], dtype=torch.float64)
    found = Judged(examples, margin, margin).figures({"other": other})
    assert found["accuracy"]["rate"] == pytest.approx(2.5 / 4)
    assert found["ties"] == 1
    assert found["raters"]["b"]["mean"] == {"rate": 1.0, "low": 1.0, "high": 1.0, "pairs": 1}
    assert found["judges"]["other"]["accuracy"]["rate"] == pytest.approx(2 / 3)
    assert found["judges"]["other"]["agreement"]["rate"] == pytest.approx(2 / 4)
    json.dumps(found, allow_nan=False)


def lighter(row):
    """Whether the first image of a row is the lighter one."""
    light = [from_pil(Image.open(io.BytesIO(row[f"jpg_{side}"])).convert("RGB")).mean() for side in range(2)]
    return float(light[0] > light[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "taste"), [("pal_b", lambda row: row["label_0"]), ("pal_a", lighter)], ids=["pal_b", "pal_a"]
)
def test_raters_who_disagree_are_told_apart(kind, taste, table, tmp_path):
    """Ann and bob judge the other way round: the mean rater is right about half of them, their own about most.

    In model A they differ in what they like in any image, as its ideal points do not depend on the prompt.
    """
    rows = [{**row, "user_id": name, "label_0": label, "label_1": 1 - label, "best_image_uid": None}
            for row in table for name, label in (("ann", taste(row)), ("bob", 1 - taste(row)))]  # fmt: skip
    path = written(tmp_path / "pairs.parquet", rows)
    options = {"max_train_steps": 30, "num_pairs": 64, "prototypes": 2, "rater_model": kind}
    _, result = trained(path, tmp_path / "judge", **options)
    assert result.tuned["eval/accuracy"] == pytest.approx(0.5)
    assert result.tuned["eval/accuracy/own_rater"] > 0.65


@pytest.mark.parametrize("judges", ["{x: {reward: evil.py:f}}", "{evil.py:f: 1}", "{x: {path: evil.py:f}}",
                                    "{x: {reward: remote, options: {url: 'http://127.0.0.1:9'}}}"])  # fmt: skip
def test_a_file_names_no_code_and_no_server_among_the_judges(judges, pairs, tmp_path, capsys):
    file = tmp_path / "a.yaml"
    file.write_text(f"backbone: {BACKBONE}\ntrain_data: [{pairs}]\njudges: {judges}\noutput_dir: {tmp_path}/judge\n")
    assert main(["train", "reward", "--config", str(file)]) == 2
    assert "allow_reward_code" in capsys.readouterr().err
    assert not (tmp_path / "judge").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--backbone", "tests/nowhere"], "no such folder tests/nowhere"),
        (["--backbone", "assets/prompts"], "has no config.json"),
        (["--train_data", "nowhere.parquet"], "no preference data at nowhere.parquet"),
        (["--judges", "pickscor"], "did you mean 'pickscore'"),
        (["--dry_run", "--card", "h1000"], "no card is named 'h1000'"),
        (["--dry_run", "--world", "3"], "num_pairs 64 do not divide over 3 processes"),
        (["--train", "heads"], "expected head|lora|full"),
        (["--rater_model", "pal_a"], "rater_model: read only with prototypes above 1"),
    ],
)
def test_mistakes_on_the_command_line_are_named(words, message, pairs, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    base = {"--backbone": str(BACKBONE), "--train_data": pairs}
    given = [text for option, value in base.items() if option not in words for text in (option, value)]
    assert main(["train", "reward", *given, *words]) == 2
    assert message in capsys.readouterr().err


def test_fit_is_of_diffusion_models(capsys):
    assert main(["fit", "reward", "--backbone", "b"]) == 2
    assert "fit is of diffusion models" in capsys.readouterr().err


def test_a_part_of_the_data_section_keeps_ties_as_soft_labels():
    config = parse(RewardTrainerConfig, ["--data.format", "pick_a_pic", "--backbone", "b"])
    assert (config.data.ties, config.data.format) == ("soft", "pick_a_pic")


@pytest.mark.parametrize("command", ["compare", "eval", "label", "export --format kohya"])
def test_commands_of_diffusion_models_refuse_the_folder_of_a_judge(command, judge_folder, tmp_path, capsys):
    (judge_folder / "config.yaml").write_text("backbone: b\n")
    name, *options = command.split()
    assert main([name, str(judge_folder), *options, "--output_dir", str(tmp_path / "out")]) == 2
    assert len(capsys.readouterr().err) < 2000


def test_a_configuration_that_was_written_is_read_again(pairs, tmp_path):
    trainer, _ = trained(pairs, tmp_path / "judge", train="lora", lora=LoraConfig(rank=2))
    again = RewardTrainerConfig.from_yaml(tmp_path / "judge/config.yaml")
    assert dataclasses.replace(again, output_dir=trainer.args.output_dir) == trainer.args
    assert re.search("reward", trainer.outputs.resume_command)


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "least"), [("clip", 0.8), ("pickscore", 0.87)])
def test_a_judge_of_300_labels_agrees_with_the_verifier_who_gave_them(backbone, least, tmp_path):
    """The first backbone has seen captions and no preference; it is less often right, and too sure of itself."""
    row = own_judge.judge(backbone, 0, tmp_path)
    assert row["after"] >= least
    if backbone == "clip":
        assert row["after"] > row["before"] - 0.01
        assert row["ece"] < row["before/ece"]


# Label next ---------------------------------------------------------------------------------------------------------


def test_the_least_certain_pairs_come_first_unlabelled_ones_if_any_and_prompts_in_turn():
    def candidate(text, labelled, *probabilities):
        pair = Pair(text, Prompt(text), (ImageSource("a", b""), ImageSource("b", b"")), 0.5)
        return Candidate(pair, labelled, torch.tensor(probabilities, dtype=torch.float64))

    sure, split, unsure, again = (
        candidate("sure", True, 0.9, 0.9), candidate("split", True, 0.05, 0.97), candidate("unsure", True, 0.55, 0.5),
        candidate("split", True, 0.5, 0.5),
    )  # fmt: skip
    chosen = choose([sure, split, unsure, again], 4)
    assert [one.pair.key for one in chosen] == ["split", "unsure", "sure", "split"]
    assert chosen[0] is again
    open_one = candidate("open", False, 0.99, 0.99)
    assert choose([sure, split, open_one], 3) == [open_one]


@pytest.mark.parametrize("prototypes", [1, 2])
def test_pairs_to_label_next_are_shown_by_label_in_their_order(prototypes, pairs, table, tmp_path):
    pool = [{**row, "label_0": None, "label_1": None, "has_label": False} for row in table[24:34]]
    label_data = written(tmp_path / "pool.parquet", [*table[:2], *pool])
    trained(pairs, tmp_path / "judge", label_next=6, label_data=(label_data,), prototypes=prototypes)
    found = parquet.read_table(tmp_path / "judge/label_next.parquet").to_pylist()
    assert len(found) == 6
    assert {row["caption"] for row in found} <= {row["caption"] for row in pool}
    first = {}
    for row in found:
        first.setdefault(row["caption"], abs(row["probability"] - 0.5))
    assert list(first.values()) == sorted(first.values())
    assert (max(row["disagreement"] for row in found) > 0) == (prototypes > 1)

    config = LabelConfig(models=(str(tmp_path / "judge/label_next.parquet"),), order="given")
    shown = collect(config)
    order = ORDERS["given"](shown, 0)
    seen = []
    while (index := order.next("Ada", lambda i: i not in seen, list)) is not None:
        seen.append(index)
    assert [shown[i].prompt.text for i in seen] == [row["caption"] for row in found]
    assert "--order given" in (tmp_path / "judge/README.md").read_text()


def test_the_judge_gives_label_its_order_by_path(pairs, tmp_path):
    trained(pairs, tmp_path / "judge")
    options = {"mine": RewardConfig(path=str(tmp_path / "judge"))}
    config = LabelConfig(models=(pairs,), output_dir=tmp_path / "label", order="disagreement", rewards=("mine",),
                         reward_options=options, limit=8)  # fmt: skip
    shown = collect(config)
    gaps = [abs(shown[i].gap("mine")) for i in ORDERS["disagreement"](shown, 0).order]
    assert gaps == sorted(gaps)
