"""Try rewards on two small images before a model loads: what is wrong with one shows in a second, by its name."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.rewards.base import RECIPE, FunctionReward, Reward, RewardUnavailable, needs_groups
from diffalign.rewards.support.isolation import copy_metadata, isolated, said
from diffalign.structures import Prompt

COUNT, SIDE = 2, 64
_OFF: ContextVar[bool] = ContextVar("off", default=False)


@contextmanager
def untried() -> Iterator[None]:
    """Ask no reward inside: a dry run has no side effects."""
    token = _OFF.set(True)
    try:
        yield
    finally:
        _OFF.reset(token)


def try_rewards(rewards: Mapping[str, Reward], prompts: Sequence[Prompt], resolution: int | None = None) -> None:
    """Call each reward on two small images.

    Args:
        rewards: by name.
        prompts: of the run, of which the first two are used. Without any, a reward that raises is let pass: it may need
            metadata that are not here.
        resolution: of the run's images, where it is known; the test images have at most ``SIDE`` pixels a side.

    Raises:
        RewardUnavailable: weights or a package are missing.
        ValueError: a reward that cannot be called with (images, prompts, metadata), raises on both images, together and
            alone, or returns something else than a number for each.
    """
    if _OFF.get():
        return
    asked = [prompts[i % len(prompts)] for i in range(COUNT)] if prompts else [Prompt("a red circle")] * COUNT
    for name, reward in rewards.items():
        _check_signature(name, reward)
        _try(name, _copied(reward), asked, bool(prompts), min(SIDE, resolution or SIDE))


def _copied(reward: Reward) -> Reward:
    """A copy whose state may change, of a user's own instance; what holds tensors is used as it is."""
    held = getattr(reward, "__dict__", {})
    if RECIPE in held or isinstance(reward, nn.Module) or any(isinstance(v, nn.Module | Tensor) for v in held.values()):
        return reward
    try:
        return copy.deepcopy(reward)
    except Exception:  # of an object that cannot be copied, in ways of its own
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
    except ValueError:  # no signature, as of some functions in C
        return


@torch.no_grad()
def _try(name: str, reward: Reward, prompts: Sequence[Prompt], refuse: bool, side: int) -> None:
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    images = torch.rand(COUNT, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    errors: list[BaseException] = []
    for rows in ([0, 1], [0], [1]):  # one that fails on both together may do for one at a time
        try:
            found = _ask(reward, images[rows].clone(), [prompts[i] for i in rows])
        except (RewardUnavailable, ImportError) as error:
            raise RewardUnavailable(f"reward {name!r}: {error}") from error
        except Exception as error:  # the code of a user: what it raises is unknown
            errors.append(error)
            continue
        if not errors and (problem := _problem(found)):
            raise ValueError(f"reward {name!r} returned {problem}: return one number for each image, as a tensor (B,)")
        return
    first = errors[0]
    later = isinstance(first, NameError) and "free variable" in str(first)  # assigned once the trainer is made
    if refuse and not later:
        what = said(first, 300).removeprefix("RewardExit: it raised ")
        raise ValueError(
            f"reward {name!r} raised {what} (on {COUNT} test images of {side} x {side} pixels, prompt "
            f"{prompts[0].text[:100]!r}): fix it, or leave it out"
        ) from first


def _ask(reward: Reward, images: torch.Tensor, prompts: Sequence[Prompt]) -> Any:
    groups = [torch.zeros(len(prompts), dtype=torch.long)] if needs_groups(reward) else []
    texts, metadata = [p.text for p in prompts], [copy_metadata(dict(p.metadata)) for p in prompts]
    return isolated(lambda: reward(images, texts, metadata, *groups))


def _problem(found: Any) -> str:
    """What is wrong with the result of a reward for the test images; empty if nothing."""
    if isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Mapping):
        found = found[0]
    try:
        values = torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError):
        return f"{type(found).__name__} ({str(found)[:60]!r})"
    if values.is_complex():
        return f"numbers of type {values.dtype}"
    return "" if values.shape == (COUNT,) else f"shape {tuple(values.shape)} for {COUNT} images"
