"""Configuration of Diffusion-DPO."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from diffalign.config import option
from diffalign.data.config import PreferenceDataConfig
from diffalign.diffusion.plan_config import PlanConfig
from diffalign.rollout.config import RolloutConfig
from diffalign.trainers.diffusion_dpo.siblings_config import SiblingsConfig

if TYPE_CHECKING:
    from diffalign.losses.objective import PairObjective


ONLINE_ONLY = ("num_groups", "group_size", "shared_start", "decode_precision", "updates_per_rollout", "max_unscored",
               "overlap_rewards", "save_rollouts", "collapse", "rollout_cache", "pairs")  # fmt: skip
OFFLINE = "read only online, where train_prompts and rewards make the pairs"
ONLINE = "read only offline, where pairs come from train_data"
NOISING = ("prompt_dropout", "time_sampling", "time_mean", "time_std", "times")
SIBLINGS = "read only with pairs: siblings"
NO_SIBLINGS = "read only with pairs: images, as sampled steps are compared without noising images"
CHILDREN = "not read where children of one state are compared"


@dataclasses.dataclass(kw_only=True)
class DiffusionDPOConfig(RolloutConfig):
    """Configuration of Diffusion-DPO. ``validate`` refuses combinations that cannot train.

    Offline, pairs come from ``train_data``; online, from the model's own images of ``train_prompts``, which ``rewards``
    rank, or from its sampling steps (``pairs: siblings``). Each mode refuses the fields that only another one reads.
    """

    usage: ClassVar[str] = "diffalign train diffusion_dpo --config FILE.yaml [--field VALUE ...] [--dry_run]"
    examples: ClassVar[tuple[str, ...]] = (
        "diffalign train diffusion_dpo --config configs/diffusion_dpo/shapes.yaml --max_train_steps 50",
        "diffalign train diffusion_dpo --model stable-diffusion-v1-5/stable-diffusion-v1-5 --train_data pairs.parquet "
        "--dry_run",
    )
    essential: ClassVar[tuple[str, ...]] = (
        "model", "train_data", "output_dir", "loss", "beta", "max_train_steps", "learning_rate", "lora.rank",
        "num_pairs", "train_batch_size",
    )  # fmt: skip

    plan: PlanConfig = option(
        PlanConfig("ode"), "solver and noise of each sampling step; offline only num_steps is read", section="sampling"
    )
    shared_start: bool = option(False, "start the images of a group from the same noise", section="sampling")
    train_data: tuple[str, ...] = option(
        (), "preference pairs: files, folders, rollout buffers, addresses (s3://...) or hub ids", section="data"
    )
    data: PreferenceDataConfig = option(
        PreferenceDataConfig(), "how train_data is read; data.rollouts: how scored images become pairs", section="data"
    )
    losers: Literal["data", "reference"] = option(
        "data",
        "reference: pair liked images with the reference's own images of their prompts (SPIN-Diffusion)",
        section="data",
    )
    pairs: Literal["images", "siblings"] = option(
        "images",
        "siblings: compare sampling steps: group_size children of a state, by their predicted clean images (SPO, "
        "TailorPO), or whole paths (D3PO)",
        section="data",
    )
    siblings: SiblingsConfig = option(
        SiblingsConfig(), "which steps are compared, and what is sampled from the children", section="sampling"
    )
    streaming: bool = option(False, "stream the data, for sets that do not fit on disk", section="data")
    aspect_buckets: int = option(
        0,
        "train each image at the size of its aspect ratio: sizes of the resolution's area, with sides that are "
        "multiples of this many pixels, 64 is usual; 0: all at the resolution",
        section="data",
        ge=0,
        le=4096,
    )
    random_crop: bool = option(False, "crop pairs at a random place instead of the centre", section="data")
    random_flip: bool = option(
        False, "mirror half of the pairs; not where captions mention left and right", section="data"
    )
    cache: bool = option(True, "keep latents and prompt embeddings on disk", section="performance", resume="free")
    num_pairs: int = option(
        64,
        "pairs (or single images) of train_data per optimizer step, over all processes",
        section="optimizer",
        ge=1,
        le=1_000_000,
    )
    train_batch_size: int = option(
        16, "pairs (or single images) per forward pass while training", section="optimizer", resume="free", ge=1
    )
    prompt_dropout: float = option(
        0.1, "share of prompts to replace by the empty one, for guidance", section="loss", ge=0, lt=1
    )
    time_sampling: Literal["uniform", "logit_normal"] = option(
        "uniform", "distribution of training noise levels", section="loss"
    )
    time_mean: float = option(0.0, "mean of the logit of sigma, for logit_normal", section="loss", infinite=False)
    time_std: float = option(1.0, "standard deviation of the logit of sigma, for logit_normal", section="loss", gt=0)
    times: tuple[float, ...] = option(
        (), "times to train at, 0 to 1000, with equal shares; replaces time_sampling", section="loss", ge=0, le=1000
    )
    loss: str = option(
        "dpo",
        "dpo, ipo, hinge, dmpo, dspo, linear_dpo, mapo, cpo, orpo, dro; of single images kto, bco, dro_unpaired, sft; "
        "with pairs: siblings spo, tailorpo, d3po; your own: file.py:function or module:function",
        section="loss",
    )
    beta: float | None = option(
        None,
        "strength of the preference, in units of denoising errors (with pairs: siblings, of log-ratios of steps); "
        "default: the loss's own",
        section="loss",
        infinite=False,
    )
    reduction: Literal["mean", "sum"] = option(
        "mean", "reduction of squared errors over an image's dimensions", section="loss"
    )
    loss_options: dict[str, float | str] = option(
        {}, "options of the loss, e.g. {smoothing: 0.1}", section="loss", infinite=False
    )
    max_margin: float | None = option(
        None, "margin beyond which the gradient is zero", section="loss", gt=0, infinite=True
    )
    winner_mu: float | None = option(
        None, "Diffusion-SDPO: share of the winner's descent that the loser must leave", section="loss", ge=0, le=1
    )
    winner_weight: float = option(
        0.0, "weight of ordinary fine-tuning on winners, added to the loss", section="loss", infinite=False
    )
    anchor_weight: float = option(
        0.0, "weight of the squared distance to the reference's output", section="loss", infinite=False
    )
    auto_beta: float | None = option(
        None,
        "adapt beta to the margins, so that a typical pair has this gradient factor; 0.2 is usual",
        section="loss",
        gt=0,
        lt=0.5,
    )
    auto_beta_range: tuple[float, float] = option((1.0, 10000.0), "bounds of the adapted beta", section="loss", gt=0)
    reference_decay: float = option(
        0.0,
        "decay of a reference that averages the policy; 0: the initial model",
        section="loss",
        ge=0,
        lt=1,
        hint="0.99 is usual",
    )
    reference_steps: int = option(
        0, "optimizer steps between updates of the reference to the policy; 0: never", section="loss", ge=0
    )
    bins: int = option(5, "number of noise-level bins that margins are logged by", section="run", ge=1, le=1000)

    @property
    def online(self) -> bool:
        """Whether pairs are the model's own images."""
        return bool(self.train_prompts or self.rewards)

    @property
    def compares(self) -> bool:
        """Whether the loss needs predictions of the reference."""
        from diffalign.losses.registry import get_loss

        kind = get_loss(self.loss)
        return kind.reference or (kind.paired and self.objective().needs_reference)

    @property
    def reference_moves(self) -> bool:
        """Whether the reference follows the policy."""
        return bool(self.reference_decay or self.reference_steps)

    @property
    def reads_rollouts(self) -> bool:
        """Whether the run collects rollouts."""
        return self.online

    @property
    def compares_children(self) -> bool:
        """Whether pairs are children of one state, which the run samples without a rollout buffer."""
        return self.pairs == "siblings" and not self.siblings.resolve().whole_paths

    def unread(self) -> Mapping[str, str]:
        """Fields that a run of this configuration does not read: see ``TrainerConfig``."""
        return self._unread_of_the_loss() | self._unread_of_the_source()

    def _unread_of_the_source(self) -> dict[str, str]:
        if self.online:
            data = (field.name for field in dataclasses.fields(self.data) if field.name != "rollouts")
            names = dict.fromkeys(("num_pairs", "streaming", "aspect_buckets", "random_crop", "random_flip"), ONLINE)
            names |= dict.fromkeys((f"data.{name}" for name in data), ONLINE)
            names |= super().unread()
        else:
            names = dict.fromkeys(ONLINE_ONLY, OFFLINE)
            if self.streaming:
                names["aspect_buckets"] = "the sizes of all images must be known, and a stream has none"
            if self.losers == "data":
                plan = (field.name for field in dataclasses.fields(self.plan) if field.name != "num_steps")
                names |= dict.fromkeys((f"plan.{name}" for name in plan), OFFLINE)
        if self.pairs == "images":
            return names | {"siblings": SIBLINGS}
        names |= {"rollout_cache": "a sampling step that is not the model's own has no density to compare"}
        children = ("shared_start", "overlap_rewards", "save_rollouts") if self.compares_children else ()
        return names | dict.fromkeys(children, CHILDREN)

    def _unread_of_the_loss(self) -> dict[str, str]:
        from diffalign.losses.registry import get_loss

        names: dict[str, str] = {}
        if self.pairs == "siblings":
            names = dict.fromkeys(NOISING, NO_SIBLINGS)
        elif self.time_sampling != "logit_normal" or self.times:
            names |= dict.fromkeys(("time_mean", "time_std"), "read only with time_sampling: logit_normal")
        if self.times and self.pairs == "images":
            names["time_sampling"] = "replaced by times"
        if not self.auto_beta:
            names["auto_beta_range"] = "read only with auto_beta"
        if not get_loss(self.loss, self.allow_reward_code).paired:
            names["bins"] = "read only by losses of pairs"
        if not self.compares:
            moves = ("reference_decay", "reference_steps")
            names |= dict.fromkeys(moves, f"read only by losses with a reference, unlike {self.loss!r}")
        return names

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
        """Check field combinations. Raises ValueError with a suggested fix; does no I/O."""
        self.check()
        if self.online and self.train_data:  # before what one of the two does not read is refused
            raise ValueError("train_data and train_prompts with rewards are two sources of pairs: give one")
        super().validate()
        if self.data.mask is not None and (self.online or self.losers == "reference"):
            raise ValueError(
                "data.mask: the model's own images have no masks: leave it out, or train on pairs of train_data"
            )
        if self.online and self.shared_start and self.plan.preset == "ode":
            raise ValueError("images that start alike and draw no noise are all the same: set shared_start: false")
        self._validate_reference()
        self._validate_loss()
        self._validate_source()
        self._validate_siblings()

    def _validate_reference(self) -> None:
        if self.reference_steps and self.reference_decay:
            raise ValueError("give reference_steps or reference_decay, not both: the reference moves one way")

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

    def _validate_siblings(self) -> None:
        from diffalign.losses.registry import get_loss
        from diffalign.trainers.diffusion_dpo.step_pairs import compared_steps

        loss = get_loss(self.loss, self.allow_reward_code)
        if self.pairs == "images":
            if loss.steps:
                raise ValueError(
                    f"{self.loss!r} compares sampling steps: set pairs: siblings, or use another loss, as dpo"
                )
            return
        if not self.online:
            raise ValueError("pairs: siblings samples its own pairs: give train_prompts and rewards, not train_data")
        if not loss.paired or self.losers != "data":
            raise ValueError(f"pairs: siblings wants a loss of pairs, as spo, tailorpo or d3po, got {self.loss!r}")
        if self.beta is None and loss.beta is not None and not (loss.steps or self.auto_beta):
            raise ValueError(
                f"the beta of {self.loss!r} is one for denoising errors, and pairs: siblings compares log-ratios of "
                "steps: give beta, or use spo, tailorpo or d3po"
            )
        compared_steps(self.plan, self.siblings.resolve())

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
