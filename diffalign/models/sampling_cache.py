"""Caches of diffusers over the steps of one sampling: lossy, and only inside a context."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn

NAME = "rollout"  # of the context that diffusers keeps activations under


@dataclass
class CacheCount:
    """Calls of a denoiser inside a context, in images.

    Attributes:
        calls: Images through the denoiser.
        computed: Those of them for which its last block was computed.
    """

    calls: int = 0
    computed: int = 0

    @property
    def computed_share(self) -> float:
        """Share of the calls that were computed in full; 1 without calls."""
        return self.computed / self.calls if self.calls else 1.0


def first_block(threshold: float) -> Any:
    """Make the configuration of the First Block Cache."""
    from diffusers import FirstBlockCacheConfig

    return FirstBlockCacheConfig(threshold=threshold)


def taylorseer(interval: int, warmup: int, order: int) -> Any:
    """Make the configuration of TaylorSeer (arXiv 2503.06923); its factors are kept in float32."""
    from diffusers import TaylorSeerCacheConfig

    return TaylorSeerCacheConfig(
        cache_interval=interval,
        disable_cache_before_step=warmup,
        max_order=order,
        taylor_factors_dtype=torch.float32,
    )


def check_supported(denoiser: ModelMixin) -> None:
    """Raise ValueError for a denoiser that diffusers has no caches for."""
    if not hasattr(denoiser, "enable_cache"):
        raise ValueError(
            f"rollout_cache: diffusers has no caches for {type(denoiser).__name__}: set rollout_cache: none, or use a "
            "model of the FLUX or Qwen-Image families"
        )


@contextmanager
def cached(denoiser: ModelMixin, cache: Any) -> Iterator[CacheCount]:
    """Let the denoiser reuse activations within each ``trajectory``; on exit it computes everything again.

    Args:
        denoiser: A denoiser that ``check_supported`` accepts.
        cache: A configuration of diffusers.
    """
    check_supported(denoiser)
    count = CacheCount()

    def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        images = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        count.calls += len(images)

    def computed(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        count.computed += len(output)

    denoiser.enable_cache(cache)
    handles = [
        denoiser.register_forward_pre_hook(called, with_kwargs=True),
        _last_linear(denoiser).register_forward_hook(computed),
    ]
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()
        denoiser.disable_cache()


@contextmanager
def trajectory(denoiser: ModelMixin) -> Iterator[None]:
    """Forget the activations of the trajectory before; does nothing outside ``cached``."""
    if not getattr(denoiser, "is_cache_enabled", False):
        yield
        return
    denoiser._reset_stateful_cache()
    with denoiser.cache_context(NAME):
        yield


def _last_linear(denoiser: nn.Module) -> nn.Module:
    """Return a layer of the last block's attention, which runs only if the block is computed."""
    attention = [module for name, module in denoiser.named_modules() if name.rpartition(".")[2] == "attn"][-1]
    return next(module for module in attention.modules() if isinstance(module, nn.Linear))
