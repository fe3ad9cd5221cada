"""Compile the repeated blocks of a denoiser: minutes faster to compile than the whole model, equally fast to run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor

from diffalign.models.attention import first_line

# Graphs per block class: one for each batch shape, with and without the adapter. Beyond this limit torch falls back to
# eager with a single warning.
GRAPHS = 64


def compile_refusal(device: torch.device | str) -> str | None:
    """Return in one line why torch.compile does not run here, or None if a forward and a backward pass succeed."""
    x = torch.linspace(-1, 1, 64, device=device).reshape(8, 8).requires_grad_()
    torch._dynamo.reset()  # clears cached failures of this process
    try:
        compiled = torch.compile(lambda y: (y @ y).sin().sum())
        (gradient,) = torch.autograd.grad(compiled(x), x)
        (expected,) = torch.autograd.grad((x @ x).sin().sum(), x)
    except Exception as error:  # no C++ compiler, no Triton, an old driver: error types vary
        return first_line(error)
    return None if torch.allclose(gradient, expected, atol=1e-4) else "its gradient is wrong"


def compile_blocks(denoiser: ModelMixin, **options: Any) -> None:
    """Compile the blocks of a diffusers model in place; parameter names do not change.

    Sampling and training share one graph per block, so that replayed steps equal sampled ones: see ``OneGraph``. Each
    batch shape has its own graphs, because a dynamic-shape graph rounds differently.

    Args:
        denoiser: A diffusers model.
        options: Keyword arguments of torch.compile.

    Raises:
        ValueError: diffusers does not name the model's repeated blocks.
    """
    if not getattr(denoiser, "_repeated_blocks", None):
        # SD3 names its blocks only as those that must not be split over devices.
        denoiser._repeated_blocks = list(getattr(denoiser, "_no_split_modules", None) or ())
    if not denoiser._repeated_blocks:
        raise ValueError(
            f"compile: diffusers does not say what a {type(denoiser).__name__} repeats; set compile: false"
        )
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    denoiser.compile_repeated_blocks(**{"dynamic": False, **options})
    for block in denoiser.modules():
        if block._compiled_call_impl is not None:
            block._compiled_call_impl = OneGraph(block._compiled_call_impl)


class OneGraph:
    """Call a compiled block through one graph, with or without gradients.

    torch compiles separate graphs for inference and training, which fuse and therefore round differently, and a third
    for a first block, whose input needs no gradient. Here every floating input requires a gradient. Without gradients,
    the recorded graph is freed when the block returns.
    """

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block; the output is detached if gradients are disabled."""
        wanted = torch.is_grad_enabled()
        with torch.enable_grad():
            output = self.call(*map(_recorded, args), **{name: _recorded(value) for name, value in kwargs.items()})
        return output if wanted else _detached(output)


def _recorded(value: Any) -> Any:
    """Return a floating tensor that requires a gradient; anything else unchanged."""
    if not (isinstance(value, Tensor) and value.is_floating_point()) or value.requires_grad:
        return value
    return value.detach().requires_grad_()


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, (tuple, list)):
        return type(value)(map(_detached, value))
    return {name: _detached(one) for name, one in value.items()} if isinstance(value, Mapping) else value
