"""What a reward is, and how to find one by name."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from diffalign.config.sections import PASSED
from diffalign.plugins import entry_points
from diffalign.rewards.support.isolation import copy_metadata, isolated
from diffalign.rewards.support.preprocess import wants_grad
from diffalign.rewards.support.user_code import check_reward, consented, load_code

Metadata = Sequence[Mapping[str, Any]]
Extras = Mapping[str, Tensor]
RewardFunction = Callable[[Tensor, Sequence[str], Metadata], Tensor]


class RewardUnavailable(ValueError):
    """A reward that can score nothing: weights or a package are missing, or what it returns is no list of numbers.

    No sample is to blame, so it ends what was asked for, where any other failure costs its samples alone.
    """


class WrongShape(RewardUnavailable):
    """A reward whose result is no list of numbers."""


@runtime_checkable
class Reward(Protocol):
    """Judges images, each independently of the rest of its batch. Higher is better.

    One that ranks the images of a group against each other sets ``needs_groups``, and is called with their group ids.

    While a run samples, images are judged in another thread than at other times, though in one at a time, unless its
    ``overlap_rewards`` is off. Images, prompts and metadata are the reward's own. Process-wide state that it changes,
    such as generators' seeds, default dtype, environment or working directory, is put back after each call.
    """

    @property
    def name(self) -> str:
        """The name under which scores are stored and logged."""

    @property
    def differentiable(self) -> bool:
        """Whether the result carries a gradient to the images."""

    @property
    def range(self) -> tuple[float, float]:
        """The lowest and highest value that can be returned; infinite where there is no bound."""

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor | tuple[Tensor, Extras]:
        """Images (B, 3, H, W), float, [0, 1], with B prompts and B metadata mappings, to a float tensor (B,).

        A reward may have more to say: then it returns a pair of that tensor and named tensors, a row per image.
        """


@dataclass(frozen=True)
class FunctionReward:
    """A plain function ``(images, prompts, metadata) -> (B,)`` as a reward."""

    name: str
    function: RewardFunction
    differentiable: bool = False
    range: tuple[float, float] = (-math.inf, math.inf)

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """What the function returns."""
        return self.function(images, prompts, metadata)


@dataclass(frozen=True)
class RewardCard:
    """What to know about a registered reward before using it; the README's table is made of these.

    measures: in a few words. scale: a difference of scores that matters; tolerances are in its units. source: of the
    recipe. weights: the hub id that is loaded by default, licence: theirs; both empty where there are none. millions:
    of their parameters.
    """

    measures: str
    scale: float
    source: str = ""
    weights: str = ""
    licence: str = ""
    millions: float = 0.0


UNSAID = RewardCard("what its author says", 1.0)


@dataclass(frozen=True)
class Registered:
    """A reward that has a name: how it is made, with which options, and what is known about it."""

    factory: Callable[..., Reward]
    options: Mapping[str, Any]
    facts: RewardCard = UNSAID

    def make(self, **options: Any) -> Reward:
        """The reward. ValueError: options that it does not take."""
        every = {**self.options, **options}
        _check_options(every.get("name", _name_of(self.factory)), self.factory, 0, every)
        reward = self.factory(**every)
        with suppress(AttributeError, TypeError):  # slots: then nothing can be noted
            object.__setattr__(reward, RECIPE, (every.get("name", ""), options))
        return reward


REWARDS: dict[str, Registered] = {}
RECIPE = "_made_from"  # attribute of a reward that was made by name: the name and the options given
PLUGINS = "diffalign.rewards"  # the entry points of other packages: a class or factory each


def register(
    name: str, facts: RewardCard = UNSAID, **options: Any
) -> Callable[[Callable[..., Reward]], Callable[..., Reward]]:
    """Decorates a reward's class (or factory): ``get_reward(name)`` then calls it with ``name`` and ``options``.

    Stack it to register several settings of one class. ValueError: the name is taken.
    """

    def add(factory: Callable[..., Reward]) -> Callable[..., Reward]:
        if name in REWARDS:
            raise ValueError(f"a reward named {name!r} is registered already: choose another name")
        REWARDS[name] = Registered(factory, {"name": name, **options}, facts)
        return factory

    return add


def get_reward(spec: str | Reward | RewardFunction, allow_code: bool = False, **options: Any) -> Reward:
    """A reward from a registered name, a plain function (named after it), or a reward, which is returned as it is.

    A name with a colon is code, ``module:function`` or ``file.py:function``: it is imported, once, only where
    ``allow_code`` says so, and called only if it is a reward (``code.check_reward``). ``options`` are for what has a
    name, a function by code too: ``get_reward("pickscore", path="my/weights", precision="bf16")``.

    ValueError: an unknown name or option, code that is missing, faulty or not allowed, a class instead of an instance,
    or something that cannot be called.
    """
    if isinstance(spec, str) and spec == PASSED:
        raise ValueError(
            "this reward was passed from Python, and no file names it: pass reward_funcs= again, or write reward: "
            "file.py:function (a function at the top level of a file) and type --allow_reward_code"
        )
    if isinstance(spec, str):
        with consented(allow_code):
            return _from_code(spec, options) if ":" in spec else registered(spec).make(**options)
    if options:
        raise ValueError(f"{spec!r} takes no options ({', '.join(options)}): only rewards that are named do")
    if isinstance(spec, type) or not callable(spec):
        raise ValueError(f"{spec!r} is no reward: give a name, a function or an instance (known: {_known()})")
    if isinstance(spec, Reward):
        return spec
    return FunctionReward(_name_of(spec), spec)


def needs_groups(reward: object) -> bool:
    """Whether it judges images against the others of their group, and is called with a fourth argument, ``groups``."""
    return getattr(reward, "needs_groups", False)


def ask(
    reward: Reward, images: Tensor, prompts: Sequence[str], metadata: Metadata, groups: Tensor | None = None
) -> tuple[Tensor, Extras]:
    """Return what a reward of any kind says: scores (B,), and its extras. groups: (B,), for one that needs them.

    The reward gets inputs of its own, and what it changes in the process is put back: see ``isolated``. Rewards of this
    package are known to leave images alone, and get them as they are; others get a copy, which carries the gradient.

    RewardUnavailable: see there. RewardExit: see there. ValueError: scores of another number of images.
    """
    foreign = not _is_ours(reward)

    def call(seen: Tensor) -> tuple[Tensor, Extras]:
        own = [copy_metadata(entry) for entry in metadata]
        copied = None if groups is None else groups.clone()
        values, extras = isolated(lambda: _checked_call(reward, seen, list(prompts), own, copied))
        if not foreign:
            return values, extras
        # What it returned may be written to when it is called again.
        return values.clone(), {name: extra.clone() for name, extra in extras.items()}

    try:
        if foreign and reward.differentiable and wants_grad(images) and not needs_groups(reward):
            return _score_with_gradient(images, call)
        return call(images.clone() if foreign else images)
    except WrongShape:
        raise
    except (RewardUnavailable, ImportError) as error:
        raise RewardUnavailable(f"reward {reward.name!r}: {error}") from error


def _checked_call(
    reward: Reward, images: Tensor, prompts: list[str], metadata: Metadata, groups: Tensor | None
) -> tuple[Tensor, Extras]:
    """Call a reward, and check the shape of what it returns."""
    count = len(images)  # before the reward may change the tensor's shape
    result = reward(images, prompts, metadata, *([groups] if needs_groups(reward) else []))
    found, extras = result if isinstance(result, tuple) else (result, {})
    values = torch.as_tensor(found)
    if values.shape != (count,):
        problem = f"reward {reward.name!r} returned shape {tuple(values.shape)} for {count} images"
        # Another number of scores can be one sample's doing; another number of dimensions cannot.
        kind = ValueError if values.ndim == 1 else WrongShape
        raise kind(f"{problem}: return one number each")
    return values, extras


def _score_with_gradient(images: Tensor, call: Callable[[Tensor], tuple[Tensor, Extras]]) -> tuple[Tensor, Extras]:
    """``call`` on images of its own, whose gradient is taken at once: what raises there costs the sample as well.

    Exact for rewards that judge each image by itself, as all do that need no groups.
    """
    leaf = images.detach().requires_grad_()
    found, extras = call(leaf.clone())  # no leaf, so that the reward may write to it as to any image
    gradient = None
    if found.requires_grad:
        (gradient,) = isolated(lambda: torch.autograd.grad(found.sum(), leaf, allow_unused=True))
    if gradient is None:
        raise RewardUnavailable("it says that it is differentiable, and its scores carry no gradient to the images")
    values: Tensor = _PrecomputedGradient.apply(images, found.detach(), gradient)
    return values, {name: extra.detach() for name, extra in extras.items()}


class _PrecomputedGradient(torch.autograd.Function):
    """Scores (B,) of images (B, 3, H, W) whose gradient is known. One that is not finite makes its score NaN."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, values: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        finite = gradient.isfinite().flatten(1).all(1).to(values.device)
        return torch.where(finite, values, math.nan)

    @staticmethod
    def backward(ctx: Any, output: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return output.to(gradient).view(-1, *[1] * (gradient.ndim - 1)) * gradient, None, None


def _is_ours(reward: object) -> bool:
    """Whether a reward is this package's code: tests hold every registered reward to leave its images alone."""
    function = getattr(reward, "function", None) if type(reward) is FunctionReward else type(reward)
    while isinstance(function, partial):
        function = function.func
    return str(getattr(function, "__module__", "")).startswith("diffalign.")


def registered(name: str) -> Registered:
    """What goes by ``name``, a plug-in of another package too. ValueError: an unknown name, with the closest one."""
    if name not in REWARDS and name in (plugins := entry_points(group=PLUGINS)).names:
        factory = plugins[name].load()
        if name not in REWARDS:  # importing it may have registered it
            register(name, getattr(factory, "facts", UNSAID))(factory)
    if name in REWARDS:
        return REWARDS[name]
    close = difflib.get_close_matches(name, names(), n=1, cutoff=0.0)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"unknown reward {name!r}; known: {_known()}{hint}")


