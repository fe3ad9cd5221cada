"""Attention back ends: which of diffusers' dispatcher can train on this machine, and how a denoiser is given one.

Whether one runs is found by a call, not from a version: wheels that fit another torch, missing kernels for a card or
a dtype, and kernels without a backward pass all look fine until then.
"""

from __future__ import annotations

import importlib
import warnings

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

NATIVE = "native"
# What "auto" tries, fastest first. xformers is for those who ask for it: its wheels follow torch with a delay.
AUTO = ("_flash_3", "flash", NATIVE)
# What a report lists.
LISTED = (
    NATIVE,
    "_native_flash",
    "_native_efficient",
    "_native_cudnn",
    "_native_math",
    "flash",
    "_flash_3",
    "sage",
    "xformers",
)
# Back end -> the module that it needs beside torch.
MODULES = {
    "flash": "flash_attn",
    "_flash_3": "flash_attn_interface",
    "sage": "sageattention",
    "xformers": "xformers.ops",
}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}


def refusal(name: str, device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Why a back end cannot train here, in one line; None where it can.

    It can where a forward and a backward pass agree with softmax(Q K^T / sqrt(d)) V. ValueError: an unknown name.
    """
    known = [backend.value for backend in AttentionBackendName]
    if name not in known:
        raise ValueError(f"unknown attention back end {name!r}; known: auto, {', '.join(known)}")
    if name in MODULES and (missing := _import_error(MODULES[name])):
        return missing
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(2, 64, 2, 64, generator=generator) for _ in range(3)]
    query, key, value = (x.to(device, dtype).requires_grad_() for x in drawn)
    try:
        with warnings.catch_warnings(), attention_backend(name):
            warnings.simplefilter("ignore")  # torch warns once for every kernel that it turns down
            output = dispatch_attention_fn(query, key, value)
        output.float().sum().backward()
    except Exception as error:  # whatever a kernel raises is the answer
        return first_line(error)
    return _difference(output, query.grad, drawn, TOLERANCE[dtype])


def _difference(output: Tensor, gradient: Tensor | None, drawn: list[Tensor], tolerance: float) -> str | None:
    """What is wrong with a result for these (B, L, heads, d); None: nothing."""
    if gradient is None:
        return "it has no backward pass"
    query, key, value = (x.detach().double().transpose(1, 2) for x in drawn)
    query.requires_grad_()
    expected = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1) @ value
    expected.sum().backward()
    for found, right in ((output, expected), (gradient, query.grad)):
        error = (found.detach().double().cpu().transpose(1, 2) - right.detach()).abs().max().item()
        if not error <= tolerance:
            return f"its result is wrong by {error:.1e}"
    return None


def _import_error(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.split(".")[0]
        return f"{package} is not installed" if error.name == package else first_line(error)
    except Exception as error:  # a wheel built for another torch fails in its own ways
        return f"{module.split('.')[0]} cannot be imported: {first_line(error)}"
    return None


def first_line(error: Exception) -> str:
    """The first line of a message, or the error's name where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def choose_attention(name: str, device: torch.device | str, dtype: torch.dtype) -> str:
    """The back end that ``name`` stands for: itself, or with "auto" the first of ``AUTO`` that can train here.

    dtype: what queries and keys are computed in. ValueError: it cannot train here, with the reason.
    """
    if name == "auto":
        return next((one for one in AUTO if refusal(one, device, dtype) is None), NATIVE)
    if name != NATIVE and (reason := refusal(name, device, dtype)):
        raise ValueError(f"attention {name!r} does not run here ({reason}): write attention: auto, or native")
    return name


def set_attention(module: nn.Module, name: str) -> None:
    """Gives every attention layer of a diffusers model the back end ``name``, which ``choose_attention`` has tried."""
    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()  # it calls the dispatcher experimental at every call
    try:
        with attention_backend(NATIVE):  # on leaving, the choice of other models in this process is as it was
            module.set_attention_backend(name)
    finally:
        diffusers_logging.set_verbosity(level)
    for layer in module.modules():
        processor = getattr(layer, "processor", None)
        if processor is None or hasattr(processor, "_attention_backend"):
            continue
        bare = processor.processor if isinstance(processor, Dispatched) else processor
        layer.set_processor(bare if name == NATIVE else Dispatched(bare, name))


class Dispatched:
    """A processor whose attention goes through the dispatcher: those of SD3 and of UNets call torch's own instead.

    It acts within the layer, so that gradient checkpointing computes the same again.
    """

    def __init__(self, processor: object, name: str) -> None:
        self.processor, self.name = processor, name

    def __call__(self, *args: object, **kwargs: object) -> object:
        """What the processor returns."""
        with _Through(self.name):
            return self.processor(*args, **kwargs)


class _Through(TorchFunctionMode):
    """Hands torch's attention to a back end of the dispatcher."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.backend = AttentionBackendName(name)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        call = self._attend if func is F.scaled_dot_product_attention else func
        return call(*args, **(kwargs or {}))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options) -> Tensor:
        """(B, heads, L, d), as torch has it; the dispatcher has heads last but one."""
        heads_last = (x.transpose(1, 2) for x in self._cast(query, key, value))
        return dispatch_attention_fn(*heads_last, attn_mask=attn_mask, backend=self.backend, **options).transpose(1, 2)

    @staticmethod
    def _cast(*tensors: Tensor) -> tuple[Tensor, ...]:
        """As autocast would: other kernels than torch's own do not know of it."""
        kind = tensors[0].device.type
        if not torch.is_autocast_enabled(kind):
            return tensors
        return tuple(x.to(torch.get_autocast_dtype(kind)) for x in tensors)
