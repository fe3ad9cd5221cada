"""Sources of step-wise preference: children of one state (SPO, TailorPO), and the steps of whole paths (D3PO).

SPO (arXiv 2406.04314): a path per prompt; from ``first_step`` on each state has ``group_size`` children, whose
predicted clean images are scored; the best and the worst are a pair, and a random child goes on. TailorPO (arXiv
2502.01667): the winner goes on; TailorPO-G first moves it along the gradient of its reward, x_w += nudge dr/dx. D3PO
(arXiv 2311.13231): two images of a prompt are a pair at each of their steps.

Rewards find the time of the state that predicted an image, in units of the model's timesteps, under "time" in their
metadata, so that a step-aware preference model can be one of them. Finished images of evaluations have no time: read it
with ``metadata[i].get("time", 0)``.

Departures from the papers:
1. SPO's released code keeps pairs with softmax(scores) further apart than 0.3 (SDXL: 0.4); here it is the score gap,
   ``data.rollouts.min_gap``: 2 artanh(0.3) = 0.62 (0.85).
2. Rewards other than a step-aware preference model see the predicted clean image; early ones say little.
3. A path ends at the last compared step: the finished image is not needed.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from diffalign.data.rollouts import pick_pairs
from diffalign.diffusion.parameterization import to_x0
from diffalign.diffusion.plan import make_plan
from diffalign.models.offload import VAE
from diffalign.rewards.base import Reward, RewardUnavailable, ask, wanted
from diffalign.rollout.advantages import weighted_total
from diffalign.rollout.collector import Collector, Rollout
from diffalign.rollout.generate import NoiseKeys, decode
from diffalign.rollout.sampler import SamplingPlan, Solver, micro_batches
from diffalign.rollout.scoring import RewardWarning, check_unscored, score
from diffalign.runtime.diagnosis import extremes
from diffalign.runtime.interfaces import IterationBatch
from diffalign.runtime.run import Run
from diffalign.structures import Conditioning, Prompt
from diffalign.trainers.diffusion_dpo.batches import PreferenceBatch, RolloutSource, Source, padded_weights
from diffalign.trainers.diffusion_dpo.config import DiffusionDPOConfig
from diffalign.trainers.diffusion_dpo.step_pairs import StepExamples, compared_steps


@dataclass
class SiblingPaths(IterationBatch):
    """This process's paths, one per prompt, with the children of their S compared states.

    Attributes:
        x: (P, S, C, *spatial), the states.
        children: (P, S, G, C, *spatial); with a nudge, the winner after it.
        rewards: Name -> (P, S, G), of the children's predicted clean images; NaN where a reward failed.
        iteration: Index of the iteration.
        started: Time at which sampling began.
    """

    iteration: int
    x: Tensor
    children: Tensor
    rewards: dict[str, Tensor] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the paths as they were sampled by the policy from the start of the iteration."""
        return {"x": self.x, "children": self.children} | {f"reward/{n}": r for n, r in self.rewards.items()}


