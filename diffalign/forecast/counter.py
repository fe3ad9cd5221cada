"""Count live bytes, peaks and floating-point operations of a computation on fake tensors, phase by phase."""

from __future__ import annotations

import weakref
from collections import Counter as Tally
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten
BLOCK = 512  # bytes to which CUDA's allocator rounds up
LARGE = 1 << 20  # bytes from which a new tensor is made fake even where no argument is


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))


# torch's registry has the kernels of GPUs only.
ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def storage_bytes(tensor: Tensor, block: int) -> int:
    """Return the bytes of a tensor's storage, rounded up to blocks of the allocator."""
    return -(-tensor.untyped_storage().nbytes() // block) * block


TABLES = ("flops", "traffic", "calls")  # what ``Counter`` counts by phase and part, apart from peaks


@dataclass
class Recording:
    """What a context counted: bytes beyond those alive at its start, and operations and calls by phase and part."""

    extra: int = 0
    tables: Mapping[str, Tally[tuple[str, str]]] = field(default_factory=dict)


@dataclass
class Seen:
    """Operations of a context, and its largest number of bytes beyond those alive at its start."""

    extra: int = 0
    flops: int = 0
    traffic: int = 0


class Counter(TorchDispatchMode):
    """Track every storage that is alive while the mode is active, and the operations of every call.

    Values do not exist: what asks a fake tensor for a number gets 0, and all fake values are finite.

    Attributes:
        fake: The mode that makes fake tensors.
        block: Bytes to which each storage is rounded up.
        live: Bytes that are alive.
        phase: What peaks and operations are counted for.
        part: What of a phase operations are counted for.
        peaks: (phase, part) -> the most bytes alive at a time.
        flops: (phase, part) -> floating-point operations.
        traffic: (phase, part) -> bytes that operations read and write, each by itself.
        calls: (phase, part) -> images, or prompts, that the part was called for.
        gathered: part -> bytes that are alive while the part runs, such as weights gathered from shards.
    """

    def __init__(self, block: int = BLOCK) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.block, self.live, self.high = block, 0, 0
        self.phase, self.part = "", "other"
        self.peaks: dict[tuple[str, str], int] = {}
        self.flops: Tally[tuple[str, str]] = Tally()
        self.traffic: Tally[tuple[str, str]] = Tally()
        self.calls: Tally[tuple[str, str]] = Tally()
        self.gathered: Tally[str] = Tally()
        self._alive: dict[int, weakref.ref] = {}

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors from before the mode was active, such as weights."""
        for tensor in tensors:
            self._count(tensor)

    def add(self, size: int) -> None:
        """Count bytes, or fewer, that no tensor here stands for, to the end."""
        self.live += size

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Do not count tensors, because they are in main memory."""
        for tensor in tensors:
            self._count(tensor, elsewhere=True)

    def _count(self, tensor: Tensor, elsewhere: bool = False) -> bool:
        """Count a storage that is not known; return whether it was new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return False
        size = 0 if elsewhere else storage_bytes(tensor, self.block)

        def free(_: object) -> None:
            self.live -= size
            self._alive.pop(key, None)

        self._alive[key] = weakref.ref(storage, free)
        self.live += size
        self._raise_to(self.live)
        return True

    def _raise_to(self, size: int) -> None:
        self.high = max(self.high, size)
        where = self.phase, self.part
        self.peaks[where] = max(self.peaks.get(where, 0), size)

    def restart(self) -> None:
        """Forget peaks and operations, and keep what is alive."""
        self.peaks, self.high = {}, self.live
        for table in (self.flops, self.traffic, self.calls):
            table.clear()
        self._raise_to(self.live)

    def touch(self, extra: int) -> None:
        """Note that ``extra`` bytes more than are alive were alive for a moment."""
        self._raise_to(self.live + extra)

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Count what happens within the context for a phase."""
        before, self.phase = self.phase, phase
        self._raise_to(self.live)
        try:
            yield
        finally:
            self.phase = before

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """Count the operations within the context for a part of the phase."""
        before, self.part = self.part, part
        self.live += self.gathered[part]
        self._raise_to(self.live)
        try:
            yield
        finally:
            self.live -= self.gathered[part]
            self.part = before

    @contextmanager
    def repeated(self, times: float) -> Iterator[None]:
        """Count operations and calls within the context so many times."""
        before = {name: Tally(getattr(self, name)) for name in TABLES}
        yield
        for name, known in before.items():
            table = getattr(self, name)
            for key in table:
                table[key] = round(known[key] + times * (table[key] - known[key]))

    @contextmanager
    def recorded(self) -> Iterator[Recording]:
        """Yield what the context counts, for ``repeat``; known at its end."""
        recording = Recording()
        before = {name: Tally(getattr(self, name)) for name in TABLES}
        with self.watched() as seen:
            yield recording
        recording.extra = seen.extra
        recording.tables = {name: getattr(self, name) - known for name, known in before.items()}

    def repeat(self, recording: Recording) -> None:
        """Count what a recorded context counted once more, with its peak on top of what is alive."""
        self.touch(recording.extra)
        for name, table in recording.tables.items():
            getattr(self, name).update(table)

    @contextmanager
    def watched(self) -> Iterator[Seen]:
        """Yield the operations of the context, and the most bytes that it added to those alive; known at its end."""
        seen, start, high = Seen(), self.live, self.high
        flops, traffic = self.flops.total(), self.traffic.total()
        self.high = self.live
        try:
            yield seen
        finally:
            seen.extra = self.high - start
            seen.flops, seen.traffic = self.flops.total() - flops, self.traffic.total() - traffic
            self.high = max(high, self.high)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count what it made."""
        if func is torch.ops.prim.device.default:  # half of all calls, which cost as much as any
            return torch.device("meta") if args[0].fake_mode.in_kernel_invocation else args[0].fake_device
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return self._number(func, args[0])
        if func is aten.index.Tensor:
            args = args[0], [place for index in args[1] for place in _places(index)]
        if not types and _large(kwargs, args):
            with self.fake:
                found = func(*args, **kwargs)
        else:
            found = func(*args, **kwargs)

        packet = func._overloadpacket
        formula = ATTENTION.get(packet) or flop_registry.get(packet)
        if formula is not None:
            self.flops[self.phase, self.part] += _flops(formula, args, kwargs, found)
        made = _tensors(found)
        if sum(self._count(leaf) for leaf in made):  # not a view
            self.traffic[self.phase, self.part] += sum(leaf.nbytes for leaf in (*made, *_tensors((args, kwargs))))
        return found

    def _number(self, func: Any, tensor: Tensor) -> float | int | bool:
        try:
            return func(tensor)
        except DataDependentOutputException:
            return _zero(tensor.dtype)


def _tensors(value: Any) -> list[Tensor]:
    """Return the tensors in a value; most values are one."""
    if isinstance(value, Tensor):
        return [value]
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _zero(dtype: torch.dtype) -> float | int | bool:
    return False if dtype == torch.bool else 0.0 if dtype.is_floating_point else 0


def _large(kwargs: Any, args: Any) -> bool:
    """Return whether an operation without tensors makes a large one."""
    size = args[0] if args else kwargs.get("size", ())
    if not isinstance(size, (list, tuple)) or not all(isinstance(side, int) for side in size):
        return False
    return torch.Size(size).numel() * (kwargs.get("dtype") or torch.float32).itemsize >= LARGE


def _flops(formula: Any, args: Any, kwargs: Any, found: Any) -> int:
    if formula in (_attention, _attention_backward):
        return formula(*args, **kwargs)
    return int(formula(*args, **kwargs, out_val=found))


def _places(index: Tensor | None) -> list[Tensor | None]:
    """Return where a mask is true, as indices by dimension; of a fake mask, everywhere."""
    if index is None or index.dtype != torch.bool:
        return [index]
    known = torch.ones(index.shape, dtype=torch.bool) if isinstance(index, FakeTensor) else index
    return list(known.nonzero().unbind(1))
