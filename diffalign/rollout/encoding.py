"""Keeps what the text encoders said, so that each distinct prompt is encoded once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch

from diffalign.models import DiffusionModel
from diffalign.structures import Conditioning

ENCODE_SLICE = 32


class EncodedPrompts:
    """The conditioning of prompts, from memory where it is there. Oldest entries go beyond ``limit`` bytes."""

    def __init__(self, model: DiffusionModel, limit: int = 2 << 30) -> None:
        self.model, self.limit = model, limit
        self._rows: OrderedDict[str, Conditioning] = OrderedDict()

    def __call__(self, texts: Sequence[str]) -> Conditioning:
        """The conditioning of ``texts``, a row each, on the denoiser's device."""
        missing = list(dict.fromkeys(text for text in texts if text not in self._rows))
        for start in range(0, len(missing), ENCODE_SLICE):
            part = missing[start : start + ENCODE_SLICE]
            encoded = self.model.encode(part).to("cpu")
            self._rows.update({text: encoded[i : i + 1] for i, text in enumerate(part)})
        result = Conditioning.cat([self._rows[text] for text in texts]).to(self.model.device)
        self._shrink()
        return result

    def _shrink(self) -> None:
        row = next(iter(self._rows.values()))
        size = sum(t.numel() * t.element_size() for t in row.tensors.values())
        while len(self._rows) > max(1, self.limit // size):
            self._rows.popitem(last=False)

    @property
    def empty(self) -> Conditioning:
        """The empty prompt, which classifier-free guidance leads away from."""
        with torch.no_grad():
            return self([""])
