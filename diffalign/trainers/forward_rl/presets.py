"""Presets of forward-process RL: a published method is a row of a table, and every cell can be overridden."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from diffalign.trainers.forward_rl.lag import Lag, LagConfig


@dataclass(frozen=True)
class Method:
    """Options of forward-process RL; every published method is one combination.

    Attributes:
        objective: Name of a forward objective.
        objective_options: Its options.
        estimator: Stand-in for log-likelihoods.
        times: "grid": the rollout's own times, permuted; "stratified": one of them per stratum,
            without the noisiest; "stratified_with_first": the noisiest, and one per stratum of the others;
            "stratified_all": one per stratum of all; "logit_normal", "uniform": continuous, one per stratum.
        num_times: Times per image; 0: all of a grid, -1: all but one.
        time_fraction: Share of the rollout's steps, from the noisiest, that times are taken from.
        time_mean: Mean of the logit of the time, for "logit_normal".
        time_std: Its standard deviation.
        time_min: Smallest continuous time.
        time_shift: Shift s of continuous times, s t / (1 + (s - 1) t).
        share_times: Whose times are equal: "image" (none are), "group" or "iteration".
        share_noise: Whose noise is equal: "image" (none is) or "group".
        sample_lag: Lag of the weights that sample.
        old_lag: Lag of the weights that the objective compares with.
        ema_lag: Lag of the weights that anchor the policy.
        ema_weight: Weight of |v - v_ema|^2.
        reference_weight: Weight of |v - v_ref|^2.
        reference_weight_min: Its weight for the images of the lowest reward; it grows linearly with the advantage.
            None: one weight for all.
        anchor_weighting: Weighting of both over times: "uniform" or "elbo", see ``losses.forward.anchor_weight``.
        reference_guidance: Guidance scale of v_ref, which the policy then learns; None: no guidance.
        advantage_mode: "all", "positive", "negative", "one" (1 where positive, else 0) or "binary" (the sign).
        advantage_scale: Factor of advantages.
        advantage_std: What advantages are divided by: "group", "global" or "unit" (by 1).
        trust_region: What bounds ratios: "clip", "quadratic", "dppo" or "kl", see ``losses.policy``.
    """

    objective: str = "nft"
    objective_options: Mapping[str, float] = field(default_factory=dict)
    estimator: str = "adaptive"
    times: str = "grid"
    num_times: int = -1
    time_fraction: float = 1.0
    time_mean: float = 0.0
    time_std: float = 1.0
    time_min: float = 0.01
    time_shift: float = 1.0
    share_times: str = "image"
    share_noise: str = "image"
    sample_lag: str | Lag = "current"
    old_lag: str | Lag = "current"
    ema_lag: str | Lag = "linear"
    ema_weight: float = 0.0
    reference_weight: float = 0.0
    reference_weight_min: float | None = None
    anchor_weighting: str = "uniform"
    reference_guidance: float | None = None
    advantage_mode: str = "all"
    advantage_scale: float = 1.0
    advantage_std: str = "global"
    trust_region: str = "clip"


_LAGGED = {"sample_lag": "type1", "old_lag": "type1"}
# The authors' ELBO methods: A = 0.1 (R - mean), the ratio of their alpha and beta.
_ELBO = Method(**_LAGGED, reference_weight=1e-4, advantage_scale=0.1, advantage_std="unit")  # type: ignore[arg-type]

PRESETS: dict[str, Method] = {
    "nft": Method(**_LAGGED, reference_weight=1e-4),  # type: ignore[arg-type]
    "awm": Method(
        "awm", estimator="ghuber", times="stratified", num_times=6, time_fraction=0.9, ema_weight=1.0,
        reference_weight=1e-3, advantage_scale=0.2,
    ),
    "epg": replace(_ELBO, objective="epg"),
    "pepg": replace(_ELBO, objective="pepg"),
    "par": replace(_ELBO, objective="par"),
    "v_grpo": Method("v_grpo", times="uniform", num_times=4, share_times="group", share_noise="group"),
    # Four of the steps 0 to 6 of ten.
    "dgpo": Method(
        "dgpo", {"beta": 100.0, "clip_range": 0.01}, estimator="uniform", num_times=4, time_fraction=0.7,
        share_times="iteration", share_noise="group", sample_lag="dgpo_sampling", old_lag="dgpo",
        reference_weight=0.02,
    ),
    # As in Flow-Factory, whose 20 times are among the first 9 of 10 steps, each about twice; here they are continuous.
    "crd": Method(
        "crd", {"scale": 5.0}, estimator="adaptive_output", times="uniform", num_times=20, time_shift=3.0,
        sample_lag="type2", old_lag="crd_old", reference_weight=0.1, reference_weight_min=1e-4,
        reference_guidance=4.5, advantage_scale=0.1,
    ),
    # Multiplier and lag are not published in what was at hand.
    "ram": Method("ram", **_LAGGED),  # type: ignore[arg-type]
}  # fmt: skip

LAG_FIELDS = ("sample_lag", "old_lag", "ema_lag")


def changeable() -> list[str]:
    """List the fields of ``Method`` that a configuration has by the same name, None for the preset's value."""
    return [one.name for one in fields(Method) if one.name not in (*LAG_FIELDS, "objective_options")]


def resolve(
    preset: str, changes: Mapping[str, Any], options: Mapping[str, float], lags: Mapping[str, LagConfig]
) -> Method:
    """Merge a preset with what is set.

    Args:
        preset: A key of ``PRESETS``.
        changes: Values of ``changeable`` fields.
        options: Options of the objective; they add to the preset's, unless the objective is another one.
        lags: Each of ``LAG_FIELDS``.

    Raises:
        ValueError: An unknown preset or lag.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; use one of {', '.join(PRESETS)}")
    base = PRESETS[preset]
    same = changes.get("objective", base.objective) == base.objective
    resolved: dict[str, Any] = {name: lag.resolve(getattr(base, name)) for name, lag in lags.items()}
    merged = {**(base.objective_options if same else {}), **options}
    return replace(base, **changes, **resolved, objective_options=merged)
