"""torch.compile on the repeated blocks of a denoiser: minutes less to compile than the whole, and as fast to run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.models.attention import first_line

# Graphs that one kind of block may have: of each shape of batch, with the adapter on and off. Beyond it torch would
# go on uncompiled, and say so once.
GRAPHS = 64


def compile_refusal(device: torch.device | str) -> str | None:
    """Why torch.compile does not run here, in one line; None where a forward and a backward pass through it do."""
    x = torch.linspace(-1, 1, 64, device=device).reshape(8, 8).requires_grad_()
    torch._dynamo.reset()  # what failed before in this process would fail again without being tried
    try:
        compiled = torch.compile(lambda y: (y @ y).sin().sum())
        (gradient,) = torch.autograd.grad(compiled(x), x)
        (expected,) = torch.autograd.grad((x @ x).sin().sum(), x)
    except Exception as error:  # no C++ compiler, no Triton, a driver too old: all have errors of their own
        return first_line(error)
    return None if torch.allclose(gradient, expected, atol=1e-4) else "its gradient is wrong"


def compile_blocks(denoiser: nn.Module, **options: Any) -> None:
    """Compiles the blocks of a diffusers model, in place: names of weights stay as they are.

    A block has one graph for sampling and for training, so that replayed steps are what was sampled: see ``OneGraph``.
    Each shape of batch has graphs of its own, because one for all shapes rounds otherwise. options: of torch.compile.
    ValueError: a model whose blocks diffusers does not name.
    """
    if not getattr(denoiser, "_repeated_blocks", None):
        # Of SD3: diffusers names what must not be split over devices, which are the same blocks.
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
    """Calls a compiled block in the same way whether gradients are wanted or not.

    torch compiles a graph for inference and another for training, which fuse, and so round, differently; and a third
    for a first block, whose input needs no gradient. Here every floating input needs one. Without gradients, what the
    block recorded is freed as it returns.
    """

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the block returns; detached where no gradient is wanted."""
        wanted = torch.is_grad_enabled()
        with torch.enable_grad():
            output = self.call(*map(_recorded, args), **{name: _recorded(value) for name, value in kwargs.items()})
        return output if wanted else _detached(output)


def _recorded(value: Any) -> Any:
    """A tensor that needs a gradient; anything else as it is."""
    if not (isinstance(value, Tensor) and value.is_floating_point()) or value.requires_grad:
        return value
    return value.detach().requires_grad_()


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, (tuple, list)):
        return type(value)(map(_detached, value))
    return {name: _detached(one) for name, one in value.items()} if isinstance(value, Mapping) else value
