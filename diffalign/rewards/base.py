"""The reward protocol, the registry of rewards, and the one function that calls a reward."""

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
from diffalign.rewards.support.signature import check_reward
from diffalign.user_code import consented, load_code

IMAGES, LATENTS = "images", "latents"  # values of a reward's ``wants``
Metadata = Sequence[Mapping[str, Any]]
Extras = Mapping[str, Tensor]
RewardFunction = Callable[[Tensor, Sequence[str], Metadata], Tensor]


class RewardUnavailable(ValueError):
    """A reward that cannot score any sample: weights or a package are missing, or its result has the wrong shape.

    It ends the command or run. Every other exception of a reward costs only the samples that cause it.
    """


class WrongShape(RewardUnavailable):
    """A reward whose result is not a tensor of shape (B,)."""


@runtime_checkable
class Reward(Protocol):
    """Score images, each independently of the rest of its batch. Higher is better.

    A group reward compares the images of a group: it sets ``needs_groups`` and is called with group ids.

    A latent reward sets ``wants = "latents"``: a model's samples reach it as final latents (B, C, ...), scaled for the
    denoiser, and no image is decoded if all rewards of a run want latents. Images of files reach it as images, which
    it may encode itself. Its optional method ``check_latents(vae_config)`` raises ValueError for
    latents of another VAE.

    With ``overlap_rewards``, a run scores images in a background thread while it samples; calls never overlap. Images,
    prompts and metadata are copies that the reward may change. Process-wide state that it changes, such as random
    seeds, default dtype, environment or working directory, is restored after each call.
    """

    @property
    def name(self) -> str:
        """Name under which scores are stored and logged."""

    @property
    def differentiable(self) -> bool:
        """Whether the result carries a gradient to the images."""

    @property
    def range(self) -> tuple[float, float]:
        """Lowest and highest possible score; infinite where there is no bound."""

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor | tuple[Tensor, Extras]:
        """Score a batch.

        Args:
            images: (B, 3, H, W), float, [0, 1].
            prompts: B texts.
            metadata: B mappings, one per prompt.

        Returns:
            Scores (B,), float; or a pair of scores and named extras, tensors with one row per image.
        """


@dataclass(frozen=True)
class FunctionReward:
    """Wrap a function ``(images, prompts, metadata) -> (B,)`` as a reward."""

    name: str
    function: RewardFunction
    differentiable: bool = False
    range: tuple[float, float] = (-math.inf, math.inf)
    wants: str = IMAGES

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """Call the function."""
        return self.function(images, prompts, metadata)


@dataclass(frozen=True)
class RewardCard:
    """Describe a registered reward; the reward table of the documentation is generated from these.

    Attributes:
        measures: what a high score means, in a few words.
        scale: a difference of scores that matters; test tolerances are in this unit.
        source: paper or repository that defines the reward.
        weights: hub id loaded by default; empty without weights.
        licence: of the weights; empty without weights.
        millions: parameters of the weights, in millions.
        extra: pip extra of diffalign that the reward needs; empty if none.
        served: whether the weights are on a server, and take no memory here.
    """

    measures: str
    scale: float
    source: str = ""
    weights: str = ""
    licence: str = ""
    millions: float = 0.0
    extra: str = ""
    served: bool = False


DEFAULT_CARD = RewardCard("what its author says", 1.0)


@dataclass(frozen=True)
class Registered:
    """An entry of the registry: factory, default options and card of a reward."""

    factory: Callable[..., Reward]
    options: Mapping[str, Any]
    facts: RewardCard = DEFAULT_CARD

    def make(self, **options: Any) -> Reward:
        """Build the reward. Raises ValueError for options that the factory does not accept."""
        every = {**self.options, **options}
        _check_options(every.get("name", _name_of(self.factory)), self.factory, 0, every)
        reward = self.factory(**every)
        with suppress(AttributeError, TypeError):  # an instance with __slots__ cannot store its recipe
            object.__setattr__(reward, RECIPE, (every.get("name", ""), options))
        return reward


