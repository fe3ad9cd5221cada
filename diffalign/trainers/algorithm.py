"""Base class of algorithms: the methods that one must define, and those that it may override."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor, nn

from diffalign.evaluation.heldout import Shown
from diffalign.fsdp import FSDPConfig
from diffalign.models import DiffusionModel
from diffalign.rollout.sampler import SamplingPlan, ode_plan
from diffalign.runtime.interfaces import IterationBatch, Metrics, MicroBatch, MiniBatch, State
from diffalign.runtime.run import Run
from diffalign.runtime.trainer_config import TrainerConfig
from diffalign.structures import Prompt
from diffalign.trainers.inputs import Inputs

C = TypeVar("C", bound=TrainerConfig)
B = TypeVar("B", bound=IterationBatch)


@dataclass(frozen=True)
class Evaluated:
    """A finished evaluation.

    Attributes:
        step: Optimizer steps taken before it.
        figures: Metrics over all processes.
        shown: Scored images.
        prompts: All held-out prompts.
        weight_set: Name of the weights that sampled.
    """

    step: int
    figures: Metrics
    shown: Shown
    prompts: Sequence[Prompt]
    weight_set: str


class Algorithm(ABC, Generic[C, B]):
    """A training method: data of an iteration, and a loss on parts of them.

    The loop calls ``sample``, ``score`` and ``advantage`` once per iteration, and ``loss`` for each micro-batch of
    ``minibatches``. An algorithm knows the ``Run``; it knows neither the loop nor the trainer.

    Attributes:
        name: Registered name.
        command: Argument of ``diffalign train``; differs from the name for code.
        launch_command: Command that trains with several processes, without options.
        config_class: Configuration, with defaults that can train.
        grad_through: Parts of the model besides the denoiser that gradients pass through.
        updates_per_iteration: Optimizer steps on the data of an iteration.
        world_size_invariant: Whether any number of processes splits an iteration into the same updates.
        data_digest: Digest of the training data, which a resumed run compares.
        digest_with_paths: The same with paths of source images, as early checkpoints have it; empty if it is no other.
        data_contents: Fingerprints of data in memory, by name.
        collapse_remedy: What to try where online training collapses, a sentence.
    """

    name: ClassVar[str] = ""
    command: ClassVar[str] = ""
    launch_command: ClassVar[str] = ""
    config_class: ClassVar[type[Any]] = TrainerConfig
    grad_through: ClassVar[tuple[str, ...]] = ()
    collapse_remedy: ClassVar[str] = "Lower learning_rate, and go on from an earlier checkpoint."
    updates_per_iteration: int = 1
    world_size_invariant: bool = True
    data_digest: str = ""
    digest_with_paths: str = ""
    data_contents: Mapping[str, dict[str, str]] = {}

    # Before the model is loaded -------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def read_inputs(cls, config: C, reward_funcs: Any, train_dataset: Any) -> Inputs[C]:
        """Validate the configuration, and read rewards and training data. Raises ValueError or FileNotFoundError."""

    @classmethod
    def check_processes(cls, inputs: Inputs[C], processes: int) -> None:
        """Raise ValueError where batches do not divide over the processes."""

    @classmethod
    def keeps_reference(cls, config: C) -> bool:
        """Return whether predictions of the base model are needed."""
        return False

    @classmethod
    def make_trainable(cls, model: DiffusionModel, config: C, shards: FSDPConfig | None) -> nn.Module:
        """Make the denoiser trainable, and return the module that trains."""
        model.train(config.lora, seed=config.seed, keep_reference=cls.keeps_reference(config), shards=shards)
        return model.raw_denoiser

    def __init__(self, run: Run[C], inputs: Inputs[C]) -> None:
        self.run, self.inputs = run, inputs
        self.config, self.model = run.config, run.model

    # An iteration ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def sample(self, iteration: int) -> B:
        """Sample images, or read data: this process's share of an iteration."""

    def score(self, batch: B) -> None:
        """Score the samples with the rewards."""

    def advantage(self, batch: B) -> None:
        """Turn the scores of all processes into advantages, pairs or weights."""

    @abstractmethod
    def minibatches(self, batch: B, iteration: int) -> Iterator[MiniBatch]:
        """Split the iteration's data into optimizer steps, the same way on every call."""

    @abstractmethod
    def loss(self, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean loss of a micro-batch, without its weight, and metrics."""

    def pass_kind(self, micro: MicroBatch) -> Hashable:
        """Return a key that is equal for passes of equal cost per row; forecasts run one pass of each kind."""
        return None

    def updating(self) -> AbstractContextManager[None]:
        """Return a context for the passes of an optimizer step."""
        return self.model.keeping(*self.grad_through)

    def on_step(self, batch: B, metrics: Metrics) -> None:
        """Act on an optimizer step: move a reference, adapt beta; may add to ``metrics``, means over all processes."""

    # Checks and evaluations -----------------------------------------------------------------------------------------

    def on_first_batch(self, batch: B) -> None:
        """Raise CannotTrain if the unchanged weights do not reproduce what the iteration stored."""

    @abstractmethod
    def probe(self, batch: B) -> list[Tensor]:
        """Return outputs of the denoiser that the first update must change; the loop compares them around it."""

    @property
    @abstractmethod
    def num_steps(self) -> int:
        """Sampling steps of the training, which evaluations use unless ``eval_num_steps`` is set."""

    def eval_plan(self) -> SamplingPlan:
        """Return how evaluations sample: the ODE with the run's schedule and guidance."""
        steps = self.config.eval_num_steps or self.num_steps
        return SamplingPlan(ode_plan(steps), self.model.levels(steps, self.config.schedule), self.run.guidance)

    def on_evaluation(self, evaluated: Evaluated) -> Metrics:
        """Return metrics to add to an evaluation."""
        return {}

    @property
    def done(self) -> bool:
        """Whether to stop before ``max_train_steps``."""
        return False

    def best_weights(self) -> tuple[int, str] | None:
        """Return (step, weight set) of the weights to export instead of the last ones, or None."""
        return None

    def plot(self, folder: Path) -> list[Path]:
        """Draw plots of the algorithm's own metrics into the run folder; return their paths."""
        return []

    # Checkpoints ----------------------------------------------------------------------------------------------------

    def restored(self, iteration: int, tensors: Mapping[str, Tensor], metrics: Metrics) -> B:
        """Rebuild a batch from ``IterationBatch.state_dict``, gathered over the processes that saved it."""
        raise NotImplementedError(f"{self.name} stores no batches in checkpoints")

    def state_dict(self) -> State:
        """Return the state of the algorithm besides weights, optimizer and counters: tensors and JSON values.

        Called after each optimizer step; tensors may be the live ones if only ``on_step`` changes them.
        """
        return {}, {}

    def load_state_dict(self, state: State) -> None:
        """Restore what ``state_dict`` returned."""
