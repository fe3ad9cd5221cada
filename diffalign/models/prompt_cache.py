"""Keeps what the text encoders said, so that each distinct prompt is encoded once."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from diffalign.models import DiffusionModel
from diffalign.models.offload import TEXT_ENCODERS
from diffalign.models.quiet import quiet_libraries
from diffalign.models.tensor_cache import TensorCache
from diffalign.structures import Conditioning, Guidance

SHARED = "shared/"  # begins the name, on disk, of a tensor without a batch axis
PROBE = 64  # numbers of each tensor that tell one model from another


class PromptEmbeddingCache:
    """The conditioning of prompts, from memory where it is there.

    limit: bytes beyond which the oldest are forgotten, but for what was prepared last. folder: where they are kept on
    disk as well; None: they are not.
    """

    def __init__(self, model: DiffusionModel, limit: int = 2 << 30, folder: Path | None = None) -> None:
        self.model, self.limit, self.cache = model, limit, TensorCache(folder)
        self._rows: dict[str, Conditioning] = {}
        self._prepared: frozenset[str] = frozenset()
        self._empty: Conditioning | None = None
        self._warned = False

    def __call__(self, texts: Sequence[str]) -> Conditioning:
        """The conditioning of ``texts``, a row each, on the denoiser's device."""
        return self.rows(texts).to(self.model.device)

    def rows(self, texts: Sequence[str]) -> Conditioning:
        """The conditioning of ``texts``, a row each, on the CPU: for more of them than the device should hold."""
        self._encode(texts)
        result = Conditioning.cat([self._rows[text] for text in texts])
        self._shrink()
        return result

    def prepare(self, texts: Sequence[str], *, empty: bool = False) -> None:
        """Encodes what is new among ``texts`` for a phase in which no text encoder is to come to the device.

        empty: ``empty`` too.
        """
        self._prepared = frozenset(texts)
        self._encode(texts, empty)

    def _encode(self, texts: Sequence[str], empty: bool = False) -> None:
        """Text encoders that leave the device come once for all of it."""
        new = [text for text in dict.fromkeys(texts) if text not in self._rows]
        if new and not self._warned:
            self._warn_of_length(new)
        with self.model.keeping(TEXT_ENCODERS), quiet_libraries():
            if empty and self._empty is None:
                self._empty = self._kept("unconditional", self.model.unconditional)
            for text in new:
                # Alone, because a batch's shape shows in the last bits: what a prompt is encoded to must not depend
                # on which others a run, or a resumed run, happens to meet for the first time along with it.
                self._rows[text] = self._kept(f"prompt {text}", lambda text=text: self.model.encode([text]))

    def _warn_of_length(self, texts: Sequence[str]) -> None:
        """Warn once, in the place of a line a prompt from each tokenizer, where the end of prompts is not read."""
        limit = self.model.token_limit
        with quiet_libraries():
            long = [text for text in texts if self.model.count_tokens(text) > limit]
        if long:
            self._warned = True
            warnings.warn(
                f"{len(long)} of {len(texts)} prompts have more than the {limit} tokens that the model reads; their "
                f"ends are ignored, such as of {long[0][:80]!r}. Prompts that are met later are not reported again",
                stacklevel=2,
            )

    def _kept(self, what: str, encode: Callable[[], Conditioning]) -> Conditioning:
        """One row, on the CPU: from disk, or what ``encode`` gives."""
        if self.cache.folder is None:
            return encode().to("cpu")
        key = f"{self.identity} {self.model.default_resolution} {what}"
        if (kept := self.cache.get(key)) is not None:
            shared = {name: kept.pop(name) for name in [*kept] if name.startswith(SHARED)}
            return Conditioning(kept, {name.removeprefix(SHARED): tensor for name, tensor in shared.items()})
        row = encode().to("cpu")
        if all(isinstance(value, Tensor) for value in row.shared.values()):
            self.cache.put(key, {**row.tensors, **{SHARED + name: value for name, value in row.shared.items()}})
        return row

    @cached_property
    def identity(self) -> str:
        """Equal for models whose text encoders and VAE say the same: their configurations and the begin of each tensor,
        and the scales of adapters on them.

        All of a tensor would be gigabytes; a fine-tuned encoder differs everywhere.
        """
        digest = hashlib.blake2b(digest_size=16)
        digest.update(f"{getattr(self.model, 'max_sequence_length', None)}".encode())
        for name, component in sorted(self.model.pipeline.components.items()):
            if isinstance(component, nn.Module) and name.startswith(("vae", "text_encoder")):
                scales = [getattr(layer, "scaling", None) for layer in component.modules()]
                digest.update(f"{name} {component.dtype} {component.config} {scales}".encode())
                for tensor in component.state_dict().values():
                    begin = tensor.detach().flatten()[:PROBE].cpu().contiguous()
                    digest.update(begin.view(torch.uint8).numpy())
        return digest.hexdigest()

    def _shrink(self) -> None:
        row = next(iter(self._rows.values()))
        size = sum(t.numel() * t.element_size() for t in row.tensors.values())
        if (extra := len(self._rows) - max(1, self.limit // size)) > 0:
            for text in [text for text in self._rows if text not in self._prepared][:extra]:
                del self._rows[text]

    def guidance(self, scale: float) -> Guidance:
        """Return guidance of ``scale`` away from ``empty``, which is encoded only where the model guides."""
        return Guidance(scale, self.empty if self.model.guides(scale) else None)

    @property
    def empty(self) -> Conditioning:
        """What classifier-free guidance leads away from: see ``DiffusionModel.unconditional``."""
        self._encode((), empty=True)
        assert self._empty is not None
        return self._empty.to(self.model.device)
