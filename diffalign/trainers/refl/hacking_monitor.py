"""Watches a training on a reward's gradient for hacking: what is measured at each evaluation, and when to stop."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffalign.evaluation.hacking import ALARM, plot_hacking
from diffalign.evaluation.heldout import EVALUATION_SEED
from diffalign.evaluation.sharpness import sharpness
from diffalign.models.weights import REFERENCE
from diffalign.rewards.base import Reward, RewardUnavailable, ask
from diffalign.rewards.support.isolation import said
from diffalign.rng import KeyedRNG
from diffalign.rollout.generate import NoiseKeys
from diffalign.rollout.sampler import SamplingPlan, ode_plan, sample
from diffalign.rollout.scoring import RewardWarning
from diffalign.runtime.loop import Metrics
from diffalign.runtime.state import indexed, restore
from diffalign.runtime.tracking import MetricsLog

if TYPE_CHECKING:
    from diffalign.trainers.refl.algorithm import ReFLTrainer

BEST = "best"
PROBES = 8  # prompts along whose samplings the distance to the reference is measured


class Watch:
    """Follows a trainer's evaluations.

    rewards: the trained ones. held_out: names of those that are not.

    Each evaluation adds ``reference_distance``, where there is a reference (full fine-tuning keeps none for it);
    ``sharpness/<reward>`` of the images shown; and ``alarm``, 1 where sharpness is ``alarm_factor`` times that of the
    base, or trained rewards are above the base and the watched figure is below it. With ``early_stopping`` the weights
    of the best evaluation are kept, and exported at the end.
    """

    def __init__(self, trainer: ReFLTrainer, rewards: Mapping[str, Reward], held_out: Sequence[str]) -> None:
        self.trainer, self.rewards, self.held_out = trainer, rewards, held_out
        self.base: Metrics = {}
        self.best_value, self.best_step, self.waited = -math.inf, 0, 0
        self.best: list[Tensor] = []
        args = trainer.args
        known = {*trainer.evaluation.rewards, "accuracy", "diversity"}
        if trainer.eval_prompts and args.watched not in known:
            raise ValueError(f"watch: {args.watched!r} is none of {', '.join(sorted(known))}")
        if args.early_stopping and not trainer.eval_prompts:
            raise ValueError("early_stopping needs evaluations: give eval_prompts")

    def __call__(self, step: int, figures: Metrics) -> Metrics:
        """What to add to the figures of an evaluation."""
        added = self._reference_distance()
        if self.trainer.args.sharpness_step and self.trainer.report.shown is not None:
            added |= self._sharpness()
        self.base = self.base or {**figures, **added}
        added[ALARM] = float(bool(causes := self._alarms({**figures, **added})))
        if causes and self.trainer.accelerator.is_main_process:
            warnings.warn(f"step {step}: {'; '.join(causes)}: the reward may be hacked", stacklevel=2)
        if self.trainer.args.early_stopping:
            self._judge(step, figures[self.trainer.args.watched])
        return added

    # Measures -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _reference_distance(self) -> Metrics:
        """How far outputs are from the reference's along the model's own samplings: relative root mean square."""
        trainer, model = self.trainer, self.trainer.model
        if not model.has_adapter and REFERENCE not in model.weights.names:
            return {}
        prompts = trainer.eval_prompts[:PROBES]
        conditioning, levels = trainer.encoded([p.text for p in prompts]), trainer.eval_levels
        place = torch.arange(len(prompts))
        noise = NoiseKeys(KeyedRNG(EVALUATION_SEED), "evaluation", 0, place, torch.zeros_like(place))
        states = [noise.start(model.latent_shape()).to(model.device)]
        ends = lambda index, result: states.append(result.x_next)  # noqa: E731
        with model.using(trainer.report.weight_set):
            route = SamplingPlan(ode_plan(len(levels) - 1), levels, trainer.guidance)
            sample(model, route, conditioning, states[0], observe=ends)
        sets = (trainer.report.weight_set, REFERENCE)
        own, others = (self._outputs(name, states[:-1], conditioning, levels) for name in sets)
        return {"reference_distance": ((own - others).square().mean() / others.square().mean()).sqrt().item()}

    def _outputs(self, name: str, states: Sequence[Tensor], conditioning: Any, levels: Any) -> Tensor:
        with self.trainer.model.using(name):
            guidance = self.trainer.guidance
            return torch.stack(
                [self.trainer.model.predict(x, levels[i], conditioning, guidance) for i, x in enumerate(states)]
            )

    def _sharpness(self) -> Metrics:
        """Sharpness of the images that the report shows, by the main process; NaN where a reward fails on them."""
        trainer, shown = self.trainer, self.trainer.report.shown
        assert shown is not None
        known = {prompt.text: prompt.metadata for prompt in trainer.eval_prompts}
        images = shown.images.to(trainer.accelerator.device)
        metadata, step = [known[text] for text in shown.texts], trainer.args.sharpness_step

        def measured(reward: Reward) -> float:
            try:
                return sharpness(lambda x: ask(reward, x, shown.texts, metadata)[0], images, step).mean().item()
            except (RewardUnavailable, torch.OutOfMemoryError):
                raise
            except Exception as error:  # rewards are user code: what they raise is unknown
                warnings.warn(f"no sharpness of reward {reward.name!r}: {said(error)}", RewardWarning, stacklevel=4)
                return math.nan

        return {f"sharpness/{name}": measured(reward) for name, reward in self.rewards.items()}

    def _alarms(self, figures: Metrics) -> list[str]:
        args, base = self.trainer.args, self.base
        found = [
            f"{name} is {figures[name]:.3g}, the base's was {base[name]:.3g}"
            for name in figures
            if name.startswith("sharpness/") and figures[name] > args.alarm_factor * base[name] > 0
        ]
        watched = args.watched
        rises = all(figures[name] > base[name] for name in self.rewards if name in figures)
        if watched not in self.rewards and rises and figures[watched] < base[watched]:
            change = f"{watched} fell from {base[watched]:.3g} to {figures[watched]:.3g}"
            found.append(f"trained rewards rose, and {change}")
        return found

    # Early stopping -------------------------------------------------------------------------------------------------

    def _judge(self, step: int, value: float) -> None:
        if value > self.best_value:
            self.best_value, self.best_step, self.waited = value, step, 0
            trainer = self.trainer
            with trainer.model.using(trainer.report.weight_set):
                self.best = [p.detach().clone() for p in trainer.model.weights.trainable]
            return
        self.waited += 1
        self.trainer.done = self.waited >= self.trainer.args.early_stopping

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint must hold."""
        plain = {
            "base": {name: None if math.isnan(value) else value for name, value in self.base.items()},
            "best_value": self.best_value if self.best else None,
            "best_step": self.best_step,
            "waited": self.waited,
        }
        return indexed(self.best), plain

    def restore(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Goes on from what ``state`` gave."""
        self.base = {name: math.nan if value is None else value for name, value in plain["base"].items()}
        self.best_step, self.waited = plain["best_step"], plain["waited"]
        if plain["best_value"] is not None:
            self.best_value = plain["best_value"]
            self.best = [torch.empty_like(p) for p in self.trainer.model.weights.trainable]
            restore(self.best, dict(tensors))
        self.trainer.done = 0 < self.trainer.args.early_stopping <= self.waited

    def use_best(self) -> bool:
        """Puts the best weights in the place of those that are exported; False where these are the last ones."""
        if not self.best or self.best_step == self.trainer.loop.step:
            return False
        self.trainer.model.weights.add(BEST, self.best)
        self.trainer.report.weight_set = BEST
        return True

    def draw(self) -> Path:
        """Draw ``hacking.png`` in the run folder."""
        folder = self.trainer.args.output_dir
        rows = MetricsLog.read(folder / "metrics.jsonl")
        plot_hacking(rows, folder / "hacking.png", list(self.rewards), self.held_out)
        return folder / "hacking.png"
