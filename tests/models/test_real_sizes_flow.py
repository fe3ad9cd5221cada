"""FLUX.1, Qwen-Image, SANA and later flow models at their published sizes, on the meta device."""

import pytest
import torch
from safetensors import safe_open

from diffalign.models import LoraConfig, get_family
from tests.models.published_flow_configs import FLOW_COUNTED, FLOW_PIPELINES
from tests.models.test_real_sizes import materialise

RANK = 4
FLUX_LORA = RANK * 2 * 3072 * (19 * 8 + 38 * 3)
# Blocks times square projections of one width; a LoRA has r (in + out) numbers for each.
LORA = {
    "flux_dev": FLUX_LORA,
    "flux_schnell": FLUX_LORA,
    # Nothing reads what the last block says of the text.
    "qwen_image": RANK * 2 * 3072 * (60 * 8 - 1),
    "sana": RANK * 2 * 2240 * 20 * (4 + 4),
    "z_image": RANK * 2 * 3840 * (30 + 2 + 2) * 4,
    # Of a single block: one projection to 9 widths (q, k, v and a gated MLP of 3), and one from 4.
    "flux2_dev": RANK * 6144 * (8 * 8 * 2 + 48 * (10 + 5)),
    "flux2_klein": RANK * 3072 * (5 * 8 * 2 + 20 * (10 + 5)),
    "lumina2": RANK * (26 + 2 + 2) * (2 * (2304 + 2304) + 2 * (2304 + 8 * 96)),  # 8 heads of keys and values
    "chroma": FLUX_LORA,
    "cogview4": RANK * 2 * 4096 * 28 * 4,
}
NAMES = {
    "flux_dev": ("transformer.single_transformer_blocks.37.attn.to_v.lora_A.weight", (RANK, 3072)),
    "flux_schnell": ("transformer.transformer_blocks.18.attn.to_add_out.lora_B.weight", (3072, RANK)),
    "qwen_image": ("transformer.transformer_blocks.59.attn.add_k_proj.lora_A.weight", (RANK, 3072)),
    "sana": ("transformer.transformer_blocks.19.attn2.to_out.0.lora_B.weight", (2240, RANK)),
    "z_image": ("transformer.noise_refiner.1.attention.to_q.lora_A.weight", (RANK, 3840)),
    "flux2_dev": ("transformer.single_transformer_blocks.47.attn.to_qkv_mlp_proj.lora_B.weight", (9 * 6144, RANK)),
    "flux2_klein": ("transformer.single_transformer_blocks.19.attn.to_out.lora_A.weight", (RANK, 4 * 3072)),
    "lumina2": ("transformer.context_refiner.1.attn.to_k.lora_B.weight", (8 * 96, RANK)),
    "chroma": ("transformer.single_transformer_blocks.37.attn.to_v.lora_A.weight", (RANK, 3072)),
    "cogview4": ("transformer.transformer_blocks.27.attn1.to_out.0.lora_B.weight", (4096, RANK)),
}
LATENT = dict.fromkeys(FLOW_PIPELINES, 16 * 128 * 128) | {
    "sana": 32 * 32 * 32,
    "flux2_dev": 128 * 64 * 64,
    "flux2_klein": 128 * 64 * 64,
}


def counts(pipeline):
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}


@pytest.mark.parametrize("name", FLOW_PIPELINES)
def test_parts_and_lora_have_the_published_sizes_and_names(name, tmp_path):
    pipeline = FLOW_PIPELINES[name]()
    found = counts(pipeline)
    assert {part: found[part] for part in FLOW_COUNTED[name]} == FLOW_COUNTED[name]
    for part in found:
        getattr(pipeline, part).to(torch.float32 if part == "vae" else torch.bfloat16)
    model = get_family(type(pipeline).__name__)(pipeline)
    assert model.default_resolution == (1024, 1024)
    own = {layer for layer, _ in model.raw_denoiser.named_modules()}
    model.train(LoraConfig(rank=RANK))
    assert sum(p.numel() for p in model.weights.trainable) == LORA[name]

    assert torch.Size(model.latent_shape()).numel() == LATENT[name]

    materialise(model.raw_denoiser)
    with safe_open(model.save(tmp_path), "pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    key, shape = NAMES[name]
    assert shapes[key] == shape
    layers = {key.rsplit(".", 2)[0].removeprefix("transformer.") for key in shapes}
    assert layers <= own
    assert all(any(f".{layer}".endswith(f".{target}") for layer in layers) for target in model.lora_targets)
