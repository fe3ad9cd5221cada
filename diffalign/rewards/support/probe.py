"""Call rewards on two small images before a model loads, to report a faulty reward early and by name."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.device import default_device
from diffalign.rewards.base import RECIPE, FunctionReward, Reward, RewardUnavailable, needs_groups, wants_latents
from diffalign.rewards.support.isolation import copy_metadata, isolated, said
from diffalign.rewards.support.weights import resident
from diffalign.structures import Prompt, Resolution, image_size

COUNT, SIDE = 2, 64
_OFF: ContextVar[bool] = ContextVar("off", default=False)


@contextmanager
def untried() -> Iterator[None]:
    """Disable ``try_rewards`` inside the context, for dry runs."""
    token = _OFF.set(True)
    try:
        yield
    finally:
        _OFF.reset(token)


def try_rewards(
    rewards: Mapping[str, Reward], prompts: Sequence[Prompt], resolution: Resolution = None, *, leave: bool = False
) -> None:
    """Call each reward on two small images.

    Args:
        rewards: by name.
        prompts: of the run; the first two are used. Without prompts, exceptions of a reward are ignored, because it may
            need metadata; so are those of a latent reward, which may not accept images.
        resolution: of the run's images, if known; the test images have at most ``SIDE`` pixels a side.
        leave: whether networks leave the device afterwards, one reward after the other.

    Raises:
        RewardUnavailable: weights or a package are missing.
        ValueError: a reward that does not accept (images, prompts, metadata), that raises on both images, together and
            alone, or that does not return one number per image.
    """
    if _OFF.get():
        return
    samples = [prompts[i % len(prompts)] for i in range(COUNT)] if prompts else [Prompt("a red circle")] * COUNT
    for name, reward in rewards.items():
        _check_signature(name, reward)
        refuse = bool(prompts) and not wants_latents(reward)
        with resident(leave=leave):
            _try(name, _copied(reward), samples, refuse, _test_size(resolution))


def _test_size(resolution: Resolution) -> tuple[int, int]:
    """Return the size of the test images: the run's, shrunk to at most ``SIDE`` pixels a side."""
    height, width = image_size(resolution) or (SIDE, SIDE)
    scale = min(1.0, SIDE / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def _copied(reward: Reward) -> Reward:
    """Copy a user's instance, whose state the trial may change; instances that hold tensors are not copied."""
    held = getattr(reward, "__dict__", {})
    if RECIPE in held or isinstance(reward, nn.Module) or any(isinstance(v, nn.Module | Tensor) for v in held.values()):
        return reward
    try:
        return copy.deepcopy(reward)
    except Exception:  # a user's __deepcopy__ may raise anything
        return reward


def _check_signature(name: str, reward: Reward) -> None:
    function = reward.function if isinstance(reward, FunctionReward) else reward
    count = 4 if needs_groups(reward) else 3
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError as error:
        wanted = "images, prompts, metadata" + (", groups" if count == 4 else "")
        raise ValueError(
            f"reward {name!r} cannot be called with ({wanted}): {error}; give it these parameters"
        ) from error
    except ValueError:  # some C functions have no signature
        return


@torch.no_grad()
def _try(name: str, reward: Reward, prompts: Sequence[Prompt], refuse: bool, size: tuple[int, int]) -> None:
    images = torch.rand(COUNT, 3, *size, generator=torch.Generator().manual_seed(0)).to(default_device())
    errors: list[BaseException] = []
    for rows in ([0, 1], [0], [1]):  # a reward may support only single images
        try:
            found = _call(reward, images[rows].clone(), [prompts[i] for i in rows])
        except (RewardUnavailable, ImportError) as error:
            raise RewardUnavailable(f"reward {name!r}: {error}") from error
        except Exception as error:  # user code may raise anything
            errors.append(error)
            continue
        if not errors and (problem := _problem(found)):
            raise ValueError(f"reward {name!r} returned {problem}: return one number for each image, as a tensor (B,)")
        return
    first = errors[0]
    later = isinstance(first, NameError) and "free variable" in str(first)  # assigned after the trainer is built
    if refuse and not later:
        what = said(first, 300).removeprefix("RewardExit: it raised ")
        raise ValueError(
            f"reward {name!r} raised {what} (on {COUNT} test images of {size[0]} x {size[1]} pixels, prompt "
            f"{prompts[0].text[:100]!r}): fix it, or leave it out"
        ) from first


def _call(reward: Reward, images: torch.Tensor, prompts: Sequence[Prompt]) -> Any:
    groups = [torch.zeros(len(prompts), dtype=torch.long, device=images.device)] if needs_groups(reward) else []
    texts, metadata = [p.text for p in prompts], [copy_metadata(dict(p.metadata)) for p in prompts]
    return isolated(lambda: reward(images, texts, metadata, *groups))


def _problem(found: Any) -> str:
    """Describe what is wrong with the result for the test images; empty if nothing is."""
    if isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Mapping):
        found = found[0]
    try:
        values = torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError):
        return f"{type(found).__name__} ({str(found)[:60]!r})"
    if values.is_complex():
        return f"numbers of type {values.dtype}"
    return "" if values.shape == (COUNT,) else f"shape {tuple(values.shape)} for {COUNT} images"