REWARDS: dict[str, Registered] = {}
RECIPE = "_made_from"  # attribute of rewards built from the registry: (name, options)
PLUGINS = "diffalign.rewards"  # entry point group of other packages: a class or factory each


def register(
    name: str, facts: RewardCard = DEFAULT_CARD, **options: Any
) -> Callable[[Callable[..., Reward]], Callable[..., Reward]]:
    """Register a reward class or factory: ``get_reward(name)`` calls it with ``name`` and ``options``.

    Stack the decorator to register several presets of one class. Raises ValueError if the name is taken.
    """

    def add(factory: Callable[..., Reward]) -> Callable[..., Reward]:
        if name in REWARDS:
            raise ValueError(f"a reward named {name!r} is registered already: choose another name")
        REWARDS[name] = Registered(factory, {"name": name, **options}, facts)
        return factory

    return add


def get_reward(spec: str | Reward | RewardFunction, allow_code: bool = False, **options: Any) -> Reward:
    """Resolve a reward: ``get_reward("pickscore", path="my/weights", precision="bf16")``.

    Args:
        spec: a registered name; ``module:function`` or ``file.py:function``; a function, which becomes a reward of its
            name; or a reward, returned unchanged.
        allow_code: consent to import a ``spec`` with a colon. It is imported once, and called only if its signature is
            a reward's (``signature.check_reward``).
        options: passed to the factory or function that a string ``spec`` names.

    Raises:
        ValueError: an unknown name or option; code that is missing, faulty or not allowed; a class instead of an
            instance; an object that is not callable.
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
        raise ValueError(f"{spec!r} takes no options ({', '.join(options)}): only rewards given by name do")
    if isinstance(spec, type) or not callable(spec):
        raise ValueError(f"{spec!r} is not a reward: give a name, a function or an instance (known: {_known()})")
    if isinstance(spec, Reward):
        return spec
    return FunctionReward(_name_of(spec), spec)


def needs_groups(reward: object) -> bool:
    """Whether the reward compares images within a group, and takes a fourth argument, ``groups``."""
    return getattr(reward, "needs_groups", False)


def wants_latents(reward: object) -> bool:
    """Whether a model's samples reach the reward as latents."""
    return getattr(reward, "wants", IMAGES) == LATENTS


def wanted(reward: object, images: Tensor | None, latents: Tensor | None) -> Tensor:
    """Return the latents for a reward that wants them, the images for others, and where there are no latents.

    Raises ValueError if the reward needs images and there are none.
    """
    found = latents if latents is not None and wants_latents(reward) else images
    if found is None:
        raise ValueError(f"reward {getattr(reward, 'name', reward)!r} needs images: decode the latents")
    return found


def check_latents(rewards: Mapping[str, Reward], vae_config: Mapping[str, Any]) -> None:
    """Raise ValueError, by name, if a reward scores latents of another VAE than the one configured as given."""
    for name, reward in rewards.items():
        if wants_latents(reward) and (check := getattr(reward, "check_latents", None)):
            try:
                check(vae_config)
            except ValueError as error:
                raise ValueError(f"reward {name!r}: {error}") from error


