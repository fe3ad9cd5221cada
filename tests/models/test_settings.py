"""Sizes and lengths that a family cannot draw or read are refused before any work, in every command that takes them."""

import pytest

from diffalign import DiffusionDPOConfig, FlowGRPOConfig, ReFLConfig
from diffalign.cli import main
from diffalign.commands.evaluate_config import EvaluationConfig
from diffalign.diffusion.plan import PlanConfig, make_plan
from diffalign.models import load_model
from diffalign.models.meta_device import model_on_meta
from tests.conftest import PIPELINE, PROMPTS
from tests.models.families import FAMILIES, NAMES

# What the tiny pipelines' own checks want: 8 (UNets), whole tokens, 32 (SANA).
UNITS = {"sd15": 8, "sd2": 8, "sdxl": 8, "sana": 32, "cogview4": 16, "pixart_sigma": 8}
JUDGE = PROMPTS.parent / "judges" / "pickscore"
CONFIGS = (FlowGRPOConfig, DiffusionDPOConfig, ReFLConfig)


@pytest.mark.parametrize("load", [load_model, model_on_meta])
@pytest.mark.parametrize("name", NAMES)
def test_sides_are_the_pipelines_multiples(family_pipelines, name, load):
    options = {key: value for key, value in FAMILIES[name].options.items() if key != "resolution"}
    model = load(family_pipelines[name], **options)
    factor = model.latent_stride
    unit = UNITS.get(name, model.pipeline.vae_scale_factor * 2)
    assert model.resolution_unit == unit
    for side in (unit // 2, unit + 1, 3 * unit - 1, 0, -unit):
        with pytest.raises(ValueError, match=rf"resolution {side} x {side}: sides .* multiples of {unit} pixels; set"):
            load(family_pipelines[name], **options, resolution=side)
    loaded = load(family_pipelines[name], **options, resolution=unit)
    assert loaded.latent_shape()[1:] == (unit // factor, unit // factor)
    assert loaded.latent_shape((2 * unit, unit))[1:] == (2 * unit // factor, unit // factor)
    with pytest.raises(ValueError, match=rf"resolution {unit} x {unit + 1}"):
        loaded.latent_shape((unit, unit + 1))


@pytest.mark.parametrize("name", NAMES)
def test_the_pipeline_accepts_supported_options_and_most_refuse_the_rest(family_pipelines, plain, name):
    pipe, unit = plain(name), load_model(family_pipelines[name], **FAMILIES[name].options).resolution_unit
    call = {key: value for key, value in FAMILIES[name].call.items() if key not in ("height", "width")}
    call |= {"num_inference_steps": 2, "output_type": "latent"}
    pipe(prompt="a", height=unit, width=2 * unit, **call)
    if not name.startswith(("chroma", "flux", "qwen")):  # these say so, and draw a smaller image
        with pytest.raises(ValueError, match="divisible"):
            pipe(prompt="a", height=unit, width=unit + unit // 2, **call)


def test_positions_end_somewhere():
    model = load_model(PIPELINE)
    most = model.raw_denoiser.config.pos_embed_max_size * model.resolution_unit
    load_model(PIPELINE, resolution=most)
    with pytest.raises(ValueError, match=rf"knows positions up to {most} pixels"):
        load_model(PIPELINE, resolution=most + model.resolution_unit)


@pytest.mark.parametrize("name", [name for name in FAMILIES if "max_sequence_length" in FAMILIES[name].options])
def test_sequences_are_as_long_as_the_pipeline_takes(family_pipelines, name):
    options = dict(FAMILIES[name].options)
    longest = load_model(family_pipelines[name], **options).longest_sequence
    assert longest == {"qwen_image": 1024}.get(name, longest)
    for length in (0, -1, longest + 1):
        with pytest.raises(ValueError, match=rf"max_sequence_length {length}: .* takes 1 to {longest} tokens"):
            load_model(family_pipelines[name], **{**options, "max_sequence_length": length})


@pytest.mark.parametrize("value", [0, -16])
@pytest.mark.parametrize("field", ["resolution", "max_sequence_length"])
@pytest.mark.parametrize("kind", [*CONFIGS, EvaluationConfig])
def test_options_that_no_family_supports_are_refused_before_a_model_loads(kind, field, value):
    given = {"prompts": PROMPTS / "shapes_validation.jsonl", "rewards": ("shapes",)} if kind is EvaluationConfig else {}
    allowed = r"at least 1( and at most \d+)?"
    with pytest.raises(ValueError, match=rf"^{kind.__name__}: {field} must be {allowed}, got {value}$"):
        kind(model=str(PIPELINE), **given, **{field: value})


@pytest.mark.parametrize("command", ["train flow_grpo", "train diffusion_dpo", "train refl", "compare", "eval"])
@pytest.mark.parametrize("side", [60, 57])
def test_commands_refuse_it_and_write_nothing(family_pipelines, command, side, tmp_path, capsys):
    out, prompts = tmp_path / "out", str(PROMPTS / "shapes_validation.jsonl")
    arguments = ["--model", str(family_pipelines["sd15"]), "--resolution", str(side), "--output_dir", str(out)]
    train = ["--train_prompts", prompts, "--rewards"]
    more = {
        "train flow_grpo": [*train, "{shapes: 1}", "--plan.solver", "ddim"],
        "train diffusion_dpo": [*train, "{shapes: 1}"],
        "train refl": [
            *train,
            f"{{pickscore: {{options: {{path: {JUDGE}, tokenizer: {JUDGE}}}}}}}",
            "--recipe.preset",
            "draft_k",
        ],
    }.get(command, ["--prompts", prompts, "--rewards", "[shapes]"])
    assert main([*command.split(), *arguments, *more]) == 2
    assert f"resolution {side} x {side}: sides of this model's images are multiples of 8" in capsys.readouterr().err
    assert not [file for file in out.rglob("*") if file.suffix in (".png", ".safetensors")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window_size": 4, "window_range": (0, 3)}, r"plan\.window_range \[0, 3\)"),
        ({"window_size": 2, "window_range": (-1, 3)}, r"window_range\.0 must be at least 0, got -1"),
        # Its last window reaches the last step, in some iterations only.
        ({"window_size": 2, "window_range": (0, 10)}, r"plan\.window_range \[0, 10\) reaches the last of 10 steps"),
        ({"window_size": 8}, r"plan\.window_range \[0, 5\)"),
    ],
)
@pytest.mark.parametrize("preset", ["flow_grpo_fast", "cps_fast"])
def test_windows_that_do_not_fit_are_refused_in_every_iteration(preset, settings, message):
    for iteration in range(20):
        with pytest.raises(ValueError, match=message):
            make_plan(PlanConfig(preset=preset, num_steps=10, **settings), iteration, 0)