def names() -> list[str]:
    """All that can be asked for by name, plug-ins of installed packages too."""
    return sorted({*REWARDS, *entry_points(group=PLUGINS).names})


def _from_code(spec: str, options: Mapping[str, Any]) -> Reward:
    module, name = load_code(spec)
    if name in REWARDS and getattr(REWARDS[name].factory, "__module__", None) == module.__name__:
        return REWARDS[name].make(**options)
    if not hasattr(module, name):
        raise ValueError(
            f"reward {spec!r} cannot be loaded: there is no {name!r} in it; write module:function or file.py:function"
        )
    found = getattr(module, name)
    if entry := next((entry for entry in REWARDS.values() if entry.factory is found), None):
        return entry.make(**options)
    check_reward(spec, found)
    if isinstance(found, type):
        return get_reward(Registered(found, {}).make(**options))
    if options and inspect.isfunction(found):
        _check_options(name, found, 3, options)
        return FunctionReward(name, partial(found, **options))
    return get_reward(found, **options)


def _check_options(name: str, function: Callable[..., Any], given: int, options: Mapping[str, Any]) -> None:
    """ValueError where ``function`` does not take ``options`` after so many arguments."""
    signature = inspect.signature(function)
    try:
        signature.bind(*range(given), **options)
    except TypeError as error:
        taken = ", ".join(list(signature.parameters)[given:])
        raise ValueError(f"reward {name!r}: {error}; its options: {taken}") from error


def _known() -> str:
    return ", ".join(names())


def _name_of(function: Callable[..., Any]) -> str:
    while isinstance(function, partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__).strip("<>")