def ask(
    reward: Reward,
    images: Tensor | None,
    prompts: Sequence[str],
    metadata: Metadata,
    groups: Tensor | None = None,
    latents: Tensor | None = None,
) -> tuple[Tensor, Extras]:
    """Call a reward on a batch, isolated from the caller: see ``isolated``.

    Rewards of this package do not write to images and receive them directly; others receive a copy, through which
    gradients flow.

    Args:
        reward: pointwise or group reward.
        images: (B, 3, H, W), float, [0, 1]; None if the reward wants latents, which are given.
        prompts: B texts.
        metadata: B mappings.
        groups: group ids (B,), for a group reward.
        latents: (B, C, ...), scaled for the denoiser, for a reward that wants them; None to let it encode the images.

    Returns:
        Scores (B,), and the extras by name.

    Raises:
        RewardUnavailable: the reward cannot score any sample.
        RewardExit: the reward raised an exception that would end the program.
        ValueError: the number of scores differs from B.
    """
    foreign, given = not _is_ours(reward), wanted(reward, images, latents)

    def call(seen: Tensor) -> tuple[Tensor, Extras]:
        own = [copy_metadata(entry) for entry in metadata]
        copied = None if groups is None else groups.clone()
        values, extras = isolated(lambda: _checked_call(reward, seen, list(prompts), own, copied))
        if not foreign:
            return values, extras
        # The reward may reuse its output buffers in the next call.
        return values.clone(), {name: extra.clone() for name, extra in extras.items()}

    try:
        if foreign and reward.differentiable and wants_grad(given) and not needs_groups(reward):
            return _score_with_gradient(given, call)
        return call(given.clone() if foreign else given)
    except WrongShape:
        raise
    except (RewardUnavailable, ImportError) as error:
        raise RewardUnavailable(f"reward {reward.name!r}: {error}") from error


def _checked_call(
    reward: Reward, images: Tensor, prompts: list[str], metadata: Metadata, groups: Tensor | None
) -> tuple[Tensor, Extras]:
    """Call a reward and check the shape of its result."""
    count = len(images)  # before the reward may change the tensor's shape
    result = reward(images, prompts, metadata, *([groups] if needs_groups(reward) else []))
    found, extras = result if isinstance(result, tuple) else (result, {})
    values = torch.as_tensor(found)
    if values.shape != (count,):
        problem = f"reward {reward.name!r} returned shape {tuple(values.shape)} for {count} images"
        # One sample can change the number of scores, but not the number of dimensions.
        kind = ValueError if values.ndim == 1 else WrongShape
        raise kind(f"{problem}: return one number each")
    return values, extras


def _score_with_gradient(images: Tensor, call: Callable[[Tensor], tuple[Tensor, Extras]]) -> tuple[Tensor, Extras]:
    """Run ``call`` on a copy of the images, and its backward pass at once, so that errors in it cost the sample too.

    Exact for pointwise rewards: the gradient of the sum of scores holds the gradient of each score.
    """
    leaf = images.detach().requires_grad_()
    found, extras = call(leaf.clone())  # a leaf does not allow in-place writes
    gradient = None
    if found.requires_grad:
        (gradient,) = isolated(lambda: torch.autograd.grad(found.sum(), leaf, allow_unused=True))
    if gradient is None:
        raise RewardUnavailable(
            "it declares differentiable=True, but its scores carry no gradient to the images; set differentiable=False"
        )
    values: Tensor = _PrecomputedGradient.apply(images, found.detach(), gradient)
    return values, {name: extra.detach() for name, extra in extras.items()}


class _PrecomputedGradient(torch.autograd.Function):
    """Attach a known gradient to scores (B,) of images (B, 3, H, W). A non-finite gradient makes its score NaN."""

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
    """Whether a reward is code of this package, whose tests check that registered rewards do not write to images."""
    function = getattr(reward, "function", None) if type(reward) is FunctionReward else type(reward)
    while isinstance(function, partial):
        function = function.func
    return str(getattr(function, "__module__", "")).startswith("diffalign.")


def registered(name: str) -> Registered:
    """Look up a name in the registry and among plug-ins. Raises ValueError with the closest name if it is unknown."""
    if name not in REWARDS and name in (plugins := entry_points(group=PLUGINS)).names:
        factory = plugins[name].load()
        if name not in REWARDS:  # loading the plug-in may have registered it
            register(name, getattr(factory, "facts", DEFAULT_CARD))(factory)
    if name in REWARDS:
        return REWARDS[name]
    close = difflib.get_close_matches(name, names(), n=1, cutoff=0.0)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"unknown reward {name!r}; known: {_known()}{hint}")


def names() -> list[str]:
    """List the registered names and those of plug-ins."""
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
    """Raise ValueError if ``function`` does not accept ``options`` after ``given`` positional arguments."""
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
