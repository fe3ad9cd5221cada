import ast
from dataclasses import replace

import pytest
import torch
import yaml
from huggingface_hub import ModelCard as HubCard

from diffalign.report.model_card import EDIT, ModelCard, eval_results, literal, write_model_card
from diffalign.report.results import figures

CARD = ModelCard(
    title="Shapes, tuned",
    base_model="stabilityai/stable-diffusion-3.5-medium",
    trainer="flow_grpo",
    command="accelerate launch scripts/train.py --config a.yaml",
    config_yaml="seed: 3\nprompt: a `b`\n",
    load_snippet="pipe.load_lora_weights('out')",
    results="| | base | tuned |\n| --- | ---: | ---: |\n| accuracy | 0.51 | 0.7525 |",
    pictures=["compare.png", "my curves.png"],
    tags=["shapes", "lora"],
)


def test_the_hub_reads_the_front_matter(tmp_path):
    data = HubCard(write_model_card(tmp_path, CARD).read_text(encoding="utf-8")).data
    assert data.library_name == "diffusers"
    assert data.pipeline_tag == "text-to-image"
    assert data.base_model == "stabilityai/stable-diffusion-3.5-medium"
    assert data.tags == ["lora", "text-to-image", "diffalign", "flow_grpo", "shapes"]
    assert data.base_model_relation == "adapter"
    assert data.license is data.eval_results is None
    assert "widget" not in data


def evaluation(name="pickscore", task="text-to-image"):
    scores = {name: torch.tensor([0.2, 0.4, 0.3, 0.5]), "failed": torch.full((4,), torch.nan)}
    found = figures(torch.tensor([0, 0, 1, 1]), scores, ["all"] * 4, None, {})
    return eval_results(found, "prompts/held out.jsonl", task)


def test_the_metadata_holds_each_reward_over_the_held_out_prompts(tmp_path):
    card = replace(CARD, evaluation=evaluation(), sample_prompt="a red circle")
    data = HubCard(write_model_card(tmp_path, card).read_text(encoding="utf-8")).data
    (result,) = data.eval_results  # a reward without a score is no result
    assert (result.task_type, result.dataset_type, result.dataset_name) == (
        "text-to-image",
        "prompts",
        "held out.jsonl",
    )
    assert (result.metric_type, result.metric_args["images"]) == ("pickscore", 4)
    assert result.metric_value == pytest.approx(0.35)
    assert data.model_name == "Shapes, tuned"
    assert data.widget == [{"text": "a red circle"}]


def test_a_model_that_edits_has_the_task_of_the_hub(tmp_path):
    card = replace(CARD, task=EDIT, evaluation=evaluation(task=EDIT))
    data = HubCard(write_model_card(tmp_path, card).read_text(encoding="utf-8")).data
    assert {data.pipeline_tag, data.eval_results[0].task_type, data.tags[1]} == {"image-to-image"}


@pytest.mark.parametrize(
    "front", ["license: other\nlicense_name: mine\nlicense_link: LICENSE.md", "", "license: [1]", "- a"]
)
def test_the_license_is_that_of_the_base_model_if_it_is_known(tmp_path, front):
    (tmp_path / "base").mkdir()
    (tmp_path / "base/README.md").write_text(f"---\n{front}\n---\n# Base\n")
    text = write_model_card(tmp_path, replace(CARD, base_model=str(tmp_path / "base"))).read_text()
    data = HubCard(text).data.to_dict()
    known = {"license": "other", "license_name": "mine", "license_link": "LICENSE.md"} if "mine" in front else {}
    assert {name: value for name, value in data.items() if name.startswith("license")} == known


@pytest.mark.parametrize(
    "text",
    [
        "---\n---",
        "a: b # c",
        "\x1b[31m",
        "'\"`",
        "two\r\nlines",
        "- *a &b !c",
        "\udcff",
        "null",
        "",
        "x" * 5000,
        "{{a}}",
        "…○",
    ],
)
def test_any_prompt_title_reward_and_folder_give_metadata_that_the_library_reads(tmp_path, text):
    card = replace(CARD, title=text, base_model=text, sample_prompt=text, tags=[text], evaluation=evaluation(text))
    written = write_model_card(tmp_path / "card.md", card).read_text(encoding="utf-8")
    hub = HubCard(written)
    assert hub.data.library_name == "diffusers"
    assert hub.data.eval_results[0].metric_value == pytest.approx(0.35)
    assert "## Training" in hub.text
    assert set(hub.data.to_dict()) <= {
        "library_name", "pipeline_tag", "base_model", "base_model_relation", "tags", "widget", "model-index"
    }  # fmt: skip


@pytest.mark.parametrize("base_model", ["/home/me/model", "./model", "a/b/c", "local"])
def test_a_folder_is_no_base_model_of_the_hub(tmp_path, monkeypatch, base_model):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "local").mkdir()
    text = write_model_card("card.md", replace(CARD, base_model=base_model)).read_text()
    assert HubCard(text).data.base_model is None
    assert f"A LoRA for `{base_model}`" in text


def test_full_weights_are_not_called_a_lora(tmp_path):
    text = write_model_card(tmp_path, replace(CARD, lora=False, tags=[])).read_text()
    assert "A denoiser with all of its weights tuned, for `stabilityai/stable-diffusion-3.5-medium`" in text
    assert HubCard(text).data.tags == ["text-to-image", "diffalign", "flow_grpo"]


def test_the_body_tells_how_to_use_it_what_it_reached_and_how_it_was_made(tmp_path):
    file = write_model_card(tmp_path / "card.md", CARD)
    assert file == tmp_path / "card.md"
    text = file.read_text(encoding="utf-8")
    for part in (
        "# Shapes, tuned\n",
        "```python\npipe.load_lora_weights('out')\n```",
        "## Results\n\n| | base | tuned |\n| --- | ---: | ---: |\n| accuracy | 0.51 | 0.7525 |\n",
        "![compare](compare.png)\n\n![my curves](my%20curves.png)",
        "```bash\naccelerate launch scripts/train.py --config a.yaml\n```",
        "```yaml\nseed: 3\nprompt: a `b`\n```",
    ):
        assert part in text


@pytest.mark.parametrize("text", ["a circle", 'a "red" circle', "a\\b", "two\r\nlines", "{x} it's ○\t\0", "```"])
def test_a_text_is_a_python_literal_of_one_line(text):
    found = literal(text)
    assert ast.literal_eval(found) == text
    assert len(found.splitlines()) == 1
    assert found.startswith('"')


def test_a_configuration_with_a_fence_inside_stays_whole(tmp_path):
    config = yaml.safe_dump({"template": "```\ncode\n```"})
    text = write_model_card(tmp_path, replace(CARD, config_yaml=config)).read_text()
    assert f"````yaml\n{config.strip()}\n````" in text


def test_no_metrics_no_table(tmp_path):
    assert "## Results" not in write_model_card(tmp_path, replace(CARD, results="")).read_text()
