"""Monitor a training on reward gradients for reward hacking: metrics at each evaluation, and early stopping."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.evaluation.hacking import ALARM, panel_alarm, plot_hacking
from diffalign.evaluation.heldout import EVALUATION_SEED
from diffalign.evaluation.sharpness import sharpness
from diffalign.models.weights import REFERENCE
from diffalign.rewards.base import Reward, RewardUnavailable, ask
from diffalign.rewards.support.isolation import said
from diffalign.rng import KeyedRNG
from diffalign.rollout.generate import NoiseKeys
from diffalign.rollout.sampler import SamplingPlan, sample
from diffalign.rollout.scoring import RewardWarning
from diffalign.runtime.interfaces import Metrics, State
from diffalign.runtime.run import Run
from diffalign.runtime.state import indexed, restore
from diffalign.runtime.tracking import MetricsLog
from diffalign.structures import Conditioning
from diffalign.trainers.algorithm import Evaluated
from diffalign.trainers.inputs import Inputs
from diffalign.trainers.refl.config import ReFLConfig

BEST = "best"
PROBES = 8  # prompts along whose samplings the distance to the reference is measured


class HackingMonitor:
    """Follow a training's evaluations.

    Each evaluation adds ``reference_distance``, where there is a reference (full fine-tuning keeps none for it);
    ``sharpness/<reward>`` of the images shown; and ``alarm``, 1 where sharpness is ``alarm_factor`` times that of the
    base, or trained rewards are above the base and the watched figure is below it. With ``early_stopping`` the weights
    of the best evaluation are kept, and exported at the end.

    Attributes:
        done: Whether early stopping ends the run.

    Raises:
        ValueError: The watched figure does not exist, or early stopping has no evaluations.
    """

    def __init__(self, run: Run[ReFLConfig], inputs: Inputs[ReFLConfig]) -> None:
        self.run, self.inputs, self.config, self.model = run, inputs, run.config, run.model
        self.base: Metrics = {}
        self.best_value, self.best_step, self.waited = -math.inf, 0, 0
        self.best: list[Tensor] = []
        self.done = False
        known, watched = {*inputs.eval_rewards, "accuracy", "diversity"}, self.config.watched
        if inputs.eval_prompts and watched not in known:
            raise ValueError(f"watch: {watched!r} is none of {', '.join(sorted(known))}")
        if self.config.early_stopping and not inputs.eval_prompts:
            raise ValueError("early_stopping needs evaluations: give eval_prompts")

    def __call__(self, evaluated: Evaluated, plan: SamplingPlan) -> Metrics:
        """Return the metrics to add to an evaluation. plan: how it sampled."""
        figures = evaluated.figures
        added = self._reference_distance(evaluated, plan)
        if self.config.sharpness_step and self.run.is_main:
            added |= self._sharpness(evaluated)
        self.base = self.base or {**figures, **added}
        added[ALARM] = float(bool(causes := self._alarms({**figures, **added})))
        if causes and self.run.is_main:
            warnings.warn(f"step {evaluated.step}: {'; '.join(causes)}: the reward may be hacked", stacklevel=2)
        if self.config.early_stopping:
            self._judge(evaluated, figures[self.config.watched])
        return added

    # Measures -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _reference_distance(self, evaluated: Evaluated, plan: SamplingPlan) -> Metrics:
        """Return the relative root mean square distance of outputs to the reference's, along the model's samplings."""
        model = self.model
        if not model.has_adapter and REFERENCE not in model.weights.names:
            return {}
        prompts = evaluated.prompts[:PROBES]
        conditioning = self.run.prompts([p.input for p in prompts])
        index = torch.arange(len(prompts))
        keys = NoiseKeys(KeyedRNG(EVALUATION_SEED), "evaluation", 0, index, torch.zeros_like(index))
        states = [keys.start(model.latent_shape()).to(model.device)]
        ends = lambda index, result: states.append(result.x_next)  # noqa: E731
        plan = SamplingPlan(plan.plan, plan.levels, plan.guidance)  # the policy samples every step
        with model.using(evaluated.weight_set):
            sample(model, plan, conditioning, states[0], observe=ends)
        sets = (evaluated.weight_set, REFERENCE)
        own, others = (self._outputs(name, states[:-1], conditioning, plan) for name in sets)
        return {"reference_distance": ((own - others).square().mean() / others.square().mean()).sqrt().item()}

    def _outputs(self, name: str, states: Sequence[Tensor], conditioning: Conditioning, plan: SamplingPlan) -> Tensor:
        with self.model.using(name):
            return torch.stack(
                [self.model.predict(x, plan.levels[i], conditioning, plan.guidance) for i, x in enumerate(states)]
            )

    def _sharpness(self, evaluated: Evaluated) -> Metrics:
        """Return the sharpness of the images shown; NaN where a reward fails on them."""
        shown = evaluated.shown
        images = shown.images.to(self.run.accelerator.device)
        metadata, step = [prompt.metadata for prompt in shown.prompts], self.config.sharpness_step

        def measured(reward: Reward) -> float:
            try:
                return sharpness(lambda x: ask(reward, x, shown.texts, metadata)[0], images, step).mean().item()
            except (RewardUnavailable, torch.OutOfMemoryError):
                raise
            except Exception as error:  # rewards are user code: what they raise is unknown
                warnings.warn(f"no sharpness of reward {reward.name!r}: {said(error)}", RewardWarning, stacklevel=4)
                return math.nan

        return {f"sharpness/{name}": measured(reward) for name, reward in self.inputs.rewards.items()}

    def _alarms(self, figures: Metrics) -> list[str]:
        config, base, rewards = self.config, self.base, self.inputs.rewards
        found = [
            f"{name} is {figures[name]:.3g}, the base's was {base[name]:.3g}"
            for name in figures
            if name.startswith("sharpness/") and figures[name] > config.alarm_factor * base[name] > 0
        ]
        watched = config.watched
        rises = all(figures[name] > base[name] for name in rewards if name in figures)
        if watched not in rewards and rises and figures[watched] < base[watched]:
            change = f"{watched} fell from {base[watched]:.3g} to {figures[watched]:.3g}"
            found.append(f"trained rewards rose, and {change}")
        panel = panel_alarm(base, figures, list(rewards), self.inputs.held_out)
        return [*found, panel] if panel and len(self.inputs.held_out) > 1 else found

    # Early stopping -------------------------------------------------------------------------------------------------

    def _judge(self, evaluated: Evaluated, value: float) -> None:
        if value > self.best_value:
            self.best_value, self.best_step, self.waited = value, evaluated.step, 0
            with self.model.using(evaluated.weight_set):
                self.best = [p.detach().clone() for p in self.model.weights.trainable]
            return
        self.waited += 1
        self.done = self.waited >= self.config.early_stopping

    def best_weights(self) -> tuple[int, str] | None:
        """Return (step, weight set) of the best weights; None where these are the last ones, or none were kept."""
        if not self.best or self.best_step == self.run.progress.step:
            return None
        self.model.weights.add(BEST, self.best)
        return self.best_step, BEST

    def state_dict(self) -> State:
        """Return the base's figures, and the best weights."""
        plain: dict[str, Any] = {
            "base": {name: None if math.isnan(value) else value for name, value in self.base.items()},
            "best_value": self.best_value if self.best else None,
            "best_step": self.best_step,
            "waited": self.waited,
        }
        return indexed(self.best), plain

    def load_state_dict(self, state: State) -> None:
        """Restore what ``state_dict`` returned."""
        tensors, plain = state
        self.base = {name: math.nan if value is None else value for name, value in plain["base"].items()}
        self.best_step, self.waited = plain["best_step"], plain["waited"]
        if plain["best_value"] is not None:
            self.best_value = plain["best_value"]
            self.best = [torch.empty_like(p) for p in self.model.weights.trainable]
            restore(self.best, dict(tensors))
        self.done = 0 < self.config.early_stopping <= self.waited

    def plot(self, folder: Path) -> Path:
        """Draw ``hacking.png`` in the run folder."""
        rows = MetricsLog.read(folder / "metrics.jsonl")
        plot_hacking(rows, folder / "hacking.png", list(self.inputs.rewards), self.inputs.held_out)
        return folder / "hacking.png"
