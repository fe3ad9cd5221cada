"""What the report of a run says."""

import ast
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from diffalign import FlowGRPOConfig
from diffalign.config.sections import RewardConfig
from diffalign.evaluation.heldout import Shown
from diffalign.models.weights import POLICY
from diffalign.report.run_report import Report
from diffalign.structures import Prompt
from diffalign.trainers.inputs import reward_table


@pytest.mark.parametrize("has_adapter", [True, False])
def test_any_prompt_model_and_folder_stand_in_the_card_as_they_are(tmp_path, has_adapter):
    prompt, name, folder = 'a "red"\\circle\non {two} lines', 'C:\\models\\"mine"', tmp_path / 'my "runs"'
    pipeline = SimpleNamespace(components={}, _optional_components=[])
    parts = {"pipeline": pipeline, "denoiser_name": "transformer", "raw_denoiser": nn.Linear(1, 1)}
    model = SimpleNamespace(negative=None, has_adapter=has_adapter, **parts)
    args = FlowGRPOConfig(model=name, revision="v1", output_dir=folder)
    report = Report(model, args, "flow_grpo", "accelerate launch", POLICY)
    report.shown = SimpleNamespace(texts=[prompt], images=torch.zeros(1, 3, 8, 8))
    card = report._card("", [])
    said = [node.value for node in ast.walk(ast.parse(card.load_snippet)) if isinstance(node, ast.Constant)]
    weights = str(folder if has_adapter else folder / "transformer")
    assert {prompt, name, "v1", weights} <= set(said)
    assert f"--config '{folder}/config.yaml'" in card.command


@pytest.mark.parametrize(("about", "rewards"), [("other prompts", ("a", "b")), ("these", ("a",))])
def test_a_base_of_other_prompts_or_rewards_is_not_compared_with(tmp_path, about, rewards):
    args = FlowGRPOConfig(model="m", output_dir=tmp_path)
    report = Report(SimpleNamespace(), args, "flow_grpo", "accelerate launch", POLICY)
    shown = {
        name: Shown([Prompt("p")], torch.zeros(1, 3, 2, 2), {n: torch.zeros(1) for n in names}, torch.zeros(1).long(),
                    ["all"], {n: torch.zeros(1) for n in names}, None, said)
        for name, names, said in (("base", rewards, about), ("tuned", ("a", "b"), "these"))
    }  # fmt: skip
    (tmp_path / "samples").mkdir()
    report._keep("base", shown["base"])
    report.shown = shown["tuned"]
    with pytest.warns(UserWarning, match="the card shows no base; compare with: diffalign compare"):
        assert report._before() is None
    assert list(report.figures(None)) == ["tuned"]


@pytest.mark.parametrize("name", ["mean", "std", "accuracy", "diversity"])
def test_a_reward_may_not_take_the_name_of_another_figure(name):
    with pytest.raises(ValueError, match=f"{name}: logs use this name"):
        reward_table({name: RewardConfig(reward="shapes")})
