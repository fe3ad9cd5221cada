"""Base class of algorithms that train on rollouts: it reads rewards and prompts, and samples and scores images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from diffalign.rewards.support.probe import try_rewards
from diffalign.rollout.collector import Collector, Rollout
from diffalign.rollout.config import RolloutConfig
from diffalign.runtime.interfaces import Metrics
from diffalign.runtime.run import Run
from diffalign.trainers.algorithm import Algorithm
from diffalign.trainers.inputs import Inputs, check_groups, dataset, evaluation_rewards, read_rewards

R = TypeVar("R", bound=RolloutConfig)


class RolloutAlgorithm(Algorithm[R, Rollout]):
    """Sample images of prompts along ``config.plan`` and score them. A subclass says how to train on them.

    Attributes:
        leaves_only: Whether rollouts keep final latents only, whatever the plan.
    """

    leaves_only: ClassVar[bool] = False

    @classmethod
    def read_inputs(cls, config: R, reward_funcs: Any, train_dataset: Any) -> Inputs[R]:
        """Validate the configuration, and read rewards and prompts."""
        config.validate()
        config, rewards, weights = read_rewards(config, reward_funcs)
        named = getattr(config, "advantage_diversity", "")
        if named and named not in rewards:
            raise ValueError(
                f"advantage_diversity {named!r} is none of the rewards {', '.join(rewards)}: add it, with weight 0 "
                "if it is for that alone, as rewards: {novelty: 0}"
            )
        prompts = dataset(train_dataset, config.train_prompts, "train_prompts")
        try_rewards(rewards, prompts, config.resolution)
        judges = evaluation_rewards(config.eval_rewards, rewards, config.allow_reward_code)
        return Inputs(config, prompts, rewards, weights, judges)

    @classmethod
    def check_processes(cls, inputs: Inputs[R], processes: int) -> None:
        """Raise ValueError where images or groups do not divide over the processes."""
        inputs.config.validate_batches(processes)
        check_groups(inputs.rewards, inputs.config.num_groups, processes)

    def __init__(self, run: Run[R], inputs: Inputs[R]) -> None:
        super().__init__(run, inputs)
        self.collector = Collector(run, inputs.data, inputs.rewards, inputs.weights, self.leaves_only)
        self.data_digest, self.digest_with_paths = self.collector.digests()
        self.updates_per_iteration = run.config.updates_per_rollout

    def sample(self, iteration: int) -> Rollout:
        """Sample the images of an iteration."""
        return self.collector.sample(iteration)

    def score(self, batch: Rollout) -> None:
        """Score the images."""
        self.collector.score(batch)

    def advantage(self, batch: Rollout) -> None:
        """Compute statistics of the rewards, and advantages if the configuration has an ``AdvantageConfig``."""
        self.collector.advantage(batch)

    def restored(self, iteration: int, tensors: Mapping[str, Tensor], metrics: Metrics) -> Rollout:
        """Rebuild the rollout."""
        return self.collector.restored(iteration, tensors, metrics)

    @property
    def num_steps(self) -> int:
        """Sampling steps of the plan."""
        return self.config.plan.num_steps
