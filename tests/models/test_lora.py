"""Exported LoRAs, loaded by plain diffusers in a fresh process."""

import json

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffalign.models import LoraConfig, load_model
from diffalign.models.checkpoint_context import with_tuned_weights
from diffalign.models.lora import export, learned_nothing
from tests.models.families import FAMILIES, LORA, images_of, noise_of
from tests.models.plain_diffusers import TEXTS, draw_fresh

STABLE = ("sd3", "sd15", "sd2", "sdxl")


def trained(family, model, config, folder):
    """Perturb and save the trainable weights; return the model's images."""
    model.train(config, seed=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.weights.trainable:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    model.save(folder)
    noise = noise_of(model, len(TEXTS))
    save_file({"noise": noise}, folder / "noise.safetensors")
    return images_of(FAMILIES[family], model, noise)


CONFIGS = {
    "rank": LoraConfig(rank=4),
    "alpha": LoraConfig(rank=4, alpha=16.0),
    "full": LoraConfig(rank=0),
}
OTHER_TARGETS = {
    "sd3": LoraConfig(rank=2, alpha=1.0, targets=("attn.to_q", "ff.net.2", "proj_out")),
    # A convolution, and the projections around the attention of SD 1.5, which are convolutions too.
    "sd15": LoraConfig(rank=2, alpha=1.0, targets=("conv1", "proj_in", "ff.net.2", "to_v")),
}


@pytest.mark.slow
def test_a_fresh_process_draws_the_trainers_images(family_pipelines, tmp_path):
    jobs, expected = [], {}
    for family in STABLE:
        pipeline, how = family_pipelines[family], FAMILIES[family]
        configs = CONFIGS | ({"targets": OTHER_TARGETS[family]} if family in OTHER_TARGETS else {})
        for name, config in configs.items():
            folder = tmp_path / f"{family}-{name}"
            expected[family, name] = trained(family, load_model(pipeline, **how.options), config, folder)
            jobs.append([str(pipeline), str(folder), how.scale, how.call])
    draw_fresh(jobs, loras=len(jobs) - len(STABLE))
    drawn = {key: load_file(tmp_path / "-".join(key) / "image.safetensors") for key in expected}
    for key, image in expected.items():
        assert (drawn[key]["image"] - image).abs().max() < 1e-5, key
        assert (image - drawn[key]["base"]).abs().max() > 1e-3, f"{key}: the weights must matter"
    for family in STABLE:
        rank, alpha = (drawn[family, name]["image"] for name in ("rank", "alpha"))
        assert (rank - alpha).abs().max() > 1e-3, f"{family}: alpha must matter"


def test_metadata_tells_rank_and_an_alpha_that_is_the_rank(model, tmp_path):
    trained("sd3", model, CONFIGS["alpha"], tmp_path)
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float32}  # noqa: SIM118
    assert metadata["transformer.r"] == 4
    assert metadata["transformer.lora_alpha"] == 4
    assert metadata["transformer.alpha_pattern"] == metadata["transformer.rank_pattern"] == {}


def test_an_adapter_that_learned_nothing_is_reported(model, tmp_path):
    model.train(LoraConfig(rank=2))
    path = model.save(tmp_path)
    with pytest.warns(UserWarning, match="this LoRA changes nothing"):
        assert learned_nothing(path)


def test_injection_depends_on_the_seed_alone(model):
    before = torch.random.get_rng_state()
    model.train(LoraConfig(rank=2), seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    first = next(p for n, p in model.raw_denoiser.named_parameters() if "lora_A" in n)
    assert first.std() > 0


def test_unknown_target_is_named(model):
    with pytest.raises(ValueError, match=r"no layer is named to_qq; layers of a block: .*attn\.to_q"):
        model.train(LoraConfig(targets=("to_qq",)))


@pytest.mark.parametrize(
    ("setting", "message"), [({"rank": -1}, "must be at least 0"), ({"alpha": 0.0}, "must be more than 0")]
)
def test_settings_that_mean_nothing_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**setting)


def test_metadata_of_a_unet_has_its_name(tiny_pipelines, tmp_path):
    trained("sdxl", load_model(tiny_pipelines["sdxl"]), CONFIGS["alpha"], tmp_path)
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
        assert {name.split(".")[0] for name in file.keys()} == {"unet"}  # noqa: SIM118
    assert (metadata["unet.r"], metadata["unet.lora_alpha"]) == (4, 4)


@pytest.mark.parametrize("family", LORA)
def test_a_reader_that_ignores_the_header_gets_the_same_update(family_pipelines, family, tmp_path):
    model = load_model(family_pipelines[family], **FAMILIES[family].options)
    trained(family, model, LoraConfig(rank=4, alpha=6.0), tmp_path)
    stored = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    layers = {name: layer for name, layer in model.raw_denoiser.named_modules() if hasattr(layer, "get_delta_weight")}
    assert len(stored) == 2 * len(layers)
    for name, layer in layers.items():
        down, up = (stored[f"{model.denoiser_name}.{name}.lora_{part}.weight"] for part in "AB")
        assert layer.scaling["default"] == 1.5, "the adapter that trains keeps its own alpha"
        torch.testing.assert_close(up @ down, layer.get_delta_weight("default").detach(), rtol=1e-5, atol=1e-7)


def test_ranks_and_alphas_of_single_layers_are_folded_too(model, tmp_path):
    pipeline, network = model.pipeline, model.raw_denoiser
    config = PeftLoraConfig(
        r=4,
        lora_alpha=8,
        rank_pattern={"to_k": 2},
        alpha_pattern={"to_k": 3.0, "to_v": 1.0},
        init_lora_weights=False,
        target_modules=["attn.to_q", "attn.to_k", "attn.to_v"],
    )
    network.add_adapter(config)
    expected = {
        name: layer.get_delta_weight("default")
        for name, layer in network.named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    export(pipeline, "transformer", tmp_path)
    pipeline.unload_lora_weights()
    stored = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    pipeline.load_lora_weights(tmp_path, adapter_name="default")
    for name, update in expected.items():
        down, up = (stored[f"transformer.{name}.lora_{part}.weight"] for part in "AB")
        torch.testing.assert_close(up @ down, update.detach(), rtol=1e-5, atol=1e-7)
        read = network.get_submodule(name).get_delta_weight("default")
        torch.testing.assert_close(read, update, rtol=1e-5, atol=1e-7)


def test_a_lora_of_an_earlier_version_keeps_its_alpha(family_pipelines, monkeypatch, tmp_path):
    """Its header says alpha, and its B is as it was trained."""
    model = load_model(family_pipelines["sd3"], **FAMILIES["sd3"].options)
    monkeypatch.setattr("diffalign.models.lora.fold_scale", lambda *_: None)
    expected = trained("sd3", model, CONFIGS["alpha"], tmp_path)
    fresh = load_model(family_pipelines["sd3"], **FAMILIES["sd3"].options)
    with with_tuned_weights(fresh, tmp_path):
        assert (images_of(FAMILIES["sd3"], fresh, noise_of(fresh, len(TEXTS))) - expected).abs().max() < 1e-5