class SiblingSource(Source):
    """Pairs of children of one state.

    Args:
        run: The training.
        collector: Prompts, rewards and levels.
    """

    def __init__(self, run: Run[DiffusionDPOConfig], collector: Collector) -> None:
        self.run, self.config, self.model, self.collector = run, run.config, run.model, collector
        self.method, self.pairing = run.config.siblings.resolve(), run.config.data.rollouts
        self.weights = self.pairing.rewards or collector.weights
        self.own = torch.tensor(run.share(run.config.num_groups))

    def sample(self, iteration: int) -> PreferenceBatch:
        """Sample this process's paths; children are scored on the way, because the next step depends on it."""
        steps, plan = self._steps(iteration), self._plan(iteration)
        prompts = [self.collector.prompts_of(iteration)[group] for group in self.own.tolist()]
        conditioning = self.run.prompts([prompt.input for prompt in prompts])
        family, shape = self.config.group_size, self.model.latent_shape()
        device = self.model.device
        paths = SiblingPaths(
            iteration,
            torch.empty(len(prompts), len(steps), *shape, device=device),
            torch.empty(len(prompts), len(steps), family, *shape, device=device),
            {name: torch.empty(len(prompts), len(steps), family) for name in self.collector.rewards},
        )
        with self.model.keeping(VAE):
            for rows in micro_batches(len(prompts), max(1, self.config.rollout_batch_size // family)):
                keys = NoiseKeys(self.run.rng, "rollout", iteration, self.own[rows], torch.zeros_like(self.own[rows]))
                sampler = PathSampler(self, plan, conditioning[rows], prompts[rows], keys)
                sampler.run(steps, paths, rows)
        return PreferenceBatch(rollout=paths)

    def rank(self, batch: PreferenceBatch) -> None:
        """Pair the children of each state by their scores, and log statistics of the rewards."""
        paths = batch.rollout
        assert isinstance(paths, SiblingPaths)
        metrics = self._statistics(paths)
        if metrics["unscored"] and not paths.children.isfinite().all():
            raise self.run.diverged("the model's images are not finite")  # no fault of the rewards
        check_unscored(metrics["unscored"], self.config.max_unscored, extremes(self.config))
        batch.examples, pairs = self._examples(paths)
        judged = self.config.num_groups * paths.children.shape[1] * paths.children.shape[2]
        rate = judged / (time.perf_counter() - paths.started)
        batch.metrics = metrics | {"pairs": float(pairs), "images_per_second": rate}

    def restored(self, iteration: int, tensors: Mapping[str, Tensor]) -> PreferenceBatch:
        """Rebuild the paths and their examples."""
        own = {name: tensor.chunk(self.run.world)[self.run.rank] for name, tensor in tensors.items()}
        rewards = {name: own[f"reward/{name}"].cpu() for name in self.collector.rewards}
        states = own["x"].to(self.model.device), own["children"].to(self.model.device)
        paths = SiblingPaths(iteration, *states, rewards)
        return PreferenceBatch(self._examples(paths)[0], paths)

    def total(self, rewards: Mapping[str, Tensor]) -> Tensor:
        """Sum the rewards that pairs are ranked by; NaN where one failed."""
        return weighted_total(rewards, self.weights)

    def _steps(self, iteration: int) -> tuple[int, ...]:
        return compared_steps(self.config.plan, self.method, self.config.seed, iteration)

    def _plan(self, iteration: int) -> SamplingPlan:
        plan = make_plan(self.config.plan, iteration, self.config.seed)
        return SamplingPlan(plan, self.collector.levels, self.run.guidance)

    def _examples(self, paths: SiblingPaths) -> tuple[StepExamples, int]:
        """Return the pairs of this process, padded to as many as every other has, and how many all have."""
        steps, prompts = self._steps(paths.iteration), self.collector.prompts_of(paths.iteration)
        states, family = len(paths.x) * len(steps), self.config.group_size
        scores = self.total(paths.rewards).flatten().tolist()
        families = [index // family for index in range(states * family)]
        pairs = pick_pairs(families, scores, self.pairing)
        weight, everyone = padded_weights(self.run, len(pairs), len(pairs))

        chosen = [(pairs or [(0, 0)])[index % max(len(pairs), 1)] for index in range(len(weight))]
        state = torch.tensor([better // family for better, _ in chosen])
        group = self.own[state // len(steps)]
        # A number identifies a pair among all of the iteration: state and the two children, as digits.
        number = group * len(steps) + state % len(steps)
        digits = [
            n * family**2 + b % family * family + w % family for n, (b, w) in zip(number.tolist(), chosen, strict=True)
        ]
        return StepExamples(
            paths.x.flatten(0, 1)[state][:, None],
            paths.children.flatten(0, 2)[torch.tensor(chosen)],
            torch.tensor(steps)[state % len(steps)],
            torch.tensor([self.pairing.label(scores[better] - scores[worse]) for better, worse in chosen]),
            [prompts[index].input for index in group.tolist()],
            digits,
            weight,
            self._plan(paths.iteration),
        ), everyone

    def _statistics(self, paths: SiblingPaths) -> dict[str, float]:
        """Return statistics of the rewards of all processes' predicted clean images."""
        own = torch.stack([paths.rewards[name].flatten() for name in self.collector.rewards], 1)
        table = self.run.gather(own.contiguous())
        rewards = dict(zip(self.collector.rewards, table.T, strict=True))
        total = weighted_total({name: values.double() for name, values in rewards.items()}, self.collector.weights)
        finite = total[~total.isnan()]
        return {
            "reward/mean": finite.mean().item(),
            "reward/std": finite.std(correction=0).item() if len(finite) else torch.nan,
            **{f"reward/{name}": values.nanmean().item() for name, values in rewards.items()},
            "unscored": 1 - len(finite) / len(total),
        }


@dataclass
class PathSampler:
    """Sample the paths of a micro-batch of prompts, and the children of their compared states."""

    source: SiblingSource
    plan: SamplingPlan
    conditioning: Conditioning
    prompts: Sequence[Prompt]
    keys: NoiseKeys

    def run(self, steps: Sequence[int], paths: SiblingPaths, rows: slice) -> None:
        """Write states, children and rewards to rows of ``paths``."""
        model, shape = self.source.model, self.source.model.latent_shape()
        count, solver = len(self.prompts), Solver(self.plan, model.parameterization)
        x = self.keys.start(shape).to(model.device, non_blocking=True)
        output = self._predict(x, 0)
        taken = torch.empty(count, 0, dtype=torch.int64)  # the child of each compared state that went on

        for index in range(steps[-1] + 1):
            self.source.run.heartbeat(collective=True)
            family = self.source.config.group_size if index in steps else 1
            keys = self._children_keys(taken, family if index in steps else None)
            noise = keys.step(shape, index).to(model.device) if self.plan.plan.rows[index].noise_level else None
            parents = x.repeat_interleave(family, 0), output.repeat_interleave(family, 0)
            before, x = x, solver.step(*parents, index, noise=noise).x_next
            output = self._predict(x, index + 1)
            if index not in steps:
                continue

            column, alone = steps.index(index), torch.arange(count)
            rewards = self._score(x, output, index + 1)
            chosen, best = self._survivors(self.source.total(rewards).view(count, family), index)
            children = x.reshape(count, family, *shape)
            output = output.reshape(count, family, *shape)[alone, chosen]
            if self.source.method.nudge:
                children[alone, best] = self.nudged(children[alone, best], index + 1)
            x = children[alone, chosen]
            if self.source.method.nudge and index < steps[-1]:
                output = self._predict(x, index + 1)
            paths.x[rows, column], paths.children[rows, column] = before, children
            for name, values in paths.rewards.items():
                values[rows, column] = rewards[name].view(count, family)
            taken = torch.cat([taken, chosen[:, None]], 1)

    def _children_keys(self, taken: Tensor, family: int | None) -> NoiseKeys:
        """Return the keys of the noise of children: the path to each, with its index if its parent has several."""
        repeats, path = family or 1, taken.repeat_interleave(family or 1, 0)
        if family is not None:
            path = torch.cat([path, torch.arange(family).repeat(len(taken))[:, None]], 1)
        group, sample = (key.repeat_interleave(repeats) for key in (self.keys.group, self.keys.sample))
        return replace(self.keys, group=group, sample=sample, path=path)

    @torch.no_grad()
    def _predict(self, x: Tensor, index: int) -> Tensor:
        """Evaluate the policy at a level, in micro-batches; the children of a state are consecutive."""
        model, each = self.source.model, len(x) // len(self.prompts)
        guidance = model.resolve_guidance(self.plan.guidance)
        own = self.conditioning[torch.arange(len(x)) // each]
        parts = micro_batches(len(x), self.source.config.rollout_batch_size)
        return torch.cat([model.predict(x[part], self.plan.levels[index], own[part], guidance) for part in parts])

    def asked(self, index: int) -> list[Prompt]:
        """Return the prompts with the time of the level in their metadata."""
        time = float(self.plan.levels[index].time)
        return [replace(prompt, metadata={**prompt.metadata, "time": time}) for prompt in self.prompts]

    def _score(self, x: Tensor, output: Tensor, index: int) -> dict[str, Tensor]:
        """Score the predicted clean images of children: name -> (b,)."""
        source, level, family = self.source, self.plan.levels[index], len(x) // len(self.prompts)
        clean = to_x0(source.model.parameterization, x, output, level)
        images = decode(source.model, clean, source.config.decode_dtype) if source.collector.decodes else None
        prompts = [prompt for prompt in self.asked(index) for _ in range(family)]
        groups = torch.arange(len(x)) // family
        found = score(source.collector.rewards, images, prompts, groups, clean)
        return {name: found[name] for name in source.collector.rewards}

    def ask(
        self,
        reward: Reward,
        images: Tensor | None,
        latents: Tensor,
        texts: list[str],
        metadata: list[Mapping[str, Any]],
    ) -> Tensor:
        """Score images or latents with a gradient."""
        return ask(reward, wanted(reward, images, latents), texts, metadata)[0]

    def _survivors(self, totals: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Return the child of each family that goes on, and the best child: (b,), (b,)."""
        best = totals.nan_to_num(nan=-torch.inf).argmax(1)
        if self.source.method.survivor == "winner":
            return best, best
        rng, iteration = self.keys.noise, self.keys.iteration
        drawn = [
            int(rng.generator("survivor", iteration, group, index).integers(totals.shape[1]))
            for group in self.keys.group.tolist()
        ]
        return torch.tensor(drawn), best

    def nudged(self, x: Tensor, index: int) -> Tensor:
        """Return x + nudge dr/dx, r being the reward of the clean image that the policy predicts from x: (b, C, ...).

        Where the gradient is not finite, x stays.
        """
        gradient = reward_gradient(self, x.detach(), index)
        return x.detach() + self.source.method.nudge * gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def reward_gradient(sampler: PathSampler, x: Tensor, index: int) -> Tensor:
    """Return the gradient of the total reward of clean images that are predicted from x, with respect to x.

    Zero, with a warning, where a reward fails.
    """
    source, model, level = sampler.source, sampler.source.model, sampler.plan.levels[index]
    x, prompts = x.requires_grad_(), sampler.asked(index)
    with torch.enable_grad():
        output = model.predict(x, level, sampler.conditioning, model.resolve_guidance(sampler.plan.guidance))
        clean = to_x0(model.parameterization, x, output, level)
        images = model.decode(clean) if source.collector.decodes else None
        texts, metadata = [prompt.text for prompt in prompts], [prompt.metadata for prompt in prompts]
        try:
            total = sum(
                weight * sampler.ask(source.collector.rewards[name], images, clean, texts, metadata).to(x).sum()
                for name, weight in source.weights.items()
                if weight
            )
            assert isinstance(total, Tensor)
            (gradient,) = torch.autograd.grad(total, x)
        except RewardUnavailable:
            raise
        except Exception as error:  # scored before, so that only this winner's nudge is lost
            said = f"no nudge: a reward failed with a gradient ({str(error)[:300]})"
            warnings.warn(said, RewardWarning, stacklevel=2)
            return torch.zeros_like(x).detach()
    return gradient


class PathSource(RolloutSource):
    """Pairs of two images of a prompt at each of their compared steps, all labelled by the images: D3PO."""

    def examples(self, rollout: Rollout) -> tuple[StepExamples, int]:
        """Return the steps of the pairs of a rollout, and how many all processes have."""
        buffer, leaves, steps = rollout.buffer, rollout.buffer.leaves, rollout.plan.plan.trained_steps
        pairs, scores = self.pairs(rollout)
        found = [(pair, step) for pair in pairs for step in steps]
        weight, everyone = padded_weights(self.run, len(found), len(found))

        chosen = [(found or [((0, 0), steps[0])])[index % max(len(found), 1)] for index in range(len(weight))]
        both, step = torch.tensor([pair for pair, _ in chosen]), torch.tensor([index for _, index in chosen])
        groups, base = (
            buffer.group[leaves][both[:, 0]].tolist(),
            self.run.config.num_groups * self.run.config.group_size,
        )
        first = int(buffer.group[leaves[0]]) * self.run.config.group_size
        return StepExamples(
            self._states(rollout, both, step),
            self._states(rollout, both, step + 1),
            step,
            torch.tensor([self.pairing.label(scores[better] - scores[worse]) for (better, worse), _ in chosen]),
            [buffer.prompts[group].input for group in groups],
            [((first + b) * base + first + w) * len(rollout.plan.plan) + s for (b, w), s in chosen],
            weight,
            rollout.plan,
        ), everyone

    def _states(self, rollout: Rollout, pairs: Tensor, level: Tensor) -> Tensor:
        """Return the latents of both paths of pairs at a level each: (P, 2, C, *spatial)."""
        buffer = rollout.buffer
        rows = torch.empty_like(pairs)
        for one in torch.unique(level).tolist():
            chosen = level == one
            rows[chosen] = buffer.nodes(pairs[chosen].flatten(), one).view(-1, 2)
        return buffer.latents(rows.flatten()).unflatten(0, (-1, 2))
