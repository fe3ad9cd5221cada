"""Named weight sets of a module: the policy in training and the weights it is compared with.

A set holds one tensor per trainable parameter. Switching swaps storage without a copy, and leaving the context restores
the same tensors and ``requires_grad`` flags. Shards are copied in and back, because FSDP2 tracks their memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.fsdp import free, is_sharded, local_tensor

POLICY = "policy"
REFERENCE = "reference"


class WeightSets:
    """The policy and its alternatives; ``reference`` is a kept copy, else the module without its adapter."""

    def __init__(self, module: nn.Module, *, has_adapter: bool) -> None:
        self.module = module
        self.has_adapter = has_adapter
        self.trainable = [p for p in module.parameters() if p.requires_grad]
        self._sets: dict[str, Sequence[Tensor]] = {}

    def add(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Add a weight set.

        Args:
            name: Any name except "policy".
            tensors: One per trainable parameter, shared with the caller, who may update them (as an EMA does).

        Raises:
            ValueError: The name is "policy", or number or shapes do not match.
        """
        if name == POLICY:
            raise ValueError('"policy" names the weights in training: choose another name')
        if [t.shape for t in tensors] != [p.shape for p in self.trainable]:
            raise ValueError(f"weight set {name!r} does not match the trainable parameters in number and shape")
        self._sets[name] = tensors

    @property
    def copies(self) -> Mapping[str, Sequence[Tensor]]:
        """Tensors of the weight sets that are kept beside the policy."""
        return self._sets

    @property
    def names(self) -> list[str]:
        """Names that ``using`` accepts."""
        return list(dict.fromkeys([POLICY, *([REFERENCE] if self.has_adapter else []), *self._sets]))

    def keep_copy(self, name: str) -> None:
        """Add a frozen copy of the current weights, such as the reference of full fine-tuning."""
        self.add(name, [p.detach().clone() for p in self.trainable])

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Run the module with another weight set; on exit the policy's tensors and flags are restored (asserted)."""
        flags = [(p, p.requires_grad) for p in self.module.parameters()]
        storages = [local_tensor(p).data_ptr() for p in self.trainable]
        try:
            with self._switched(name):
                yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
        assert [local_tensor(p).data_ptr() for p in self.trainable] == storages, (
            "the policy's weights were replaced inside using()"
        )

    @contextmanager
    def _switched(self, name: str) -> Iterator[None]:
        if name == POLICY:
            yield
        elif name in self._sets:
            exchange = self._copied if is_sharded(self.module) else self._exchanged
            with exchange(self._sets[name]):
                yield
        elif name == REFERENCE and self.has_adapter:
            with _adapters_off(self.module):
                yield
        else:
            raise ValueError(f"unknown weight set {name!r}; known: {', '.join(self.names)}")

    @contextmanager
    def _exchanged(self, replacement: Sequence[Tensor]) -> Iterator[None]:
        original = [p.data for p in self.trainable]
        for parameter, tensor in zip(self.trainable, replacement, strict=True):
            parameter.data = tensor.to(parameter.dtype)
        try:
            yield
        finally:
            for parameter, tensor in zip(self.trainable, original, strict=True):
                parameter.data = tensor

    @contextmanager
    def _copied(self, replacement: Sequence[Tensor]) -> Iterator[None]:
        original = [local_tensor(p).clone() for p in self.trainable]
        try:
            self._write([local_tensor(tensor) for tensor in replacement])
            yield
        finally:
            self._write(original)

    @torch.no_grad()
    def _write(self, shards: Sequence[Tensor]) -> None:
        free(self.module)
        for parameter, tensor in zip(self.trainable, shards, strict=True):
            local_tensor(parameter).copy_(tensor)
        if torch.accelerator.is_available():
            # Backward gathers on a separate stream, which does not wait for these copies.
            torch.accelerator.synchronize()


@contextmanager
def _adapters_off(module: Any) -> Iterator[None]:
    module.disable_adapters()
    try:
        yield
    finally:
        module.enable_adapters()
