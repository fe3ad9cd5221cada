"""Replacements for weights, data, other processes and a GPU in rehearsals."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pyarrow import parquet, table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from diffalign.diffusion import trajectory
from diffalign.forecast.counter import Counter, Recording, Seen
from diffalign.models import DiffusionModel
from diffalign.models.prompt_cache import PromptEmbeddingCache
from diffalign.rng import KeyedRNG
from diffalign.structures import Conditioning
from diffalign.trainers.diffusion_dpo import siblings

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
LONG = "prompt " * 1024  # as long as any model reads: some families' memory grows with a prompt's tokens
NOISE = 4096  # elements of a draw from which it has no values: these matter only to images


class FakeNoise(KeyedRNG):
    """Draw indices and times as a run does, and noise without values."""

    def __init__(self, seed: int, counter: Counter) -> None:
        super().__init__(seed)
        self.counter = counter

    def normal_batch(self, shape: Sequence[int], stream: str, addresses: Sequence[tuple[int, ...]]) -> Tensor:
        """Draw (B, *shape)."""
        if torch.Size(shape).numel() < NOISE:
            return super().normal_batch(shape, stream, addresses)
        with self.counter.fake:
            return torch.empty(len(addresses), *shape)


class FakePrompts(PromptEmbeddingCache):
    """A prompt cache whose model has no values to be identified by."""

    identity = "rehearsed"

    def _warn_of_length(self, texts: Sequence[str]) -> None:
        """Accept prompts that are longer than the limit: see ``LONG``."""


@dataclass
class OneOfMany:
    """An accelerator of one process among ``num_processes``; gathered data of the others equal its own.

    Implements what trainers use of ``accelerate.Accelerator``.
    """

    mixed_precision: str = "no"
    num_processes: int = 1
    process_index: int = 0
    is_main_process: bool = True
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    scaler: None = None

    def prepare_model(self, module: nn.Module, evaluation_mode: bool = False) -> nn.Module:
        """Run the module in mixed precision, and return its outputs in float32."""
        if (dtype := PRECISIONS.get(self.mixed_precision)) is not None:
            plain = module.forward

            def forward(*args: Any, **kwargs: Any) -> Any:
                with torch.autocast("cpu", dtype):
                    outputs = plain(*args, **kwargs)
                return tree_map_only(Tensor, _widened, outputs)

            module.forward = forward
        return module

    def prepare(self, item: Any) -> Any:
        """Prepare a module; an optimizer stays as it is, behind the attribute of accelerate's wrapper."""
        if isinstance(item, nn.Module):
            return self.prepare_model(item)
        item.optimizer = item
        return item

    def backward(self, loss: Tensor) -> None:
        """Propagate gradients."""
        loss.backward()

    def clip_grad_norm_(self, parameters: Sequence[Tensor], norm: float) -> Tensor:
        """Clip gradients."""
        return nn.utils.clip_grad_norm_(parameters, norm)

    def no_sync(self, module: nn.Module) -> Any:
        """Return a context without effect."""
        return nullcontext()

    def gather(self, tensor: Tensor) -> Tensor:
        """Repeat the rows of this process for all."""
        return torch.cat([tensor] * self.num_processes)

    def reduce(self, tensor: Tensor, reduction: str = "sum") -> Tensor:
        """Return the mean, or the sum, over processes."""
        return tensor if reduction == "mean" else tensor * self.num_processes

    def wait_for_everyone(self) -> None:
        """Do nothing."""


# What autocast runs in float32 on CUDA, and not on CPUs.
FLOAT32 = ("layer_norm", "group_norm", "softmax", "mse_loss")
FINITE = {torch.isfinite: torch.ones, torch.isnan: torch.zeros, Tensor.isfinite: torch.ones, Tensor.isnan: torch.zeros}


class FiniteValues(TorchFunctionMode):
    """Answer that fake values are finite."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function."""
        if func in FINITE and isinstance(args[0], FakeTensor):
            return FINITE[func]((), dtype=torch.bool).expand(args[0].shape)
        return func(*args, **(kwargs or {}))


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _in_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_autocast_enabled("cpu"):
            return function(*args, **kwargs)
        args, kwargs = tree_map_only(Tensor, _widened, (args, kwargs))
        with torch.autocast("cpu", enabled=False):
            return function(*args, **kwargs)

    return call


