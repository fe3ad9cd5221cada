"""Learn a reward from preference labels: Bradley-Terry, with ties, on a CLIP or SigLIP model (arXiv 2305.01569)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffalign.data.epoch_order import take
from diffalign.losses.paired_comparison import comparison_loss
from diffalign.models.lora import inject
from diffalign.rewards.support.judge_network import JudgeNetwork
from diffalign.rng import KeyedRNG
from diffalign.runtime.interfaces import IterationBatch, Metrics, MicroBatch, MiniBatch, State
from diffalign.runtime.run import BaseRun, Heartbeat, Progress
from diffalign.trainers.registry import register_algorithm
from diffalign.trainers.reward.config import RewardTrainerConfig
from diffalign.trainers.reward.data import JudgeData
from diffalign.trainers.reward.inputs import PairInputs

TARGETS = ("q_proj", "k_proj", "v_proj")
# A LoRA, because the outputs of frozen towers would be computed for all pairs of the table.
TRIAL = {
    "backbone": "{assets}/judges/pickscore",
    "train": "lora",
    "lora": {"rank": 2},
    "train_data": ["{assets}/preferences/shapes.parquet"],
    "data": {"scan": 8},
    "held_out_share": 0.005,
    "num_pairs": 4,
    "label_next": 0,
}
PROBED = 8  # pairs whose scores the first update must change


@dataclass(frozen=True)
class JudgeRun(BaseRun[RewardTrainerConfig]):
    """Shared objects of the training of a judge.

    Attributes besides those of ``BaseRun``:
        data: The pairs.
        inputs: Makes the network's arguments of pairs.
        tokenizer: Of the backbone.
    """

    config: RewardTrainerConfig
    model: JudgeNetwork
    module: nn.Module
    accelerator: Any
    rng: KeyedRNG
    progress: Progress
    heartbeat: Heartbeat
    data: JudgeData
    inputs: PairInputs
    tokenizer: Any

    @property
    def device(self) -> torch.device:
        """The device that computes."""
        return torch.device(self.accelerator.device)


@dataclass
class PairBatch(IterationBatch):
    """The pairs of an iteration.

    Attributes:
        positions: Positions of this process's pairs in the data.
        data: The data.
    """

    positions: Sequence[int] = field(default_factory=list)
    data: JudgeData | None = None

    def ids(self, rows: Tensor) -> list[dict[str, Any]]:
        """Return key and prompt of pairs."""
        assert self.data is not None
        pairs = [self.data.pair(self.positions[row]) for row in rows.tolist()]
        return [{"pair": pair.key, "prompt": pair.prompt.text} for pair in pairs]


def make_trainable(network: JudgeNetwork, config: RewardTrainerConfig) -> JudgeNetwork:
    """Choose the parameters that train, all in float32: the head, with a LoRA, or everything."""
    network.requires_grad_(config.train == "full").eval()
    if config.train == "lora":
        inject(network.backbone, config.lora, TARGETS, config.seed)
    network.train_head()
    scale: Any = network.backbone.logit_scale
    scale.requires_grad_(True)
    network.tie.requires_grad_(config.tie_model != "soft")
    if hasattr(network.backbone, "logit_bias"):  # cancels in a comparison
        network.backbone.logit_bias.requires_grad_(False)
    return network


@register_algorithm(
    "reward",
    config=RewardTrainerConfig,
    trainer_class="diffalign.trainers.reward.trainer:RewardTrainer",
    plan="diffalign.forecast.judge:print_plan",
    trial=TRIAL,
)
class RewardModelling:
    """Fit the judge's preferences to labels. An iteration is one optimizer step on ``num_pairs`` pairs."""

    name: ClassVar[str] = ""
    command: ClassVar[str] = ""
    launch_command: ClassVar[str] = ""
    config_class: ClassVar[type[Any]] = RewardTrainerConfig
    updates_per_iteration = 1
    world_size_invariant = True
    done = False

    def __init__(self, run: JudgeRun) -> None:
        self.run, self.config, self.data = run, run.config, run.data

    def sample(self, iteration: int) -> PairBatch:
        """Choose the pairs of an iteration; every epoch uses each pair once."""
        train, run = self.data.train, self.run
        chosen = take(
            len(train), self.config.num_pairs, iteration, lambda epoch: run.rng.permutation(len(train), "order", epoch)
        )
        share = run.share(self.config.num_pairs)
        return PairBatch([train[i] for i in chosen[share.start : share.stop]], self.data)

    def score(self, batch: PairBatch) -> None:
        """Do nothing: the labels are the data's."""

    def advantage(self, batch: PairBatch) -> None:
        """Do nothing."""

    def minibatches(self, batch: PairBatch, iteration: int) -> Iterator[MiniBatch]:
        """Yield one optimizer step, in passes of ``train_batch_size``."""
        rows = torch.arange(len(batch.positions))
        parts = rows.split(self.config.train_batch_size)
        yield MiniBatch([MicroBatch(part, len(part) / len(rows), batch) for part in parts], rows)

    def loss(self, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean negative log-likelihood of the labels, and metrics."""
        positions = [micro.data.positions[row] for row in micro.rows.tolist()]
        margin, label = self.margins(positions)
        loss = comparison_loss(margin, label, self.config.tie_model, self.run.model.tie)
        chosen = label != 0.5
        right = ((margin > 0) == (label > 0.5))[chosen].float()
        metrics = {
            "accuracy": right.mean(),  # NaN where all labels are ties
            "margin": margin.detach().abs().mean(),
            "logit_scale": self.run.model.logit_scale.detach(),
        }
        return loss.mean(), metrics

    def margins(self, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Score pairs: (margins, labels), (B,) each."""
        found, arguments = self.run.inputs(positions, self.run.device)
        scores = self.run.module(**arguments)
        labels = [self.data.examples[position].label for position in found]
        return scores[:, 0] - scores[:, 1], torch.tensor(labels, device=scores.device)

    def updating(self) -> AbstractContextManager[None]:
        """Return a context for the passes of an optimizer step."""
        return nullcontext()

    def probe(self, batch: PairBatch) -> list[Tensor]:
        """Return margins that the first update must change."""
        return [self.margins(batch.positions[:PROBED])[0].detach()]

    def on_first_batch(self, batch: PairBatch) -> None:
        """Do nothing: labels are on no policy."""

    def on_step(self, batch: PairBatch, metrics: Metrics) -> None:
        """Do nothing."""

    def restored(self, iteration: int, tensors: Mapping[str, Tensor], metrics: Metrics) -> PairBatch:
        """Raise NotImplementedError: batches are chosen again."""
        raise NotImplementedError("pairs are chosen again by the number of the iteration")

    def state_dict(self) -> State:
        """Return nothing: the order of pairs depends on the number of the iteration alone."""
        return {}, {}

    def load_state_dict(self, state: State) -> None:
        """Restore nothing."""
