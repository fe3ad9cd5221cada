"""Registries of losses with their properties, which trainers, tables and tests read.

A loss registers itself in its own file; a user's own loss is named as ``module:function`` or ``file.py:function``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any, Literal, TypeVar

from torch import Tensor

from diffalign.losses.context import BatchContext
from diffalign.user_code import HOW, consented, load_code

F = TypeVar("F", bound=Callable[..., Any])
COMMON = ("pair", "denoised", "liked", "reward", "step", "beta", "clip_range")


@dataclass(frozen=True)
class Loss:
    """A function of the convention in ``diffalign.losses`` and where it comes from.

    function: see there. idea: in a few words. source: an arXiv number, or where it was published.
    """

    function: Callable[..., Any]
    idea: str
    source: str

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the function's options."""
        return tuple(name for name in signature(self.function).parameters if name not in COMMON)


@dataclass(frozen=True)
class PreferenceLoss(Loss):
    """A loss per pair, or per single image.

    beta: default for errors of the reduction "mean", None for a loss that takes none. Published for SD 1.5 where
        anything is; flow models with a LoRA want 100 to 500 where SD 1.5 wants 2000 to 5000.
    paired: whether it takes pairs, else single images with labels.
    reference: whether it compares with a reference. margin: whether it is a function of the margin alone, so that a
        pair at the bound of the margin has no gradient. liked_only: whether it ignores images that are not liked.
    context: makes the statistics over all processes' batches that the function takes as options.
    steps: whether beta is for log-ratios of sampled steps, so that it wants ``pairs: siblings``.
    """

    beta: float | None = None
    paired: bool = True
    reference: bool = True
    margin: bool = False
    liked_only: bool = False
    context: Callable[[], BatchContext] | None = None
    steps: bool = False


@dataclass(frozen=True)
class RewardLoss(Loss):
    """A loss of rewards (B,) that carry a gradient."""

    @property
    def threshold(self) -> bool:
        """Whether it takes ``threshold``, in the units of the reward."""
        return "threshold" in self.options

    @property
    def groups(self) -> bool:
        """Whether it takes ``groups``, (B,) integers, and so needs whole groups."""
        return "groups" in self.options


@dataclass(frozen=True)
class PolicyObjective(Loss):
    """A loss of stored transitions.

    means: whether it needs the mean of each step under the sampling weights. regions: whether its ratio may have any
        trust region. partners: whether it compares the two images of a prompt.
    """

    means: bool = False
    regions: bool = False
    partners: bool = False


Options = Mapping[str, float]
Wanted = bool | Callable[[Options], bool]


@dataclass(frozen=True)
class ForwardObjective(Loss):
    """A loss of noised final images, (step, **options) -> (B,) and metrics.

    old, reference: whether it needs the outputs of the lagged weights, and of the base model.
    estimator: whether it reads ``ForwardStep.log_p``. linear: whether an advantage of 0 gives no loss and no gradient.
    regions: whether its ratio may have any trust region.
    statistic: function (step, **options) -> (B, S), whose mean the objective needs; None: it needs none.
    statistic_over: what the mean is over: the images of a "group" at the same time, or the times of an "image".
    statistic_wanted: whether the options ask for it. statistic_old, statistic_reference: outputs that it needs besides
        the policy's.

    ``old`` and what begins with ``statistic_`` may depend on the options, see ``wants``.
    """

    old: Wanted = False
    reference: bool = False
    estimator: bool = True
    linear: bool = False
    regions: bool = False
    statistic: Callable[..., Tensor] | None = None
    statistic_over: Literal["group", "image"] = "group"
    statistic_wanted: Wanted = True
    statistic_old: Wanted = False
    statistic_reference: Wanted = False

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the function's options: all of its parameters but the first."""
        return tuple(signature(self.function).parameters)[1:]

    def resolve(self, given: Options) -> dict[str, float]:
        """Return all options with their values. ValueError: an option that the objective does not have."""
        parameters = signature(self.function).parameters
        if unknown := sorted(given.keys() - set(self.options)):
            known = ", ".join(self.options) or "no options"
            raise ValueError(f"objective_options: unknown {', '.join(unknown)}; this objective has {known}")
        return {name: given.get(name, parameters[name].default) for name in self.options}

    def wants(self, need: str, options: Options) -> bool:
        """Return whether the objective has a need, a field such as "old" or "statistic_old", with these options."""
        if need.startswith("statistic") and (self.statistic is None or not _wanted(self.statistic_wanted, options)):
            return False
        return need == "statistic" or _wanted(getattr(self, need), options)

    def skips_zero(self, options: Options) -> bool:
        """Return whether a sample with an advantage of 0 changes nothing, neither by itself nor in its group."""
        return self.linear and not (self.wants("statistic", options) and self.statistic_over == "group")


