"""Choose and set attention backends of diffusers' dispatcher.

A trial call decides whether a backend can train here, not its version: wheels built for another torch, missing kernels
for a GPU or dtype, and kernels without a backward pass all look fine until they are called.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from diffalign.device import to_float64

NATIVE = "native"
# Tried by "auto", fastest first. Not xformers: its wheels lag behind torch releases.
AUTO = ("_flash_3", "flash", NATIVE)
# Backends listed by ``diffalign doctor``.
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
# Backend -> module that it needs besides torch.
MODULES = {
    "flash": "flash_attn",
    "_flash_3": "flash_attn_interface",
    "sage": "sageattention",
    "xformers": "xformers.ops",
}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}


def refusal(name: str, device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Return in one line why a backend cannot train here, or None if it can.

    It can if a forward and a backward pass agree with softmax(Q K^T / sqrt(d)) V. ValueError: unknown name.
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
            warnings.simplefilter("ignore")  # torch warns once for each kernel it rejects
            output = dispatch_attention_fn(query, key, value)
        output.float().sum().backward()
    except Exception as error:  # kernels raise errors of any type
        return first_line(error)
    return _difference(output, query.grad, drawn, TOLERANCE[dtype])


def _difference(output: Tensor, gradient: Tensor | None, drawn: list[Tensor], tolerance: float) -> str | None:
    """Describe the error of a backend's result for inputs (B, L, heads, d); None if within tolerance."""
    if gradient is None:
        return "it has no backward pass"
    query, key, value = (to_float64(x.detach()).transpose(1, 2) for x in drawn)
    query.requires_grad_()
    expected = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1) @ value
    expected.sum().backward()
    assert query.grad is not None
    for found, right in ((output, expected), (gradient, query.grad)):
        error = (to_float64(found.detach()).cpu().transpose(1, 2) - right.detach().cpu()).abs().max().item()
        if not error <= tolerance:
            return f"its result is wrong by {error:.1e}"
    return None


def _import_error(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.split(".")[0]
        return f"{package} is not installed" if error.name == package else first_line(error)
    except Exception as error:  # a wheel built for another torch may raise anything
        return f"{module.split('.')[0]} cannot be imported: {first_line(error)}"
    return None


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its class name if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def choose_attention(name: str, device: torch.device | str, dtype: torch.dtype) -> str:
    """Resolve a backend name: itself, or for "auto" the first of ``AUTO`` that can train here.

    Args:
        name: "auto" or a backend of diffusers' dispatcher.
        device: Device of the denoiser.
        dtype: Dtype of queries and keys.

    Raises:
        ValueError: The backend cannot train here; the message gives the reason.
    """
    if name == "auto":
        return next((one for one in AUTO if refusal(one, device, dtype) is None), NATIVE)
    if name != NATIVE and (reason := refusal(name, device, dtype)):
        raise ValueError(f"attention {name!r} does not run here ({reason}): write attention: auto, or native")
    return name


def set_attention(module: ModelMixin, name: str) -> None:
    """Set the attention backend of every layer of a diffusers model to ``name``, from ``choose_attention``."""
    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()  # it warns at every call that the dispatcher is experimental
    try:
        with attention_backend(NATIVE):  # restores the active backend of other models
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
    """Route a processor's attention through the dispatcher; those of SD3 and UNets call torch's attention directly.

    Routing happens within the layer, so that gradient checkpointing recomputes with the same backend.
    """

    def __init__(self, processor: Callable[..., object], name: str) -> None:
        self.processor, self.name = processor, name

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Run the processor with the backend active."""
        with _Through(self.name):
            return self.processor(*args, **kwargs)


class _Through(TorchFunctionMode):
    """Redirect ``scaled_dot_product_attention`` to a backend of the dispatcher."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.backend = AttentionBackendName(name)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        call = self._attend if func is F.scaled_dot_product_attention else func
        return call(*args, **(kwargs or {}))

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Attend over torch's layout (B, heads, L, d); the dispatcher takes (B, L, heads, d)."""
        heads_last = (x.transpose(1, 2) for x in self._cast(query, key, value))
        return dispatch_attention_fn(*heads_last, attn_mask=attn_mask, backend=self.backend, **options).transpose(1, 2)

    @staticmethod
    def _cast(*tensors: Tensor) -> tuple[Tensor, ...]:
        """Cast as autocast would; only torch's own kernels support autocast."""
        kind = tensors[0].device.type
        if not torch.is_autocast_enabled(kind):
            return tensors
        return tuple(x.to(torch.get_autocast_dtype(kind)) for x in tensors)
