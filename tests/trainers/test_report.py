"""What the report of a run says."""

import ast
from types import SimpleNamespace

import pytest
from torch import nn

from diffalign import FlowGRPOConfig
from diffalign.models.weights import POLICY
from diffalign.trainers.report import Report


@pytest.mark.parametrize("has_adapter", [True, False])
def test_any_prompt_model_and_folder_stand_in_the_card_as_they_are(tmp_path, has_adapter):
    prompt, name, folder = 'a "red"\\circle\non {two} lines', 'C:\\models\\"mine"', tmp_path / 'my "runs"'
    model = SimpleNamespace(
        negative=None, has_adapter=has_adapter, denoiser_name="transformer", raw_denoiser=nn.Linear(1, 1)
    )
    args = FlowGRPOConfig(model=name, revision="v1", output_dir=folder)
    report = Report(model, args, "flow_grpo", POLICY)
    report.shown = SimpleNamespace(texts=[prompt])
    card = report._card("", [])
    said = [node.value for node in ast.walk(ast.parse(card.load_snippet)) if isinstance(node, ast.Constant)]
    weights = str(folder if has_adapter else folder / "transformer")
    assert {prompt, name, "v1", weights} <= set(said)
    assert f"--config '{folder}/config.yaml'" in card.command