def _wanted(need: Wanted, options: Options) -> bool:
    return need(options) if callable(need) else need


PREFERENCE_LOSSES: dict[str, PreferenceLoss] = {}
REWARD_LOSSES: dict[str, RewardLoss] = {}
POLICY_OBJECTIVES: dict[str, PolicyObjective] = {}
FORWARD_OBJECTIVES: dict[str, ForwardObjective] = {}
# Losses by code, by what they were asked for as: loading them once takes consent, using them does not.
_LOADED: dict[tuple[type[Loss], str], Any] = {}


def preference_loss(
    name: str,
    *,
    idea: str,
    source: str,
    beta: float | None = None,
    paired: bool = True,
    reference: bool = True,
    margin: bool = False,
    liked_only: bool = False,
    context: Callable[[], BatchContext] | None = None,
    steps: bool = False,
) -> Callable[[F], F]:
    """Register a preference loss; arguments as the fields of ``PreferenceLoss``. ValueError: the name is taken."""

    def add(function: F) -> F:
        kind = (beta, paired, reference, margin, liked_only, context, steps)
        entry = PreferenceLoss(function, idea, source, *kind)
        return _add(PREFERENCE_LOSSES, name, entry, function)

    return add


def reward_loss(name: str, *, idea: str, source: str) -> Callable[[F], F]:
    """Register a reward loss; arguments as the fields of ``RewardLoss``. ValueError: the name is taken."""
    return lambda function: _add(REWARD_LOSSES, name, RewardLoss(function, idea, source), function)


def policy_objective(
    name: str, *, idea: str, source: str, means: bool = False, regions: bool = False, partners: bool = False
) -> Callable[[F], F]:
    """Register a policy objective; arguments as the fields of ``PolicyObjective``. ValueError: the name is taken."""

    def add(function: F) -> F:
        entry = PolicyObjective(function, idea, source, means, regions, partners)
        return _add(POLICY_OBJECTIVES, name, entry, function)

    return add


def forward_objective(
    name: str,
    *,
    idea: str,
    source: str,
    **needs: Any,
) -> Callable[[F], F]:
    """Register a forward objective; arguments as the fields of ``ForwardObjective``. ValueError: the name is taken."""

    def add(function: F) -> F:
        return _add(FORWARD_OBJECTIVES, name, ForwardObjective(function, idea, source, **needs), function)

    return add


def _add(registry: dict[str, Any], name: str, entry: Loss, function: F) -> F:
    if name in registry:
        raise ValueError(f"a loss named {name!r} is registered already: choose another name")
    registry[name] = entry
    return function


def get_loss(name: str, allow_code: bool = False) -> PreferenceLoss:
    """Find a preference loss by name, or load one given as ``module:function`` or ``file.py:function``.

    A function without the decorator is taken as one of pairs if its first parameter is called ``pair``, and of single
    images if its first two are ``denoised, liked``; the default of its parameter ``beta`` is the loss's own.

    Args:
        name: Registered, or code.
        allow_code: Whether code may be loaded; loaded once, it needs no consent.

    Raises:
        ValueError: An unknown name, with the known ones, or code that is missing, faulty, not allowed or no loss.
    """
    return _find("preference loss", PREFERENCE_LOSSES, PreferenceLoss, name, allow_code, _plain_preference_loss)


