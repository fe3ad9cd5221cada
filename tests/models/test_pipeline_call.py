"""The snippet of a card, run by plain diffusers, draws the evaluated image, in every family."""

import pytest
import torch

from diffalign import FlowGRPOConfig, LoraConfig, ReFLConfig
from diffalign.models import load_model, with_tuned_weights
from diffalign.report.load_snippet import load_snippet
from diffalign.rollout.sampler import SamplingPlan, ode_plan, sample
from diffalign.structures import Guidance
from tests.models.families import FAMILIES, NAMES, noise_of, packed

PROMPT = 'a "red" circle'
STEPS = 4


@pytest.fixture(scope="module")
def trained(family_pipelines, tmp_path_factory):
    """Family -> a model, and the folder of a LoRA for it that changes what it draws."""
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            other = load_model(family_pipelines[name], **FAMILIES[name].options)
            other.train(LoraConfig(rank=2 if FAMILIES[name].lora else 0))
            torch.manual_seed(0)
            with torch.no_grad():
                for weight in other.weights.trainable:
                    weight.add_(0.05 * torch.randn_like(weight))
            other.save(folder)
            made[name] = load_model(family_pipelines[name], **FAMILIES[name].options), folder
            made[name][0].has_adapter = FAMILIES[name].lora  # as after a training: the snippet loads a LoRA
        return made[name]

    return make


def run(snippet, pipe_class, noise, monkeypatch):
    """The image of a snippet that starts from ``noise``."""
    call = pipe_class.__call__
    start = lambda self, *a, **k: call(self, *a, latents=packed(self, noise), output_type="pt", **k)  # noqa: E731
    monkeypatch.setattr(pipe_class, "__call__", start)
    found = {}
    exec(snippet, found)
    return found["image"]


@pytest.mark.parametrize(
    ("guided", "schedule"),
    [(False, "pipeline"), (True, "pipeline"), (True, "uniform")],
    ids=["plain", "cfg", "uniform"],
)
@pytest.mark.parametrize("name", NAMES)
def test_the_snippet_draws_the_evaluated_image(trained, family_pipelines, name, guided, schedule, monkeypatch):
    model, folder = trained(name)
    off = getattr(model, "unguided_scale", 1.0)
    guided = guided and FAMILIES[name].guided is not None
    scale = off + 2 if guided else off
    args = FlowGRPOConfig(
        model=str(family_pipelines[name]), output_dir=folder, guidance_scale=scale, eval_num_steps=STEPS,
        schedule=schedule, **{k: v for k, v in FAMILIES[name].options.items() if k != "revision"},
    )  # fmt: skip
    noise = noise_of(model, 1)
    with torch.no_grad(), with_tuned_weights(model, folder):
        guidance = Guidance(scale, model.unconditional()) if guided else None
        route = SamplingPlan(ode_plan(STEPS), model.levels(STEPS, schedule), guidance)
        expected = model.decode(sample(model, route, model.encode([PROMPT]), noise))[0]
    base = model.decode(sample(model, route, model.encode([PROMPT]), noise))[0].detach()
    image = run(load_snippet(model, args, PROMPT), type(model.pipeline), noise, monkeypatch)
    assert (expected - base).abs().max() > 1e-3
    assert (image - expected).abs().max() < 1e-4


def test_settings_stand_in_the_snippet_as_they_were_evaluated(trained):
    model, folder = trained("sd3")
    args = FlowGRPOConfig(model="m", output_dir=folder, guidance_scale=4.5, eval_num_steps=28, max_sequence_length=16)
    snippet = load_snippet(model, args, PROMPT)
    for part in ("num_inference_steps=28", "guidance_scale=4.5", "max_sequence_length=16"):
        assert part in snippet
    args = ReFLConfig(model="m", output_dir=folder, base_share=0.25)
    assert "base made the first 25% of the steps" in load_snippet(model, args, PROMPT)
    assert f"num_inference_steps={args.recipe.num_steps}" in load_snippet(model, args, PROMPT)
