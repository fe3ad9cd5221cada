"""Figures of a judge on held-out pairs: accuracy, calibration, agreement with raters and with other judges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffalign.evaluation.calibration import calibration_error, reliability
from diffalign.evaluation.win_rate import mean_interval
from diffalign.losses.paired_comparison import comparison_loss
from diffalign.trainers.reward.data import Example

Figures = dict[str, Any]


@dataclass(frozen=True)
class Judged:
    """Held-out pairs with the margins of the judge.

    Attributes:
        examples: The pairs.
        margin: (N,), of the mean rater, float64.
        own: (N,), of each pair's own rater; equal to ``margin`` for one judge of all.
        tie_model: How ties were modelled.
        tie: The parameter of the model of ties.
    """

    examples: Sequence[Example]
    margin: Tensor
    own: Tensor
    tie_model: str = "soft"
    tie: Tensor | None = None

    @property
    def label(self) -> Tensor:
        """Labels (N,), float64."""
        return torch.tensor([example.label for example in self.examples], dtype=torch.float64)

    def short(self) -> dict[str, float]:
        """Return the figures that an evaluation logs."""
        chosen = self.label != 0.5
        right = _outcomes(self.margin, self.label)[chosen.numpy()]
        loss = comparison_loss(self.own, self.label, self.tie_model, self.tie)
        bins = reliability(self.margin.sigmoid()[chosen].numpy(), self.label[chosen].numpy())
        found = {"accuracy": float(right.mean()), "loss": loss.mean().item(), "ece": calibration_error(bins)}
        if not torch.equal(self.own, self.margin):
            found["accuracy/own_rater"] = float(_outcomes(self.own, self.label)[chosen.numpy()].mean())
        return found

    def figures(self, others: Mapping[str, Tensor]) -> Figures:
        """Return all figures, as plain values for JSON. others: margins (N,) of other judges, NaN where one failed."""
        label, chosen = self.label, self.label != 0.5
        bins = reliability(self.margin.sigmoid()[chosen].numpy(), label[chosen].numpy())
        found: Figures = {
            "pairs": len(label),
            "ties": int((~chosen).sum()),
            "prompts": len({example.text for example in self.examples}),
            "accuracy": self._rate(self.margin),
            "loss": self.short()["loss"],
            "ece": calibration_error(bins),
            "reliability": [{**vars(one)} for one in bins if one.pairs],
            "raters": {name: self._of_rater(name) for name in sorted({e.rater for e in self.examples} - {""})},
            "judges": {name: self._against(margin) for name, margin in others.items()},
        }
        if not torch.equal(self.own, self.margin):
            found["accuracy_of_own_rater"] = self._rate(self.own)
        return found

    def _of_rater(self, name: str) -> Figures:
        own = torch.tensor([example.rater == name for example in self.examples])
        return {"mean": self._rate(self.margin, own), "own": self._rate(self.own, own)}

    def _against(self, margin: Tensor) -> Figures:
        """Compare another judge with the labels, and with this one."""
        both = margin.isfinite()
        agreement = np.where((margin == 0) | (self.margin == 0), 0.5, (margin > 0) == (self.margin > 0))
        return {"accuracy": self._rate(margin, both), "agreement": _interval(agreement, self._prompts, both.numpy())}

    def _rate(self, margin: Tensor, among: Tensor | None = None) -> Figures | None:
        chosen = self.label != 0.5
        kept = (chosen if among is None else chosen & among).numpy()
        return _interval(_outcomes(margin, self.label), self._prompts, kept)

    @property
    def _prompts(self) -> np.ndarray:
        numbers = {text: i for i, text in enumerate(dict.fromkeys(example.text for example in self.examples))}
        return np.array([numbers[example.text] for example in self.examples], int)


def _outcomes(margin: Tensor, label: Tensor) -> np.ndarray:
    """Return 1 where the margin has the label's side, 0 where it has not, 0.5 for equal scores."""
    right = (margin > 0) == (label > 0.5)
    return np.where((margin == 0).numpy(), 0.5, right.numpy().astype(float))


def _interval(outcome: np.ndarray, prompts: np.ndarray, kept: np.ndarray) -> Figures | None:
    """Average outcomes over pairs, with a bootstrap interval over prompts; None without pairs."""
    if not kept.any():
        return None
    found = mean_interval(torch.from_numpy(outcome[kept]), torch.from_numpy(prompts[kept]))
    return {"rate": found.mean, "low": found.low, "high": found.high, "pairs": int(kept.sum())}
