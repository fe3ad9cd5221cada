"""A pair loss with its options, checked when it is made, as a trainer's configuration selects it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffalign.losses.errors import Denoised, DenoisedPair
from diffalign.losses.options import anchor_term, clamp_margin, winner_term
from diffalign.losses.registry import PREFERENCE_LOSSES, PreferenceLoss, get_loss
from diffalign.losses.sdpo import preserve_winner


@dataclass(frozen=True)
class PairObjective:
    """A pair loss by name with its options; calling it returns the loss per pair.

    name: in ``PREFERENCE_LOSSES``. beta: in the units of the errors; None is the loss's own, for the reduction "mean".
    max_margin: the limit of ``clamp_margin``. winner_mu: the mu of ``preserve_winner``. None leaves the pair as it is.
    winner_weight, anchor_weight: of ``winner_term`` and ``anchor_term``, which take the pair unchanged.
    options: the loss's own, such as {"smoothing": 0.1}.

    ValueError: an unknown name, a loss of single images, or an option that the loss does not use.
    """

    name: str
    beta: float | None = None
    max_margin: float | None = None
    winner_mu: float | None = None
    winner_weight: float = 0.0
    anchor_weight: float = 0.0
    options: Mapping[str, float | str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        loss = get_loss(self.name)
        if not loss.paired:
            raise ValueError(f"{self.name!r} learns from single images: use one of {_where(lambda x: x.paired)}")
        if self.beta is not None and loss.beta is None:
            raise ValueError(f"{self.name!r} has no beta: leave it out, got {self.beta}")
        if self.beta is not None and not self.beta > 0:
            raise ValueError(f"beta must be positive, got {self.beta}: {self.name!r} starts well at {loss.beta}")
        if self.max_margin is not None and not loss.margin:
            raise ValueError(f"{self.name!r} has no margin to bound: leave max_margin out, or use one of "
                             f"{_where(lambda x: x.margin)}")  # fmt: skip
        if min(self.winner_weight, self.anchor_weight) < 0:
            raise ValueError("winner_weight and anchor_weight are weights of losses: give 0 or more")
        if "label" in self.options and "label" in loss.options:
            raise ValueError("label belongs to each pair, from the data or rewards: leave it out of the options")
        if unknown := set(self.options) - set(loss.options):
            known = ", ".join(loss.options) or "none"
            raise ValueError(f"{self.name!r} has no option {', '.join(sorted(unknown))}; its options: {known}")
        # Bad values are known to the functions that take them: one pair of nothing finds them before a run does.
        nothing = torch.zeros(1, 1, 1, 1)
        side = Denoised(nothing, nothing, nothing)
        self(DenoisedPair(side, side))

    @property
    def needs_reference(self) -> bool:
        """Whether pairs must come with the reference's outputs."""
        return get_loss(self.name).reference or self.anchor_weight > 0

    def __call__(self, pair: DenoisedPair, *, beta: float | Tensor | None = None, **batch: Tensor) -> Tensor:
        """Compute the loss per pair, (B,). beta: replaces the configured one, e.g. with that of ``AutoBeta``.

        batch: options that belong to the pairs, such as ``label`` (B,).
        ValueError: no beta at all for errors of the reduction "sum".
        """
        loss = get_loss(self.name)
        given = beta if beta is not None else self.beta
        if given is None and loss.beta is not None and pair.winner.reduction == "sum":
            raise ValueError(f"the beta of {self.name!r} is one for means of errors, and these are sums: give beta")
        chosen = loss.beta if given is None else given
        strength = {} if chosen is None else {"beta": chosen}
        total = loss.function(self._prepare(pair), **strength, **self.options, **batch)
        # A weight of 0 costs nothing, and needs no reference.
        for weight, term in ((self.winner_weight, winner_term), (self.anchor_weight, anchor_term)):
            total = total + weight * term(pair) if weight else total
        return total

    def _prepare(self, pair: DenoisedPair) -> DenoisedPair:
        if self.max_margin is not None:
            pair = clamp_margin(pair, self.max_margin)
        return pair if self.winner_mu is None else preserve_winner(pair, mu=self.winner_mu)


def _where(condition: Callable[[PreferenceLoss], bool]) -> str:
    return ", ".join(name for name, loss in PREFERENCE_LOSSES.items() if condition(loss))
