"""HPSv3 (arXiv 2508.03789): Qwen2-VL-7B with a head for the mean and uncertainty of human preference.

``hpsv3_prompt.txt`` is the training prompt of the weights (from the authors' package, MIT licence).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, Qwen2VLConfig, Qwen2VLModel

from diffalign.rewards.base import Extras, Metadata, RewardCard, register
from diffalign.rewards.support.preprocess import on_images, should_quantize
from diffalign.rewards.support.prompts import escape_special_tokens
from diffalign.rewards.support.qwen_vl import Patches, chat
from diffalign.rewards.support.weights import (
    Weights,
    check_report,
    frozen,
    load_once,
    on_device,
    pinned,
    split,
    weights_file,
)

FILE = "HPSv3.safetensors"
BASE = "Qwen/Qwen2-VL-7B-Instruct"
TOKEN = "<|Reward|>"  # the head reads the hidden state of this token
PIXELS = 256 * 28 * 28  # area to which every image is resized, approximately

HEAD, UNUSED = "rm_head.", "lm_head."


@cache
def prompt_text() -> str:
    """Read the instruction, which contains ``{text_prompt}`` once."""
    return (Path(__file__).parent / "hpsv3_prompt.txt").read_text(encoding="utf-8")


class Network(nn.Module):
    """Qwen2-VL without its language-model head, plus the score head."""

    def __init__(self, network: Qwen2VLModel) -> None:
        super().__init__()
        self.network = network
        self.head = nn.Sequential(
            nn.Linear(network.config.text_config.hidden_size, 1024),
            nn.ReLU(),
            nn.Dropout(0.05),
            nn.Linear(1024, 16),
            nn.ReLU(),
            nn.Linear(16, 2),
        )

    def forward(self, ids: Tensor, mask: Tensor, rows: Tensor, grid: Tensor, token: int) -> Tensor:
        """Predict mean and log standard deviation: (B, 2).

        Args:
            ids: tokens (B, L), padded on the right, with ``token`` once in each row.
            mask: attention mask (B, L).
            rows: image patches, see ``qwen_vl.patchify``.
            grid: patch grids (B, 3).
            token: id of the token whose hidden state the head reads.
        """
        embeddings = self.network.get_input_embeddings()(ids)
        patches = torch.cat(self.network.get_image_features(rows, grid).pooler_output).to(embeddings.dtype)
        is_patch = (ids == self.network.config.image_token_id)[..., None].expand_as(embeddings)

        # The published model uses plain 1-D positions, without Qwen's rows and columns.
        positions = torch.arange(ids.shape[1], device=ids.device).expand(3, len(ids), -1)
        hidden = self.network.language_model(
            inputs_embeds=embeddings.masked_scatter(is_patch, patches),
            attention_mask=mask,
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state
        return self.head(hidden[ids == token].to(self.head[0].weight.dtype))


def build(published: dict[str, Tensor], config: Qwen2VLConfig, weights: Weights) -> Network:
    """Build the network from published weights. Raises ValueError if some are missing or unexpected."""
    own = {name: tensor for name, tensor in published.items() if not name.startswith((HEAD, UNUSED))}
    # from_pretrained converts the weight names of transformers 4.45, and knows the buffers that are not stored.
    network, report = Qwen2VLModel.from_pretrained(
        None, config=config, state_dict=own, dtype=weights.dtype, output_loading_info=True
    )
    check_report(report, weights.path, "Qwen2-VL")
    result = frozen(Network(network), weights)
    result.head.to(torch.promote_types(weights.dtype, torch.float32))
    head = {name.removeprefix(HEAD): tensor for name, tensor in published.items() if name.startswith(HEAD)}
    result.head.load_state_dict(head)
    return result


def _load(weights: Weights, base: str) -> tuple[Network, Any, Patches]:
    tokenizer = AutoTokenizer.from_pretrained(**pinned(base), trust_remote_code=False)
    tokenizer.add_special_tokens({"additional_special_tokens": [TOKEN]})
    published = load_file(weights_file(weights, FILE))
    config = AutoConfig.from_pretrained(**pinned(base), trust_remote_code=False)
    config.text_config.vocab_size = len(published["model.embed_tokens.weight"])
    patches = replace(Patches.of(*split(base)), smallest=PIXELS, largest=PIXELS)
    return build(published, config, weights), tokenizer, patches


@dataclass(frozen=True)
class HpsV3Reward:
    """Predict human preference for an image given its prompt, about -1 to 14; the extra "sigma" is its uncertainty.

    The head's second output is log sigma: the authors' trainer exponentiates it, as here; their inference code returns
    the logarithm.

    Args:
        name: under which scores are stored.
        weights: of the whole network.
        base: folder, or hub id with or without @revision, of Qwen2-VL-7B-Instruct, for configuration and tokenizer.
        quantize: round pixels to 8 bits; None: unless a gradient is required.
        differentiable: True.
        range: lowest and highest score.
    """

    name: str
    weights: Weights
    base: str = BASE
    quantize: bool | None = None
    differentiable: bool = True
    range: tuple[float, float] = (-math.inf, math.inf)

    @on_images("sigma")
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> tuple[Tensor, Extras]:
        """Score images (B, 3, H, W), float, [0, 1]: (B,), float32 or wider, on their device."""
        network, tokenizer, patches = load_once(_load, self.weights, self.base)
        quantize = should_quantize(self.quantize, images)
        rows, grid = patches(images, quantize=quantize)
        # Not str.format: a prompt may contain braces.
        texts = [prompt_text().replace("{text_prompt}", escape_special_tokens(tokenizer, prompt)) for prompt in prompts]
        count = len(rows) // len(images) // patches.merge**2
        ids, mask = chat(tokenizer, texts, count, "right", images.device)
        with on_device(network, self.weights, images.device):
            found = network(ids, mask, rows.to(self.weights.dtype), grid, tokenizer.convert_tokens_to_ids(TOKEN))
        return found[:, 0], {"sigma": found[:, 1].detach().exp()}


FACTS = RewardCard("human preference", 0.5, "arXiv 2508.03789", "MizzenAI/HPSv3", "MIT", 7750)


@register("hpsv3", FACTS)
def hpsv3(
    name: str,
    path: str = FACTS.weights,
    base: str = BASE,
    revision: str | None = None,
    precision: str = "bf16",
    offload: bool = False,
    quantize: bool | None = None,
) -> HpsV3Reward:
    """Build the published model, or one from the same file in a folder ``path``."""
    return HpsV3Reward(name, Weights(path, revision, precision, offload), base, quantize)
