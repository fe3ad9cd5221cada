"""A judge of one's own: the reward that ``diffalign train reward`` learned from preference labels.

rewards: {mine: {path: runs/judge}}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.rewards.base import Metadata, RewardCard, register
from diffalign.rewards.support.judge_files import check_judge, check_rater, load_judge, read_about
from diffalign.rewards.support.judge_network import JudgeNetwork, preprocess_of, tokenize
from diffalign.rewards.support.judge_raters import network_class
from diffalign.rewards.support.preprocess import at_least_float32, on_images, should_quantize
from diffalign.rewards.support.prompts import unique_prompts
from diffalign.rewards.support.weights import Weights, frozen, load_once, on_device


def _load(weights: Weights, rater: str | None) -> tuple[JudgeNetwork, Any]:
    network, tokenizer = load_judge(weights, rater)
    return frozen(network, weights), tokenizer


@dataclass(frozen=True)
class JudgeReward:
    """Score by exp(logit_scale) cos(text, image), as PickScore (arXiv 2305.01569), or by PAL's model A.

    Args:
        name: under which scores are stored.
        weights: of the judge.
        rater: of several raters, the one to score as; None for the mean of all.
        quantize: round pixels to 8 bits as PIL does; None: unless a gradient is required.
        differentiable: True.
        range: lowest and highest score.
    """

    name: str
    weights: Weights
    rater: str | None = None
    quantize: bool | None = None
    differentiable: bool = True
    range: tuple[float, float] = (-100.0, 100.0)

    @on_images()
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """Score images (B, 3, H, W), float, [0, 1]: (B,), float32 or wider, on their device."""
        network, tokenizer = load_once(_load, self.weights, self.rater)
        with on_device(network, self.weights, images.device):
            config = network.backbone.config
            pixels = preprocess_of(config)(images, quantize=should_quantize(self.quantize, images))
            image = network.embed_images(network.pool_images(pixels.to(network.dtype)))
            text = _embed_texts(network, tokenizer, prompts, images.device)
            return at_least_float32(network.logit_scale * network.similarity(image[:, None], text)[:, 0])


@torch.no_grad()
def _embed_texts(network: JudgeNetwork, tokenizer: Any, prompts: Sequence[str], device: torch.device) -> Tensor:
    once, rows = unique_prompts(prompts)
    ids, mask = tokenize(tokenizer, network.backbone.config, once)
    pooled = network.pool_texts(ids.to(device), None if mask is None else mask.to(device))
    return network.embed_texts(pooled)[rows]


@register("judge", RewardCard("what the labels that it learned from prefer", 1.0, "`diffalign train reward`"))
def judge(
    name: str,
    path: str,
    rater: str | None = None,
    revision: str | None = None,
    precision: str = "no",
    offload: bool = False,
    quantize: bool | None = None,
) -> JudgeReward:
    """Load a judge that ``diffalign train reward`` wrote.

    Args:
        name: of the reward.
        path: ``output_dir`` of its training, or a hub id.
        rater: of several raters, the one to score as; None for the mean of all.
        revision: branch, tag or commit of a hub id.
        precision: of the network.
        offload: move the network to the CPU after each use.
        quantize: see ``JudgeReward``.

    Raises:
        ValueError: There is no judge in the folder, or it knows no such rater.
    """
    check_judge(path)
    weights = Weights(path, revision, precision, offload)
    if rater is None and not Path(path).is_dir():
        return JudgeReward(name, weights, rater, quantize)
    about = read_about(weights)
    check_rater(about, rater, path)
    return JudgeReward(name, weights, rater, quantize, range=network_class(about.rater_model).bounds)