def get_reward_loss(name: str, allow_code: bool = False) -> RewardLoss:
    """Find a reward loss as ``get_loss`` does; code is a function whose first parameter is ``reward``."""
    return _find("reward loss", REWARD_LOSSES, RewardLoss, name, allow_code, _plain_reward_loss)


def get_objective(name: str, allow_code: bool = False) -> PolicyObjective:
    """Find a policy objective as ``get_loss`` does; code is a function of ``(step, *, clip_range)``."""
    return _find("policy objective", POLICY_OBJECTIVES, PolicyObjective, name, allow_code, _plain_objective)


def get_forward_objective(name: str, allow_code: bool = False) -> ForwardObjective:
    """Find a forward objective as ``get_loss`` does; code is a function of ``(step, **options)``, options of numbers.

    Code without the decorator gets the outputs of the policy, the lagged weights and the base model.
    """
    return _find("forward objective", FORWARD_OBJECTIVES, ForwardObjective, name, allow_code, _plain_forward)


L = TypeVar("L", bound=Loss)


def _find(
    kind: str,
    registry: Mapping[str, L],
    cls: type[L],
    name: str,
    allow_code: bool,
    plain: Callable[[Callable[..., Any], str, tuple[str, ...]], L],
) -> L:
    if name in registry:
        return registry[name]
    if ":" not in name:
        raise ValueError(f"unknown {kind} {name!r}; use one of {', '.join(registry)}, or {HOW.removeprefix('write ')}")
    if (cls, name) not in _LOADED:
        with consented(allow_code):
            module, attribute = load_code(name, kind)
        _LOADED[cls, name] = _from_module(kind, registry, name, vars(module).get(attribute), plain)
    found: L = _LOADED[cls, name]
    return found


def _from_module(
    kind: str,
    registry: Mapping[str, L],
    name: str,
    found: Any,
    plain: Callable[[Callable[..., Any], str, tuple[str, ...]], L],
) -> L:
    if entry := next((entry for entry in registry.values() if entry.function is found), None):
        return entry
    if not callable(found) or isinstance(found, type):
        raise ValueError(f"{kind} {name!r} cannot be loaded: there is no function of that name in it; {HOW}")
    try:
        return plain(found, name, tuple(signature(found).parameters))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{kind} {name!r} is none: {error}") from error


def _plain_preference_loss(function: Callable[..., Any], name: str, parameters: tuple[str, ...]) -> PreferenceLoss:
    paired = parameters[:1] == ("pair",)
    if not paired and parameters[:2] != ("denoised", "liked"):
        raise ValueError("write it as (pair, *, beta: float = ...) or (denoised, liked, *, beta: float = ...)")
    beta = signature(function).parameters["beta"].default if "beta" in parameters else None
    if beta is Parameter.empty or isinstance(beta, Tensor):
        raise ValueError("give its parameter beta a number as default, which is the loss's own beta")
    return PreferenceLoss(function, "the user's own", name, beta, paired)


def _plain_reward_loss(function: Callable[..., Any], name: str, parameters: tuple[str, ...]) -> RewardLoss:
    if parameters[:1] != ("reward",) or {*parameters[1:]} - {"threshold", "groups"}:
        raise ValueError("write it as (reward), with threshold and groups as keywords where it needs them")
    return RewardLoss(function, "the user's own", name)


def _plain_objective(function: Callable[..., Any], name: str, parameters: tuple[str, ...]) -> PolicyObjective:
    if parameters != ("step", "clip_range"):
        raise ValueError("write it as (step, *, clip_range), returning losses (B,) and metrics")
    return PolicyObjective(function, "the user's own", name, means=True)


def _plain_forward(function: Callable[..., Any], name: str, parameters: tuple[str, ...]) -> ForwardObjective:
    defaults = [parameter.default for parameter in signature(function).parameters.values()][1:]
    if parameters[:1] != ("step",) or not all(isinstance(default, (int, float)) for default in defaults):
        raise ValueError("write it as (step, *, option: float = ...), returning losses (B,) and metrics")
    return ForwardObjective(function, "the user's own", name, old=True, reference=True)
