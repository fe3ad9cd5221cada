"""Configuration of forward-process RL."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar, Literal

from diffalign.config import option
from diffalign.diffusion.plan_config import PlanConfig
from diffalign.rollout.config import AdvantageConfig, RolloutConfig
from diffalign.trainers.forward_rl.lag import LagConfig
from diffalign.trainers.forward_rl.presets import LAG_FIELDS, Method, changeable, resolve

GRIDS = ("grid", "stratified", "stratified_with_first", "stratified_all")


@dataclasses.dataclass(kw_only=True)
class ForwardRLConfig(AdvantageConfig, RolloutConfig):
    """Configuration of forward-process RL. ``validate`` refuses combinations that cannot train.

    A preset of ``presets.PRESETS`` chooses the method; a field that is None keeps the preset's value.
    """

    usage: ClassVar[str] = "diffalign train forward_rl --config FILE.yaml [--field VALUE ...] [--dry_run]"
    examples: ClassVar[tuple[str, ...]] = (
        "diffalign train forward_rl --config configs/forward_rl/shapes.yaml --max_train_steps 50",
        "diffalign train forward_rl --model stabilityai/stable-diffusion-3.5-medium --train_prompts prompts.txt "
        "--rewards pickscore --preset nft --dry_run",
    )
    essential: ClassVar[tuple[str, ...]] = (
        "model", "train_prompts", "rewards", "preset", "output_dir", "max_train_steps", "learning_rate", "lora.rank",
        "num_groups", "group_size",
    )  # fmt: skip

    plan: PlanConfig = option(
        PlanConfig("ode"), "solver of the rollout's steps; any plan, because no density is needed", section="sampling"
    )
    shared_start: bool = option(False, "start the images of a group from the same noise", section="sampling")
    sample_lag: LagConfig = option(LagConfig(), "lag of the weights that sample", section="sampling")
    train_batch_size: int = option(
        64, "images per forward pass while training", section="optimizer", resume="free", ge=1
    )
    train_times_per_forward: int = option(
        1,
        "times of each image in one forward pass; more pay off with few images per pass, or with shards",
        section="optimizer",
        resume="free",
        ge=1,
        le=1000,
    )

    preset: str = option("nft", "method: nft, awm, epg, pepg, par, v_grpo, dgpo, crd or ram", section="loss")
    objective: str | None = option(
        None, "loss: a preset's name, or file.py:function or module:function; default: the preset's", section="loss"
    )
    objective_options: dict[str, float] = option(
        {}, "options of the objective, e.g. {beta: 0.1}", section="loss", infinite=True
    )
    estimator: Literal["uniform", "t", "t2", "adaptive", "adaptive_output", "exact", "huber", "ghuber"] | None = option(
        None, "weighting of the denoising error that stands for a log-likelihood", section="loss"
    )
    trust_region: Literal["clip", "quadratic", "dppo", "kl"] | None = option(
        None,
        "what bounds the ratios of awm and v_grpo to 1 +- clip_range: clip, a quadratic penalty, dropped images of "
        "large divergence (dppo), or a KL penalty; clip_range bounds the divergence for the last two",
        section="loss",
    )
    old_lag: LagConfig = option(LagConfig(), "lag of the weights that the objective compares with", section="loss")
    times: (
        Literal["grid", "stratified", "stratified_with_first", "stratified_all", "logit_normal", "uniform"] | None
    ) = option(
        None,
        "training times: the rollout's own, permuted (grid) or in strata, of all but the noisiest, with the noisiest "
        "always, or of all; or continuous ones in strata",
        section="loss",
    )
    num_times: int | None = option(
        None, "times per image; 0: all of the grid, -1: all but one", section="loss", ge=-10_000, le=10_000
    )
    time_fraction: float | None = option(
        None, "share of the rollout's steps, from the noisiest, that times are taken from", section="loss", gt=0, le=1
    )
    time_mean: float | None = option(None, "mean of the time's logit, for logit_normal", section="loss", infinite=False)
    time_std: float | None = option(None, "standard deviation of the time's logit", section="loss", gt=0)
    time_min: float | None = option(None, "smallest continuous time, as a share of all", section="loss", gt=0, lt=1)
    time_shift: float | None = option(
        None, "shift of continuous times towards noise; 1: none", section="loss", gt=0, le=1000
    )
    share_times: Literal["image", "group", "iteration"] | None = option(
        None, "share times within: each image alone, its group, or the iteration", section="loss"
    )
    share_noise: Literal["image", "group"] | None = option(
        None, "share noise within: each image alone, or its group", section="loss"
    )
    reference_weight: float | None = option(
        None, "weight of the squared distance from the base model's output; 0: no such pass", section="loss", ge=0
    )
    reference_weight_min: float | None = option(
        None,
        "its weight for the images of the lowest reward, from which it grows with the advantage; default: the "
        "preset's, else one weight for all",
        section="loss",
        ge=0,
        infinite=False,
    )
    reference_guidance: float | None = option(
        None, "guidance scale of the base model's output, which the policy then learns", section="loss", ge=0
    )
    ema_weight: float | None = option(
        None, "weight of the squared distance from a lagged copy's output; 0: no such copy", section="loss", ge=0
    )
    ema_lag: LagConfig = option(LagConfig(), "lag of the copy that ema_weight anchors to", section="loss")
    anchor_weighting: Literal["uniform", "elbo"] | None = option(
        None, "weighting of these distances over times; elbo: 1 / (2 sigma^2) of AWM", section="loss"
    )
    advantage_std: Literal["group", "global", "unit"] | None = option(  # type: ignore[assignment]
        None,
        "standard deviation to divide advantages by: of each group, the iteration, or 1 (unit); default: the preset's",
        section="advantages",
    )
    advantage_mode: Literal["all", "positive", "negative", "one", "binary"] | None = option(
        None, "advantages to use: all, of one sign, 1 for positive ones and else 0, or the sign", section="advantages"
    )
    advantage_scale: float | None = option(
        None, "factor of advantages, after they are bounded", section="advantages", gt=0, infinite=False
    )
    filter_zero_advantage: bool = option(
        True, "skip images with zero advantage, where they have no gradient", section="loss"
    )

    @property
    def method(self) -> Method:
        """The preset with the fields that are set."""
        changes = {name: value for name in changeable() if (value := getattr(self, name)) is not None}
        lags = {name: getattr(self, name) for name in LAG_FIELDS}
        return resolve(self.preset, changes, self.objective_options, lags)

    @property
    def normalisation(self) -> Literal["group", "global", "unit"]:
        """What advantages are divided by."""
        return self.method.advantage_std  # type: ignore[return-value]

    @property
    def grid_steps(self) -> int:
        """Number of the rollout's steps that times on a grid are taken from."""
        return max(1, int(self.plan.num_steps * self.method.time_fraction + 1e-9))

    @property
    def times_per_image(self) -> int:
        """Number of times at which each image is trained."""
        number, method = self.method.num_times, self.method
        if number > 0:
            return number
        candidates = self.grid_steps - (method.times == "stratified")
        return candidates + number

    def unread(self) -> Mapping[str, str]:
        """Fields that a run of this configuration does not read: see ``TrainerConfig``."""
        from diffalign.losses.registry import get_forward_objective

        method = self.method
        objective = get_forward_objective(method.objective, self.allow_reward_code)
        chains = "read only by trainers that sample trees, and this one samples chains"
        names = {**super().unread(), "plan.branch": chains, "advantage_rule": chains}
        if not objective.estimator:
            names["estimator"] = f"objective {method.objective!r} weighs errors itself"
        options = objective.resolve(method.objective_options)
        if not any(objective.wants(need, options) for need in ("old", "statistic_old")):
            names["old_lag"] = f"objective {method.objective!r} compares with no lagged weights"
        if not objective.regions:
            names["trust_region"] = f"read only by clipped ratios, awm and v_grpo, unlike {method.objective!r}"
        if not objective.skips_zero(options) or method.reference_weight or method.ema_weight:
            names["filter_zero_advantage"] = "images with zero advantage have a gradient in this method"
        if method.times in GRIDS:
            names |= dict.fromkeys(("time_min", "time_shift"), "read only with times: logit_normal or uniform")
        else:
            names["time_fraction"] = "read only with times on the rollout's grid"
        if method.times != "logit_normal":
            names |= dict.fromkeys(("time_mean", "time_std"), "read only with times: logit_normal")
        if not method.ema_weight:
            names["ema_lag"] = "read only with an ema_weight above 0"
        if not method.reference_weight:
            anchored = ("reference_guidance", "reference_weight_min")
            names |= dict.fromkeys(anchored, "read only with a reference_weight above 0")
        if not (method.reference_weight or method.ema_weight):
            names["anchor_weighting"] = "read only with a reference_weight or an ema_weight above 0"
        if method.advantage_std == "unit":
            names["advantage_epsilon"] = "read only where advantages are divided by a standard deviation"
        return names

    def validate(self) -> None:
        """Check field combinations. Raises ValueError with a suggested fix; does no I/O."""
        self.check()
        _ = self.method  # an unknown preset, before what it does not read
        super().validate()
        self._validate_start()
        self._validate_times()
        self._validate_objective()

    def _validate_start(self) -> None:
        from diffalign.diffusion.plan import possible_plans

        plans = possible_plans(self.plan)
        if self.shared_start and not all(any(row.noise_level for row in plan.rows) for plan in plans):
            raise ValueError("images that start alike and draw no noise are all the same: set shared_start: false")

    def _validate_times(self) -> None:
        method, count = self.method, self.times_per_image
        if method.times not in GRIDS:
            if method.num_times < 1:
                raise ValueError(f"num_times {method.num_times}: continuous times have no grid; give at least 1")
            return
        candidates = self.grid_steps - (method.times == "stratified")
        if not 1 <= count <= candidates:
            raise ValueError(
                f"num_times {method.num_times}: times {method.times!r} has {candidates} of plan.num_steps "
                f"{self.plan.num_steps} steps to choose from; give 1 to {candidates}, or raise time_fraction"
            )

    def _validate_objective(self) -> None:
        from diffalign.losses.forward import check_options
        from diffalign.losses.registry import FORWARD_OBJECTIVES, get_forward_objective

        method, objective = self.method, get_forward_objective(self.method.objective)
        options = objective.resolve(method.objective_options)
        if objective is FORWARD_OBJECTIVES.get(method.objective):
            check_options(objective, options)
        self._validate_anchor()
        for name in ("sample_lag", "old_lag", "ema_lag"):
            if getattr(method, name).maximum >= 1:
                raise ValueError(f"{name}.maximum must be below 1: the copy would never move")
        if method.ema_weight and method.ema_lag.follows(self.updates_per_rollout):  # type: ignore[union-attr]
            raise ValueError(
                "ema_lag current is the policy itself, which anchors nothing: give a lag, or ema_weight: 0"
            )

    def _validate_anchor(self) -> None:
        low, weight = self.method.reference_weight_min, self.method.reference_weight
        if low is None or not weight:
            return
        if low > weight:
            raise ValueError(
                f"reference_weight_min {low:g} is above reference_weight {weight:g}, to which it grows with the "
                "advantage: lower it, or raise reference_weight"
            )
        if not math.isfinite(self.advantage_clip):
            raise ValueError(
                "reference_weight_min needs a finite advantage_clip, at which the anchor has its full weight: give one"
            )
