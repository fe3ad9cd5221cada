"""HPSv2 and HPSv2.1 (arXiv 2306.09341): open_clip's ViT-H-14, fine-tuned on human preferences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffalign.rewards.base import Metadata, RewardCard, register
from diffalign.rewards.support.preprocess import Preprocess, at_least_float32, centre_round, on_images, should_quantize
from diffalign.rewards.support.prompts import unique_prompts
from diffalign.rewards.support.weights import Weights, frozen, load_once, on_device, quiet, state_dict


def _load(weights: Weights, file: str, architecture: str) -> tuple[nn.Module, Any]:
    import open_clip  # takes seconds to import

    if (Path(weights.path) / "open_clip_config.json").is_file():
        architecture = f"local-dir:{weights.path}"
    with quiet():
        model = open_clip.create_model(architecture, load_weights=False)
    model.load_state_dict(state_dict(weights, file))
    return frozen(model, weights), open_clip.get_tokenizer(architecture)


@dataclass(frozen=True)
class HpsReward:
    """Cosine similarity of the embeddings of an image and its prompt: about 0.2 to 0.37; benchmarks print it times 100.

    The published package resizes float tensors, not PIL images: with antialiasing since torchvision 0.17, as here. It
    scores in float16 on a GPU, this in the precision of ``weights``.

    Args:
        name: under which scores are stored.
        weights: folder or repository of the checkpoint.
        file: the checkpoint in it, ``{"state_dict": ...}`` with open_clip's names.
        architecture: open_clip model name; a folder with an ``open_clip_config.json`` overrides it.
        quantize: round input pixels to 8 bits; None: unless a gradient is required.
        differentiable: True.
        range: lowest and highest score.
    """

    name: str
    weights: Weights
    file: str
    architecture: str = "ViT-H-14"
    quantize: bool | None = None
    differentiable: bool = True
    range: tuple[float, float] = (-1.0, 1.0)

    @on_images()
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """Score images (B, 3, H, W), float, [0, 1]: (B,), float32 or wider, on their device."""
        model, tokenizer = load_once(_load, self.weights, self.file, self.architecture)
        quantize = should_quantize(self.quantize, images)
        with on_device(model, self.weights, images.device):
            step = Preprocess(goal=model.visual.image_size[0], crop=centre_round, through_pil=False)
            image = F.normalize(model.encode_image(step(images, quantize=quantize).to(self.weights.dtype)), dim=-1)
            once, rows = unique_prompts(prompts)
            with torch.no_grad():
                text = F.normalize(model.encode_text(tokenizer(once).to(images.device)), dim=-1)
            return at_least_float32((image * text[rows]).sum(-1))


HPS = RewardCard("human preference", 0.01, "arXiv 2306.09341", "xswu/HPSv2", "Apache-2.0", 986)


@register("hpsv2", HPS, file="HPS_v2_compressed.pt")
@register("hpsv2.1", HPS, file="HPS_v2.1_compressed.pt")
def hps(
    name: str,
    file: str,
    path: str = HPS.weights,
    revision: str | None = None,
    precision: str = "no",
    offload: bool = False,
    quantize: bool | None = None,
) -> HpsReward:
    """Build HPSv2 or HPSv2.1, or a model of the same layout at ``path``."""
    return HpsReward(name, Weights(path, revision, precision, offload), file, quantize=quantize)
