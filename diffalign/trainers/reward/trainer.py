"""Train a judge of one's own: build the network, read the pairs, and run the loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from diffalign.fsdp import FSDPConfig
from diffalign.log import get_logger
from diffalign.rewards.base import Reward, needs_groups
from diffalign.rewards.config import build_rewards
from diffalign.rewards.support.judge_files import load_backbone, load_tokenizer
from diffalign.rewards.support.judge_network import JudgeNetwork
from diffalign.rewards.support.judge_raters import NETWORKS
from diffalign.rewards.support.probe import try_rewards
from diffalign.rewards.support.weights import split
from diffalign.rng import KeyedRNG
from diffalign.runtime.callbacks import TrainerCallback
from diffalign.runtime.loop import Loop
from diffalign.runtime.output_copy import OutputCopy
from diffalign.runtime.run import Heartbeat
from diffalign.runtime.state import LoopState
from diffalign.runtime.watchdog import Watchdog
from diffalign.trainers.connect import connected
from diffalign.trainers.hub import hub_callbacks
from diffalign.trainers.result import TrainingResult, read_result
from diffalign.trainers.reward.algorithm import JudgeRun, RewardModelling, make_trainable
from diffalign.trainers.reward.config import RewardTrainerConfig
from diffalign.trainers.reward.data import JudgeData, read_judge_data
from diffalign.trainers.reward.inputs import PairInputs, PooledInputs
from diffalign.trainers.reward.outputs import JudgeOutputs

logger = get_logger(__name__)
RATER_MODELS = {"pal_a": "with ideal points between {} prototypes", "pal_b": "mixtures of {} prototypes"}


class RewardTrainer:
    """Train a reward on preference labels.

    Args:
        model: CLIP or SigLIP model, a path or hub id; default: ``args.backbone``.
        args: The configuration.
        train_dataset: Pairs in memory, a ``datasets.Dataset`` or what ``load_pairs`` returned; default:
            ``args.train_data``.
        callbacks: Called on steps, evaluations and checkpoints, in order.

    Attributes:
        run: What the training shares.
        algorithm: The algorithm.
        loop: The loop that trains it.
        outputs: Evaluations and products.

    Raises:
        ValueError, FileNotFoundError: Before any work, if something is missing or does not fit.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        args: RewardTrainerConfig | None = None,
        train_dataset: Any = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        config = args or RewardTrainerConfig()
        config = dataclasses.replace(config, output_dir=config.output_dir.absolute())
        if model is not None:
            config = dataclasses.replace(config, backbone=str(model))
        config.validate()
        judges = read_judges(config)
        data = read_judge_data(config, train_dataset)
        try_rewards(judges, [data.pair(i).prompt for i in data.held_out[:2]], leave=True)
        accelerator, _ = connected(config, partial(check_processes, config))

        network = make_trainable(build_network(config, data), config).to(accelerator.device)
        tokenizer = load_tokenizer(*split(config.tokenizer)) if config.tokenizer else _own_tokenizer(config)
        state = LoopState(network, config, accelerator)
        inputs = (
            PooledInputs(data, network, tokenizer, config.eval_batch_size)
            if config.train == "head"
            else PairInputs(data, network, tokenizer)
        )
        self.run = JudgeRun(
            config=config,
            model=network,
            module=state.module,
            accelerator=accelerator,
            rng=KeyedRNG(config.seed),
            progress=state.progress,
            heartbeat=Heartbeat(accelerator, Watchdog(config.hang_timeout, config.output_dir)),
            data=data,
            inputs=inputs,
            tokenizer=tokenizer,
        )
        self.algorithm = RewardModelling(self.run)
        self.outputs = JudgeOutputs(self.run, self.algorithm, judges, state.ema)
        target = config.output_copy if self.run.is_main else None
        self.output_copy = OutputCopy(config.output_dir, target, config.checkpoints_total_limit)
        every = [*callbacks, *hub_callbacks(config), self.output_copy]
        self.loop: Loop[Any] = Loop(self.run, state, self.algorithm, self.outputs, every)

    @property
    def args(self) -> RewardTrainerConfig:
        """The configuration of the run."""
        return self.run.config

    @property
    def model(self) -> JudgeNetwork:
        """The judge."""
        return self.run.model

    def train(self) -> TrainingResult:
        """Train to ``max_train_steps``; write the judge, its report and the pairs to label next.

        Returns:
            The figures, and the paths of what was written.
        """
        run = self.run
        logger.info(opening(run.config, run.data, sum(p.numel() for p in self.loop.state.parameters)))
        if isinstance(run.inputs, PooledInputs):
            run.inputs.compute(run.device, run.is_main)
        with self.output_copy:
            self.loop.train()
        return read_result(run.config.output_dir, run.progress.step)


