"""SD 1.5, SDXL and SD3.5-medium at their published sizes, on the meta device."""

from collections import Counter

import pytest
import torch
from safetensors import safe_open

from diffalign.models import LoraConfig, get_family
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


def test_a_frozen_model_keeps_its_vae_in_float32():
    model = wrapped("sdxl", torch.bfloat16)
    model.train(LoraConfig(rank=RANK))
    assert model.default_resolution == (1024, 1024)
    assert {p.dtype for p in model.pipeline.vae.parameters()} == {torch.float32}
    assert {p.dtype for p in model.weights.trainable} == {torch.float32}
    frozen = [p for p in model.raw_denoiser.parameters() if not p.requires_grad]
    assert {p.dtype for p in frozen} == {torch.bfloat16}
    assert sum(p.numel() for p in frozen) == COUNTED["sdxl"]["unet"]
