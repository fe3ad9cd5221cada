"""Cache prompt embeddings, so that each distinct prompt is encoded once."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from diffalign.files import read_bytes
from diffalign.models import DiffusionModel
from diffalign.models.offload import TEXT_ENCODERS
from diffalign.models.quiet import quiet_libraries
from diffalign.models.tensor_cache import TensorCache
from diffalign.structures import Conditioning, EditInput, Guidance, Input, text_of

SHARED = "shared/"  # prefix, on disk, of tensors without a batch axis
PROBE = 64  # values of each tensor that identify a model


class PromptEmbeddingCache:
    """Encode prompts through a cache in memory and, optionally, on disk.

    Args:
        model: Encodes the prompts that are not cached.
        limit: Bytes of memory beyond which the oldest rows are evicted, except the last prepared ones.
        folder: Folder of the disk cache; None for none.
    """

    def __init__(self, model: DiffusionModel, limit: int = 2 << 30, folder: Path | None = None) -> None:
        self.model, self.limit, self.cache = model, limit, TensorCache(folder)
        self._rows: dict[Input, Conditioning] = {}
        self._prepared: frozenset[Input] = frozenset()
        self._empty: Conditioning | None = None
        self._warned = False

    def __call__(self, inputs: Sequence[Input]) -> Conditioning:
        """Encode prompts, a row each, on the denoiser's device."""
        return self.rows(inputs).to(self.model.device)

    def rows(self, inputs: Sequence[Input]) -> Conditioning:
        """Encode prompts, a row each, on the CPU, for more rows than the device should hold."""
        own = [self._key(given) for given in inputs]
        self._encode(own)
        result = Conditioning.cat([self._rows[given] for given in own])
        self._shrink()
        return result

    def prepare(self, inputs: Sequence[Input], *, empty: bool = False) -> None:
        """Encode new prompts ahead of a phase that must not load the text encoders.

        Args:
            inputs: Prompts of the phase, protected from eviction until the next call.
            empty: Encode the default negative prompt too, and for models that edit the empty text with each source.
        """
        own = [self._key(given) for given in inputs]
        if empty:
            own += [self.dropped(given) for given in own if isinstance(given, EditInput)]
        self._prepared = frozenset(own)
        self._encode(own, empty)

    def _key(self, given: Input) -> Input:
        """Return what the model reads of a prompt: models that do not edit ignore a source image."""
        return given if self.model.edits else text_of(given)

    def dropped(self, given: EditInput) -> EditInput:
        """Return the input of a dropped instruction, whose source stays."""
        return given._replace(text=self.model.empty_text)

    def _encode(self, inputs: Sequence[Input], empty: bool = False) -> None:
        """Encode new prompts, loading offloaded text encoders once for all of them."""
        new = [given for given in dict.fromkeys(inputs) if given not in self._rows]
        if new and not self._warned:
            self._warn_of_length([text_of(given) for given in new])
        with self.model.keeping(TEXT_ENCODERS), quiet_libraries():
            if empty and self._empty is None:
                self._empty = self._kept(lambda: "unconditional", self.model.unconditional)
            for given in new:
                # One at a time: batch shape changes the last bits, and an embedding must not depend on which other
                # prompts are new in the same call, which a resumed run would change.
                self._rows[given] = self._kept(partial(_name, given), partial(self.model.encode_input, given))

    def _warn_of_length(self, texts: Sequence[str]) -> None:
        """Warn once of truncated prompts, instead of a line per prompt from each tokenizer."""
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

    def _kept(self, what: Callable[[], str], encode: Callable[[], Conditioning]) -> Conditioning:
        """Return one row on the CPU, from disk if cached there, else from ``encode``."""
        if self.cache.folder is None:
            return encode().to("cpu")
        key = f"{self.identity} {self.model.default_resolution} {what()}"
        if (kept := self.cache.get(key)) is not None:
            shared = {name: kept.pop(name) for name in [*kept] if name.startswith(SHARED)}
            return Conditioning(kept, {name.removeprefix(SHARED): tensor for name, tensor in shared.items()})
        row = encode().to("cpu")
        if all(isinstance(value, Tensor) for value in row.shared.values()):
            self.cache.put(key, {**row.tensors, **{SHARED + name: value for name, value in row.shared.items()}})
        return row

    @cached_property
    def identity(self) -> str:
        """Hash that identifies what encodes: the pipeline, its options, its text encoders and its VAE.

        Of each tensor the first values count: hashing all would read gigabytes, and a fine-tuned encoder differs
        everywhere. Pipelines with the same encoders may differ in their negative, as SDXL's by
        ``force_zeros_for_empty_prompt``, and Qwen-Image-Edit from Qwen-Image.
        """
        pipeline, digest = self.model.pipeline, hashlib.blake2b(digest_size=16)
        options = {name: value for name, value in pipeline.config.items() if isinstance(value, bool | int | float)}
        digest.update(f"{type(pipeline).__name__} {sorted(options.items())} ".encode())
        digest.update(f"{getattr(self.model, 'max_sequence_length', None)}".encode())
        for name, component in sorted(pipeline.components.items()):
            if isinstance(component, nn.Module) and name.startswith(("vae", "text_encoder")):
                scales = [getattr(layer, "scaling", None) for layer in component.modules()]
                digest.update(f"{name} {component.dtype} {component.config} {scales}".encode())
                for tensor in component.state_dict().values():
                    first_values = tensor.detach().flatten()[:PROBE].cpu().contiguous()
                    digest.update(first_values.view(torch.uint8).numpy())
        return digest.hexdigest()

    def _shrink(self) -> None:
        row = next(iter(self._rows.values()))
        size = sum(t.numel() * t.element_size() for t in row.tensors.values())
        if (extra := len(self._rows) - max(1, self.limit // size)) > 0:
            for given in [given for given in self._rows if given not in self._prepared][:extra]:
                del self._rows[given]

    def guidance(self, scale: float) -> Guidance:
        """Return guidance of ``scale`` with ``empty`` as negative, encoded only at scales that guide."""
        return Guidance(scale, self.empty if self.model.guides(scale) else None)

    @property
    def empty(self) -> Conditioning:
        """Default negative of classifier-free guidance: see ``DiffusionModel.unconditional``."""
        self._encode((), empty=True)
        assert self._empty is not None
        return self._empty.to(self.model.device)


def _name(given: Input) -> str:
    """Return the name of an input on disk, a source image by its content."""
    if isinstance(given, str):
        return f"prompt {given}"
    content = hashlib.blake2b(read_bytes(Path(given.image)), digest_size=16).hexdigest()
    return f"prompt {given.text} image {content} {given.size}"
