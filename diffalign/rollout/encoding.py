"""Keeps what the text encoders said, so that each distinct prompt is encoded once."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from diffalign.models import DiffusionModel
from diffalign.runtime.cache import TensorCache
from diffalign.structures import Conditioning

SHARED = "shared/"  # begins the name, on disk, of a tensor without a batch axis
PROBE = 64  # numbers of each tensor that tell one model from another


class EncodedPrompts:
    """The conditioning of prompts, from memory where it is there. Oldest entries go beyond ``limit`` bytes."""

    def __init__(self, model: DiffusionModel, limit: int = 2 << 30) -> None:
        self.model, self.limit = model, limit
        self.cache = TensorCache(None)  # one with a folder keeps them on disk as well
        self._rows: OrderedDict[str, Conditioning] = OrderedDict()
        self._empty: Conditioning | None = None

    def __call__(self, texts: Sequence[str]) -> Conditioning:
        """The conditioning of ``texts``, a row each, on the denoiser's device."""
        for text in dict.fromkeys(texts):
            if text not in self._rows:
                # Alone, because a batch's shape shows in the last bits: what a prompt is encoded to must not depend on
                # which others a run, or a resumed run, happens to meet for the first time along with it.
                self._rows[text] = self._row(text)
        result = Conditioning.cat([self._rows[text] for text in texts]).to(self.model.device)
        self._shrink()
        return result

    def _row(self, text: str) -> Conditioning:
        if self.cache.folder is None:
            return self.model.encode([text]).to("cpu")
        key = f"prompt {self.identity} {text}"
        if (kept := self.cache.get(key)) is not None:
            shared = {name: kept.pop(name) for name in [*kept] if name.startswith(SHARED)}
            return Conditioning(kept, {name.removeprefix(SHARED): tensor for name, tensor in shared.items()})
        row = self.model.encode([text]).to("cpu")
        if all(isinstance(value, Tensor) for value in row.shared.values()):
            self.cache.put(key, {**row.tensors, **{SHARED + name: value for name, value in row.shared.items()}})
        return row

    @cached_property
    def identity(self) -> str:
        """Equal for models whose text encoders and VAE say the same: their configurations and the begin of each tensor.

        All of a tensor would be gigabytes; a fine-tuned encoder differs everywhere.
        """
        digest = hashlib.blake2b(digest_size=16)
        digest.update(f"{getattr(self.model, 'max_sequence_length', None)}".encode())
        for name, component in sorted(self.model.pipeline.components.items()):
            if isinstance(component, nn.Module) and name.startswith(("vae", "text_encoder")):
                digest.update(f"{name} {component.dtype} {component.config}".encode())
                for tensor in component.state_dict().values():
                    begin = tensor.detach().flatten()[:PROBE].cpu().contiguous()
                    digest.update(begin.view(torch.uint8).numpy())
        return digest.hexdigest()

    def _shrink(self) -> None:
        row = next(iter(self._rows.values()))
        size = sum(t.numel() * t.element_size() for t in row.tensors.values())
        while len(self._rows) > max(1, self.limit // size):
            self._rows.popitem(last=False)

    @property
    def empty(self) -> Conditioning:
        """What classifier-free guidance leads away from: see ``DiffusionModel.unconditional``."""
        if self._empty is None:
            self._empty = self.model.unconditional().to("cpu")
        return self._empty.to(self.model.device)
