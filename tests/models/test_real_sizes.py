"""SD 1.5, SDXL and SD3.5-medium at their published sizes, on the meta device."""

from collections import Counter

import pytest
import torch
from safetensors import safe_open

from diffalign.models import LoraConfig, get_family
from diffalign.models.weight_memory import memory_needs, size_of
from tests.models.published_configs import COUNTED, COUNTED_LORA, PIPELINES, on_meta

RANK = 4

# The attention blocks: width C -> how many, and the width X of the text. A UNet block has q, k, v, out over its own
# positions (C -> C) and q, out (C -> C), k, v (X -> C) over the text; so r (14 C + 2 X) numbers in a LoRA.
UNET_BLOCKS = {
    "sd15": ({320: 2 + 3, 640: 2 + 3, 1280: 2 + 3 + 1}, 768),
    "sdxl": ({640: 2 * 2 + 3 * 2, 1280: 2 * 10 + 3 * 10 + 10}, 2048),
}
NAMES = {
    "sd15": "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight",
    "sdxl": "unet.mid_block.attentions.0.transformer_blocks.9.attn1.to_out.0.lora_B.weight",
    "sd35_medium": "transformer.transformer_blocks.23.attn.add_v_proj.lora_A.weight",
}
SHAPES = {"sd15": (RANK, 768), "sdxl": (1280, RANK), "sd35_medium": (RANK, 1536)}


def lora_size(name):
    if name == "sd35_medium":
        # 24 blocks of 8 projections 1536 -> 1536; the last one gives no text on.
        return RANK * 2 * 1536 * (24 * 8 - 1)
    blocks, text = UNET_BLOCKS[name]
    return RANK * sum(count * (14 * width + 2 * text) for width, count in blocks.items())


def wrapped(name, dtype=torch.float32):
    """The model as ``load_model`` gives it."""
    pipeline = on_meta(name)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.to(torch.float32 if part is pipeline.vae else dtype)
    return get_family(type(pipeline).__name__)(pipeline)


def materialise(module):
    """Gives the adapter's layers real weights, so that they can be written."""
    for name, layer in module.named_modules():
        if name.endswith((".lora_A.default", ".lora_B.default")):
            layer.to_empty(device="cpu")


@pytest.mark.parametrize("name", PIPELINES)
def test_parts_have_the_parameters_that_others_counted(name):
    pipeline = on_meta(name)
    assert {part: sum(p.numel() for p in getattr(pipeline, part).parameters()) for part in COUNTED[name]} == COUNTED[
        name
    ]


@pytest.mark.parametrize("name", PIPELINES)
def test_a_lora_has_the_published_size_and_names(name, tmp_path):
    model = wrapped(name)
    model.train(LoraConfig(rank=RANK))
    assert sum(p.numel() for p in model.weights.trainable) == lora_size(name) == COUNTED_LORA.get(name, lora_size(name))
    materialise(model.raw_denoiser)
    with safe_open(model.save(tmp_path), "pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    assert shapes[NAMES[name]] == SHAPES[name]
    assert Counter(key.split(".")[0] for key in shapes) == {model.denoiser_name: len(model.weights.trainable)}
    layers = {key.rsplit(".", 2)[0].removeprefix(f"{model.denoiser_name}.") for key in shapes}
    assert layers <= {layer for layer, _ in on_meta(name).components[model.denoiser_name].named_modules()}
    assert all(any(layer.endswith(f".{target}") for layer in layers) for target in model.lora_targets)


@pytest.mark.parametrize(
    ("name", "resolution", "latent"),
    [("sd15", 512, 4 * 64 * 64), ("sdxl", 1024, 4 * 128**2), ("sd35_medium", 1024, 16 * 128**2)],
)
def test_memory_of_a_lora_on_a_frozen_bfloat16_model(name, resolution, latent):
    model = wrapped(name, torch.bfloat16)
    assert model.default_resolution == (resolution, resolution)
    model.train(LoraConfig(rank=RANK))
    needs = memory_needs(model, pairs=8)
    counted = COUNTED[name] | ({"text_encoder_2": 694_659_840} if name == "sd35_medium" else {})
    # The table of positions of SD3.5's transformer is a buffer, a tenth as large as its weights.
    positions = 384 * 384 * 1536 if name == "sd35_medium" else 0
    encoders = sum(part.startswith("text_encoder") and part != "text_encoder_3" for part in counted)
    assert needs.frozen == {
        torch.bfloat16: 2 * (sum(counted.values()) - counted["vae"] + positions),
        torch.float32: 4 * counted["vae"],
        torch.int64: encoders * 8 * 77,
    }
    adapter = 4 * lora_size(name)
    assert (needs.trainable, needs.gradients, needs.moments, needs.copies) == (adapter, adapter, 2 * adapter, 0)
    assert needs.pair_latents == 8 * 2 * latent * 4
    assert needs.total == sum(needs.frozen.values()) + 4 * adapter + needs.pair_latents


def test_memory_of_full_fine_tuning_with_a_reference():
    model = wrapped("sdxl")
    model.train(LoraConfig(rank=0))
    needs = memory_needs(model, pairs=1, resolution=(512, 768), copies=1)
    weights = 4 * COUNTED["sdxl"]["unet"]
    assert (needs.trainable, needs.copies, needs.gradients, needs.moments) == (weights, weights, weights, 2 * weights)
    assert needs.pair_latents == 2 * 4 * 64 * 96 * 4


@pytest.mark.parametrize("rank", [4, 0])
def test_memory_is_what_tensors_take(model, rank):
    model.train(LoraConfig(rank=rank), keep_reference=True)
    needs = memory_needs(model, pairs=3, copies=int(rank == 0))
    optimizer = torch.optim.AdamW(model.weights.trainable)
    images = torch.rand(6, 3, 64, 64)
    latents = model.encode_images(images)
    output = model.predict(latents, model.levels(4)[1], model.encode(["a red circle"] * 6))
    output.mean().backward()
    optimizer.step()
    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert needs.gradients == sum(size_of(p.grad) for p in model.weights.trainable)
    assert needs.moments == sum(map(size_of, moments))
    assert needs.trainable == sum(p.untyped_storage().nbytes() for p in model.weights.trainable)
    assert needs.copies == sum(t.nbytes for kept in model.weights._sets.values() for t in kept)
    assert needs.pair_latents == latents.nbytes
    parts = [part for part in model.pipeline.components.values() if isinstance(part, torch.nn.Module)]
    every = {t.data_ptr(): t.nbytes for part in parts for t in [*part.parameters(), *part.buffers()]}
    assert sum(needs.frozen.values()) + needs.trainable == sum(every.values())
