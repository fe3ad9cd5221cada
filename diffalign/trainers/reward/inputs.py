"""Inputs of a judge's network: preprocessed images and tokens, or outputs of frozen towers, computed once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from diffalign.rewards.support.images import from_pil
from diffalign.rewards.support.judge_network import JudgeNetwork, preprocess_of, tokenize
from diffalign.rewards.support.prompts import unique_prompts
from diffalign.trainers.reward.data import JudgeData

Arguments = dict[str, Any]  # of ``JudgeNetwork.forward``


class PairInputs:
    """Read pairs, and make the network's arguments of them.

    Args:
        data: The pairs.
        network: The judge; its preprocessing is read.
        tokenizer: Of the backbone.
    """

    def __init__(self, data: JudgeData, network: JudgeNetwork, tokenizer: Any) -> None:
        self.data, self.network, self.tokenizer = data, network, tokenizer
        self.config = network.backbone.config
        self.preprocess = preprocess_of(self.config)

    def __call__(self, positions: Sequence[int], device: torch.device) -> tuple[list[int], Arguments]:
        """Return the positions of the pairs that were read, see ``JudgeData.load``, and the arguments."""
        read = [self.data.load(position) for position in positions]
        found = [position for position, _ in read]
        pixels = torch.stack([torch.cat([self._pixels(image) for image in images]) for _, images in read])
        ids, mask = tokenize(self.tokenizer, self.config, [self.data.examples[i].text for i in found])
        named = {
            "images": pixels.to(device),
            "texts": ids.to(device),
            "mask": None if mask is None else mask.to(device),
        }
        return found, {**named, "rater": self._raters(found, device)}

    def _pixels(self, image: Any) -> Tensor:
        return self.preprocess(from_pil(image)[None], quantize=True)

    def _raters(self, positions: Sequence[int], device: torch.device) -> Tensor | None:
        if not self.network.raters:
            return None
        return torch.tensor([self.data.rater(position) for position in positions], device=device)


class PooledInputs(PairInputs):
    """The same for frozen towers: their outputs are computed once, before the training, and kept in memory.

    Blocks of pairs are those of the whole data set, so that the outputs do not depend on a resume.

    Args:
        data: The pairs.
        network: The judge, on its device.
        tokenizer: Of the backbone.
        block: Pairs per forward pass.
    """

    def __init__(self, data: JudgeData, network: JudgeNetwork, tokenizer: Any, block: int) -> None:
        super().__init__(data, network, tokenizer)
        self.block = block
        self.images: dict[int, Tensor] = {}
        self.texts: dict[str, Tensor] = {}
        self.replaced: dict[int, int] = {}

    @torch.no_grad()
    def compute(self, device: torch.device, show: bool = False) -> None:
        """Compute the outputs of all pairs."""
        everything = sorted({*self.data.train, *self.data.held_out})
        blocks = [everything[i : i + self.block] for i in range(0, len(everything), self.block)]
        for block in tqdm(blocks, desc="encode", disable=not show):
            found, arguments = super().__call__(block, device)
            pooled = self.network.pool_images(arguments["images"].flatten(0, 1)).float().cpu().unflatten(0, (-1, 2))
            self.images |= dict(zip(found, pooled, strict=True))
            self.replaced |= dict(zip(block, found, strict=True))
        texts, _ = unique_prompts([self.data.examples[i].text for i in everything])
        for i in range(0, len(texts), self.block):
            ids, mask = tokenize(self.tokenizer, self.config, part := texts[i : i + self.block])
            pooled = self.network.pool_texts(ids.to(device), None if mask is None else mask.to(device)).float().cpu()
            self.texts |= dict(zip(part, pooled, strict=True))

    def __call__(self, positions: Sequence[int], device: torch.device) -> tuple[list[int], Arguments]:
        """Return the positions of the pairs, and the arguments: outputs of the towers."""
        found = [self.replaced[position] for position in positions]
        images = torch.stack([self.images[i] for i in found]).to(device)
        texts = torch.stack([self.texts[self.data.examples[i].text] for i in found]).to(device)
        return found, {"images": images, "texts": texts, "pooled": True, "rater": self._raters(found, device)}
