"""DoRA, rsLoRA, chosen layers and per-layer ranks, loaded by plain diffusers in a fresh process."""

import pytest
from safetensors.torch import load_file

from diffalign.models import LoraConfig, load_model
from diffalign.models.checkpoint_context import with_tuned_weights
from tests.models.families import FAMILIES, images_of, noise_of
from tests.models.plain_diffusers import STEPS, TEXTS, draw_fresh
from tests.models.test_lora import trained

VARIANTS = {
    "dora": LoraConfig(rank=4, alpha=6.0, use_dora=True),
    "rslora": LoraConfig(rank=4, alpha=6.0, use_rslora=True),
    "layers": LoraConfig(rank=4, layers=r".*attn.*\.to_[qv]"),
    "blocks": LoraConfig(rank=4, blocks=(1,)),
    "patterns": LoraConfig(rank=4, rank_pattern={"to_k": 2, r"to_out\.0": 6}, alpha_pattern={"to_k": 7.0}),
}
CONVOLUTIONS = LoraConfig(rank=3, use_dora=True, use_rslora=True, targets=("conv1", "proj_in", "to_q"))


def adapted(model):
    return {name: layer for name, layer in model.raw_denoiser.named_modules() if hasattr(layer, "get_delta_weight")}


@pytest.mark.slow
def test_a_fresh_process_draws_the_trainers_images(family_pipelines, tmp_path):
    jobs, expected, scaled = [], {}, 0
    for family in ("sd15", "sdxl", "sd3"):
        pipeline, how = family_pipelines[family], FAMILIES[family]
        for name, config in (VARIANTS | ({"convolutions": CONVOLUTIONS} if family == "sd15" else {})).items():
            folder = tmp_path / f"{family}-{name}"
            model = load_model(pipeline, **how.options)
            expected[family, name] = trained(family, model, config, folder)
            jobs.append([str(pipeline), str(folder), how.scale, how.call])
            scaled += not config.use_dora  # a DoRA's norms stay at scale 0
    draw_fresh(jobs, loras=scaled)
    for key, image in expected.items():
        drawn = load_file(tmp_path / "-".join(key) / "image.safetensors")
        assert (drawn["image"] - image).abs().max() < 1e-5, key
        assert (image - drawn["base"]).abs().max() > 1e-3, f"{key}: the weights must matter"


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_change_what_they_name(model, name):
    model.train(VARIANTS[name], seed=1)
    layers = adapted(model)
    ranks = {layer: module.r["default"] for layer, module in layers.items()}
    assert (len(next(iter(layers.values())).lora_magnitude_vector) == 1) == (name == "dora")
    scales = {layer: module.scaling["default"] for layer, module in layers.items()}
    if name == "rslora":
        assert set(scales.values()) == {3.0}
    if name == "layers":
        assert {layer.rsplit(".", 1)[-1] for layer in layers} == {"to_q", "to_v"}
    if name == "blocks":
        assert {layer.split(".")[1] for layer in layers} == {"1"}
    if name == "patterns":
        assert {ranks[layer] for layer in layers if layer.endswith("to_k")} == {2}
        assert {ranks[layer] for layer in layers if layer.endswith("to_out.0")} == {6}
        assert {scales[layer] for layer in layers if layer.endswith("to_k")} == {3.5}
        assert {ranks[layer] for layer in layers if layer.endswith("to_q")} == {4}


@pytest.mark.parametrize("name", ["dora", "rslora", "patterns"])
def test_variants_are_evaluated_as_they_trained(family_pipelines, name, tmp_path):
    model = load_model(family_pipelines["sd15"])
    expected = trained("sd15", model, VARIANTS[name], tmp_path)
    fresh = load_model(family_pipelines["sd15"])
    with with_tuned_weights(fresh, tmp_path):
        assert (
            images_of(FAMILIES["sd15"], fresh, noise_of(fresh, len(TEXTS)), steps=STEPS) - expected
        ).abs().max() < 1e-5


REFUSED = {
    "no layer": ({"layers": "nothing.*"}, r"lora.layers: 'nothing\.\*' matches no layer; layers of a block: .*attn"),
    "no expression": ({"layers": "("}, r"lora.layers: '\(' is no regular expression"),
    "no block": ({"blocks": (0, 99)}, r"lora.blocks: no adapted layer is in block 99; blocks: 0, 1"),
    "no rank": ({"rank_pattern": {"to_zz": 2}}, r"lora.rank_pattern: 'to_zz' matches no adapted layer; adapted: "),
    "rank 0": ({"rank_pattern": {"to_q": 0}}, "rank_pattern.* must be at least 1"),
    "negative alpha": ({"alpha_pattern": {"to_q": -1.0}}, "alpha_pattern.* must be more than 0"),
    "negative block": ({"blocks": (-1,)}, "blocks.* must be at least 0"),
    "no alpha": ({"alpha_pattern": {"x": 2.0}}, r"lora.alpha_pattern: 'x' matches no adapted layer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_patterns_that_match_nothing_are_refused(model, case):
    settings, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        model.train(LoraConfig(**settings))