@contextmanager
def first_slices(counter: Counter) -> Iterator[None]:
    """Run the first slice of images that are decoded and scored one after the other; the others are like it."""

    def in_slices(loss: Callable[[Tensor, slice], Tensor], x: Tensor, size: int) -> Tensor:
        rows = slice(0, min(size, len(x)))
        with counter.repeated(len(x) / size), torch.enable_grad():
            piece = x[rows].detach().requires_grad_()
            part = loss(piece, rows)
            (gradient,) = torch.autograd.grad(part, piece)
        total = part.detach() * (len(x) / size)
        product = (x * torch.cat([gradient] * -(-len(x) // size))[: len(x)]).sum()
        return total + (product - product.detach())

    kept, trajectory.in_slices = trajectory.in_slices, in_slices
    try:
        yield
    finally:
        trajectory.in_slices = kept


@contextmanager
def first_gradients(counter: Counter) -> Iterator[None]:
    """Run the reward's gradient of a step of TailorPO-G once per shape; later steps repeat its operations and peak."""
    known: dict[torch.Size, Recording] = {}
    kept = siblings.reward_gradient

    def gradient(sampler: siblings.PathSampler, x: Tensor, index: int) -> Tensor:
        if x.shape in known:
            counter.repeat(known[x.shape])
            return torch.zeros_like(x)
        with counter.recorded() as known[x.shape]:
            return kept(sampler, x, index)

    siblings.reward_gradient = gradient
    try:
        yield
    finally:
        siblings.reward_gradient = kept


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """Choose precisions under autocast as on CUDA; the backward pass of checkpointed blocks included."""
    kept = {name: getattr(F, name) for name in FLOAT32}
    for name, function in kept.items():
        setattr(F, name, _in_float32(function))
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(F, name, function)


def one_pair(folder: Path, size: tuple[int, int]) -> Path:
    """Write a data set of one pair of images of (height, width), as a parquet file."""
    images = {}
    for name, colour in (("jpg_0", "black"), ("jpg_1", "white")):
        buffer = io.BytesIO()
        Image.new("RGB", size[::-1], colour).save(buffer, "PNG")
        images[name] = [buffer.getvalue()]
    columns = {"caption": [LONG], **images, "label_0": [1.0], "label_1": [0.0]}
    parquet.write_table(table(columns), folder / "pair.parquet")
    return folder / "pair.parquet"


def remember(model: DiffusionModel, counter: Counter) -> None:
    """Run each forward pass without gradients once per shape; later calls repeat its operations and its peak.

    ``counter.calls`` counts the images of each part and phase.
    """
    for name in ("evaluate", "decode", "encode", "encode_images"):
        setattr(model, name, Remembered(getattr(model, name), name, model, counter))


class Remembered:
    """A method of a model that is run once for each shape of its arguments."""

    def __init__(self, method: Callable[..., Any], part: str, model: DiffusionModel, counter: Counter) -> None:
        self.method, self.part, self.model, self.counter = method, part, model, counter
        self.known: dict[Any, tuple[Callable[[], Any], Seen]] = {}

    @cached_property
    def adapter(self) -> nn.Module | None:
        """A layer that knows whether adapters are off."""
        layers = self.model.raw_denoiser.modules()
        return next((m for m in layers if isinstance(getattr(m, "disable_adapters", None), bool)), None)

    def __call__(self, *args: Any) -> Any:
        """Run the method, or repeat what is known of it."""
        counter = self.counter
        counter.calls[counter.phase, self.part] += len(args[0])
        recorded = torch.is_grad_enabled() and self.part != "encode"
        if recorded:
            with counter.within(self.part):
                return self.method(*args)

        key = self._key(args)
        if key not in self.known:
            with counter.within(self.part), counter.watched() as seen:
                found = self.method(*args)
            self.known[key] = (_shape(found), seen)
            return found
        make, seen = self.known[key]
        with counter.within(self.part):
            counter.touch(seen.extra)
        counter.flops[counter.phase, self.part] += seen.flops
        counter.traffic[counter.phase, self.part] += seen.traffic
        return make()

    def _key(self, args: Any) -> Any:
        # Offloaded parts are loaded within the call: what they take at first counts once.
        loads = self.part != "evaluate"
        resident = tuple(part.resident for part in self.model.offloaded.values()) if loads else ()
        halved = torch.is_autocast_enabled("cpu")
        return repr((_signature(args), getattr(self.adapter, "disable_adapters", None), resident, halved))


def _signature(value: Any) -> Any:
    """Return shapes and dtypes of arguments."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, Conditioning):
        return {name: _signature(tensor) for name, tensor in value.tensors.items()}
    if isinstance(value, str):
        return "text"
    if isinstance(value, (list, tuple)):
        return [_signature(one) for one in value]
    return type(value).__name__


def _shape(value: Any) -> Callable[[], Any]:
    """Return a function that makes the like of a result."""
    if isinstance(value, Conditioning):
        made = {name: _shape(tensor) for name, tensor in value.tensors.items()}
        return lambda: Conditioning({name: make() for name, make in made.items()}, value.shared)
    if not isinstance(value, FakeTensor):  # values such as the number of a prompt's tokens decide shapes
        return value.clone
    empty = value.new_empty(0)
    size, stride, dtype = value.size(), value.stride(), value.dtype
    return lambda: empty.new_empty_strided(size, stride, dtype=dtype)
