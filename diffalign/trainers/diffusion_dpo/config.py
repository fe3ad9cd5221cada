"""What a Diffusion-DPO run can be told."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from diffalign.config import option
from diffalign.data.config import PreferenceDataConfig
from diffalign.trainers.rollout_config import RolloutConfig

if TYPE_CHECKING:
    from diffalign.losses.objective import PairObjective


@dataclasses.dataclass(kw_only=True)
class DiffusionDPOConfig(RolloutConfig):
    """What a Diffusion-DPO run can be told. ``validate`` refuses settings that cannot train.

    Pairs come from ``train_data``, or, where ``train_prompts`` and ``rewards`` are given, from the model's own images:
    settings of rollouts matter only then.
    """

    train_data: tuple[str, ...] = option((), "preference pairs: files, folders, rollout buffers or hub ids")
    data: PreferenceDataConfig = option(
        PreferenceDataConfig(), "how these are read; data.rollouts: how images become pairs"
    )
    losers: Literal["data", "reference"] = option(
        "data", "reference: liked images against what the reference draws of their prompts (SPIN-Diffusion)"
    )
    streaming: bool = option(False, "read the data as a stream, for sets that do not fit on disk")
    random_crop: bool = option(False, "crop a pair at a random place, not in the middle")
    random_flip: bool = option(False, "mirror half of the pairs; not where captions tell left from right")
    cache: bool = option(True, "keep latents and prompt embeddings on disk")
    num_pairs: int = option(
        64, "pairs (or single images) of train_data per optimizer step, over all processes", le=1_000_000
    )
    train_batch_size: int = option(16, "pairs (or single images) per forward pass while training")
    prompt_dropout: float = option(0.1, "share of prompts that are trained as the empty one, for guidance")
    time_sampling: Literal["uniform", "logit_normal"] = option("uniform", "how levels are drawn")
    time_mean: float = option(0.0, "of the logit of sigma, for logit_normal")
    time_std: float = option(1.0, "of the logit of sigma, for logit_normal")
    times: tuple[float, ...] = option(
        (), "times to train at, 0 to 1000, each as often; instead of time_sampling", ge=0, le=1000
    )
    loss: str = option(
        "dpo",
        "dpo, ipo, hinge, dmpo, dspo, linear_dpo, mapo, cpo, orpo, dro; of single images kto, bco, dro_unpaired, sft",
    )
    beta: float | None = option(None, "strength of the preference, in units of errors; default: the loss's own")
    reduction: Literal["mean", "sum"] = option("mean", "of squared errors over an image's dimensions")
    loss_options: dict[str, float | str] = option({}, "of the loss, e.g. {smoothing: 0.1}")
    max_margin: float | None = option(None, "margins beyond this have no gradient", gt=0, infinite=True)
    winner_mu: float | None = option(
        None, "Diffusion-SDPO: share of the winner's descent that the loser must leave", ge=0, le=1
    )
    winner_weight: float = option(0.0, "of ordinary fine-tuning on winners, added to the loss")
    anchor_weight: float = option(0.0, "of the squared distance to the reference's output, added to the loss")
    auto_beta: float | None = option(
        None, "0.2: beta follows the margins, so that this is the gradient factor of a usual pair", gt=0, lt=0.5
    )
    auto_beta_range: tuple[float, float] = option((1.0, 10000.0), "within these", gt=0)
    reference_decay: float = option(0.0, "the reference is this average of the policy; 0: the model as it began")
    reference_steps: int = option(0, "the reference becomes the policy every so many optimizer steps; 0: never")
    bins: int = option(5, "margins are logged by noise level in so many parts", le=1000)

    @property
    def online(self) -> bool:
        """Whether pairs are the model's own images."""
        return bool(self.train_prompts or self.rewards)

    def objective(self) -> PairObjective:
        """The loss with its options. ValueError: one that does not go with another."""
        from diffalign.losses.objective import PairObjective

        return PairObjective(
            self.loss,
            self.beta,
            self.max_margin,
            self.winner_mu,
            self.winner_weight,
            self.anchor_weight,
            self.loss_options,
        )

    def validate(self) -> None:
        """ValueError, with what to write instead, for what cannot train; reads no file."""
        super().validate()
        for name in ("num_pairs", "train_batch_size", "bins"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.prompt_dropout < 1:
            raise ValueError(f"prompt_dropout lies in [0, 1), got {self.prompt_dropout}")
        if not self.time_std > 0:
            raise ValueError(f"time_std must be positive, got {self.time_std}")
        if self.online and self.train_data:
            raise ValueError("train_data and train_prompts with rewards are two sources of pairs: give one")
        if self.data.mask is not None and (self.online or self.losers == "reference"):
            raise ValueError(
                "data.mask: the model's own images have no masks: leave it out, or train on pairs of train_data"
            )
        if self.online and self.shared_start and self.plan.preset == "ode":
            raise ValueError("images that start alike and draw no noise are all the same: set shared_start: false")
        self._validate_reference()
        self._validate_loss()
        self._validate_source()

    def _validate_reference(self) -> None:
        if not 0 <= self.reference_decay < 1:
            raise ValueError(f"reference_decay lies in [0, 1), got {self.reference_decay}; 0.99 is usual")
        if self.reference_steps < 0 or (self.reference_steps and self.reference_decay):
            raise ValueError("give reference_steps (0 or more), or reference_decay: the reference moves one way")

    def _validate_source(self) -> None:
        from diffalign.losses.registry import get_loss

        paired = get_loss(self.loss, self.allow_reward_code).paired
        if self.streaming and not (paired and self.losers == "data"):
            what = repr(self.loss) if self.losers == "data" else "losers: reference"
            raise ValueError(f"{what} learns from single images, which are not streamed: set streaming: false")
        if self.losers == "data":
            return
        if self.online:
            raise ValueError("losers: reference wants liked images: give train_data, not train_prompts and rewards")
        if not paired or not self.objective().needs_reference:
            raise ValueError(f"losers: reference, and {self.loss!r} has none: use a loss of pairs with one, as dpo")

    def _validate_loss(self) -> None:
        from diffalign.losses.registry import get_loss
        from diffalign.losses.unpaired import SingleObjective

        if get_loss(self.loss, self.allow_reward_code).paired:
            self.objective()
            return
        if self.beta is not None and get_loss(self.loss).beta is None:
            raise ValueError(f"{self.loss!r} has no beta: leave it out, got {self.beta}")
        pairs_only: Mapping[str, object] = {
            "max_margin": self.max_margin,
            "winner_mu": self.winner_mu,
            "winner_weight": self.winner_weight,
            "anchor_weight": self.anchor_weight,
            "auto_beta": self.auto_beta,
        }
        if used := [name for name, value in pairs_only.items() if value]:
            raise ValueError(f"{', '.join(used)}: for losses of pairs, and {self.loss!r} learns from single images")
        SingleObjective(self.loss, self.loss_options)
