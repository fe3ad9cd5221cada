"""What Python users rely on: data in memory, configurations from files, results."""

import dataclasses
import math

import pytest
from datasets import Dataset

from diffalign import DiffusionDPOConfig, FlowGRPOConfig, ForwardRLConfig, Prompt, ReFLConfig
from diffalign.config.sections import LoraConfig
from diffalign.data.pairs import PairData, load_pairs
from diffalign.data.prompts import as_prompts
from diffalign.data.unpaired import LabelledData
from diffalign.trainers.diffusion_dpo.batches import read_data
from diffalign.trainers.inputs import dataset
from diffalign.trainers.result import read_result
from tests.conftest import ROOT

PROMPTS = [Prompt("a red circle"), Prompt("a blue square", {"count": 2})]
FORMS = {
    "prompts": PROMPTS,
    "texts and rows": ["a red circle", {"prompt": "a blue square", "count": 2}],
    "captions": [{"caption": "a red circle"}, {"caption": " a blue square ", "metadata": {"count": 2}}],
    "data set": Dataset.from_list([{"text": "a red circle", "count": None}, {"text": "a blue square", "count": 2}]),
}


@pytest.mark.parametrize("form", FORMS)
def test_prompts_in_memory_are_those_of_files(form):
    assert as_prompts(FORMS[form]) == PROMPTS
    assert dataset(FORMS[form], None, "train_prompts") == PROMPTS


def test_a_path_is_read(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("a red circle\n")
    for given in (path, str(path)):
        assert dataset(given, None, "train_prompts") == PROMPTS[:1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("a red circle", "prompts: pass a list of Prompt, texts or rows, got str"),
        (3, "got int"),
        ({"prompt": "a"}, "got dict"),
        ([PROMPTS[0], 3], r"prompts\[1\]: pass a Prompt, a text or a row, got int"),
        ([PROMPTS[0], {"name": "a"}], r'prompts\[1\]: no "prompt" among name'),
        (["a", " "], r'prompts\[1\]: "prompt" must be a text that is not empty'),
    ],
)
def test_what_is_no_prompt_is_named(given, message):
    with pytest.raises(ValueError, match=message):
        as_prompts(given)


@pytest.mark.parametrize(("loss", "kind"), [("dpo", PairData), ("kto", LabelledData)])
def test_a_data_set_of_pairs_in_memory(loss, kind):
    path = ROOT / "assets/preferences/shapes.parquet"
    table = Dataset.from_parquet(str(path)).select(range(8))
    config = DiffusionDPOConfig(model="m", loss=loss, train_data=("unused.parquet",))
    data = read_data(config, table)
    assert isinstance(data, kind)
    if kind is PairData:
        named = load_pairs(path)
        assert [data[i].prompt for i in range(8)] == [named[i].prompt for i in range(8)]
        assert [data[i].label for i in range(8)] == [named[i].label for i in range(8)]
        images = data.load(3)[1]
        assert [image.tobytes() for image in images] == [image.tobytes() for image in named.load(3)[1]]
    labelled = dataclasses.replace(config, data=dataclasses.replace(config.data, labels="labels.jsonl"))
    with pytest.raises(ValueError, match=r"data\.labels: AI labels name rows of files"):
        read_data(labelled, table)


@pytest.mark.parametrize("kind", [DiffusionDPOConfig, FlowGRPOConfig, ForwardRLConfig, ReFLConfig])
def test_a_configuration_from_a_file_with_changes(kind, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model: m\nlearning_rate: 1.0e-3\nlora: {rank: 4}\n")
    config = kind.from_yaml(path, max_train_steps=7, lora=LoraConfig(rank=2))
    assert (config.model, config.learning_rate, config.max_train_steps, config.lora.rank) == ("m", 1e-3, 7, 2)
    path.write_text("model: m\nlearningrate: 1\n")
    with pytest.raises(ValueError, match=r"c\.yaml: .*learning_rate"):
        kind.from_yaml(path)


def test_a_result_of_rows(tmp_path):
    lines = [
        '{"step": 0, "eval/accuracy": 0.3}', '{"step": 1, "loss": 2.0}', '{"step": 2, "eval/accuracy": 0.6}',
        '{"step": 2, "loss": 1.0}', '{"step": 3, "eval/accuracy": 0.5}', '{"step": 3, "time/save": 1.0}',
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    result = read_result(tmp_path, 3)
    assert (result.best_step, result.step, result.weights, result.card) == (2, 3, (), None)
    assert (result.base, result.tuned) == ({"eval/accuracy": 0.3}, {"eval/accuracy": 0.5})
    assert result.metrics == {"loss": 1.0}
    lines += ['{"step": 4, "eval/accuracy": null}', '{"step": 5, "eval/accuracy": "inf", "loss": null}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    result = read_result(tmp_path, 4)
    assert result.best_step == 2, "a reward that failed on every image decides nothing"
    assert math.isnan(result.tuned["eval/accuracy"])
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert read_result(tmp_path, 5).tuned["eval/accuracy"] == math.inf
    empty = read_result(tmp_path / "none", 0)
    assert (empty.best_step, empty.base, empty.tuned, empty.metrics) == (None, {}, {}, {})