def check_processes(config: RewardTrainerConfig, processes: int, shards: FSDPConfig | None) -> None:
    """Raise ValueError where the run is to be sharded, or its pairs do not divide over the processes."""
    if shards is not None:
        raise ValueError("a judge trains whole on each process, without FSDP2: launch with ddp.yaml")
    if config.num_pairs % processes:
        raise ValueError(f"num_pairs {config.num_pairs} do not divide over {processes} processes: make it a multiple")


def read_judges(config: RewardTrainerConfig) -> dict[str, Reward]:
    """Build the rewards to compare with. ValueError: one ranks images within a group."""
    judges, _ = build_rewards(config.judges, config.allow_reward_code)
    if ranks := [name for name, reward in judges.items() if needs_groups(reward)]:
        raise ValueError(f"judges: {', '.join(ranks)} rank images within a group of one prompt: name others")
    return judges


def build_network(config: RewardTrainerConfig, data: JudgeData) -> JudgeNetwork:
    """Load the backbone. ValueError: it cannot be read, or is no CLIP or SigLIP model."""
    try:
        backbone = load_backbone(config.backbone, config.revision)
    except (OSError, ValueError) as error:
        raise ValueError(f"backbone {config.backbone}: {str(error)[:500]}") from error
    return new_network(backbone, config, len(data.raters))


def new_network(backbone: PreTrainedModel, config: RewardTrainerConfig, raters: int) -> JudgeNetwork:
    """Return the untrained judge of a configuration. raters: their number; 0 for one judge of all."""
    if not raters:
        return JudgeNetwork(backbone)
    return NETWORKS[config.rater_model](backbone, raters, config.prototypes, config.seed)


def _own_tokenizer(config: RewardTrainerConfig) -> Any:
    try:
        return load_tokenizer(config.backbone, config.revision)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"backbone {config.backbone} has no tokenizer ({str(error).splitlines()[0][:200]}): name one, such as "
            "tokenizer: laion/CLIP-ViT-H-14-laion2B-s32B-b79K for PickScore"
        ) from error


def opening(config: RewardTrainerConfig, data: JudgeData, parameters: int | None = None) -> str:
    """Describe the run's model, data, steps and folder, a line each."""
    kind = {"head": "its projections", "lora": f"a LoRA of rank {config.lora.rank} and its projections", "full": "all"}
    size = "" if parameters is None else f": {parameters:,} parameters"
    prompts = [len({data.examples[i].text for i in part}) for part in (data.train, data.held_out)]
    lines: Mapping[str, str] = {
        "backbone": f"{config.backbone}, of which {kind[config.train]} train{size}",
        "data": f"{len(data.train)} pairs of {prompts[0]} prompts",
        "held out": f"{len(data.held_out)} pairs of {prompts[1]} other prompts",
        "raters": f"{len(data.raters)}, {RATER_MODELS[config.rater_model].format(config.prototypes)}"
        if data.raters
        else "",
        "judges": ", ".join(config.judges),
        "steps": f"{config.max_train_steps} optimizer steps, of {config.num_pairs} pairs each",
        "output": str(config.output_dir),
    }
    return "\n".join(f"{name:12}{text}" for name, text in lines.items() if text)
