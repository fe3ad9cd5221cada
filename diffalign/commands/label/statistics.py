"""Figures from the answers of raters: win rates, a ranking of models, agreement of raters and of rewards."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from diffalign.commands.label.answers import CHOICES, Answer, identify
from diffalign.commands.label.comparison import Comparison
from diffalign.commands.label.order import count_wins
from diffalign.evaluation.bradley_terry import elo
from diffalign.evaluation.rater_agreement import krippendorff_alpha, pairwise_kappa
from diffalign.evaluation.win_rate import WinRate, rate_of_outcomes
from diffalign.report.markdown import inert

DATA_LABEL = "label of the data"
Figures = dict[str, Any]


def summarise(pairs: Sequence[Comparison], answers: Sequence[Answer]) -> Figures:
    """Compute all figures, as plain values for JSON.

    Args:
        pairs: The pairs of the sources.
        answers: The answers that stand; those about other pairs count for raters and models too.
    """
    known = {pair.key: pair for pair in pairs}
    return {
        "pairs": len(pairs),
        "answered_pairs": len({answer.pair for answer in answers} & known.keys()),
        "answers": len(answers),
        "choices": {choice: sum(answer.choice == choice for answer in answers) for choice in CHOICES},
        "raters": _raters(answers),
        "models": _models(answers),
        "win_rates": _win_rates(answers),
        "agreement_of_raters": _agreement(answers),
        "agreement_with_rewards": _rewards(known, answers),
    }


def _raters(answers: Sequence[Answer]) -> Figures:
    """Per rater: answers, median seconds, and the share of left among sides chosen, which shows a habit."""
    found = {}
    for own in _by_rater(answers).values():
        sides = [answer for answer in own if answer.choice in ("first", "second")]
        left = [answer.left == CHOICES.index(answer.choice) for answer in sides]
        found[own[0].rater] = {
            "answers": len(own),
            "median_seconds": median(answer.seconds for answer in own),
            "left": sum(left) / len(left) if left else None,
        }
    return found


def _by_rater(answers: Sequence[Answer]) -> dict[str, list[Answer]]:
    found: dict[str, list[Answer]] = {}
    for answer in answers:
        found.setdefault(identify(answer.rater), []).append(answer)
    return found


def _groups(answers: Sequence[Answer]) -> np.ndarray:
    numbers = {text: number for number, text in enumerate(dict.fromkeys(answer.prompt for answer in answers))}
    return np.array([numbers[answer.prompt] for answer in answers], int)


def _decided(answers: Sequence[Answer]) -> list[Answer]:
    return [a for a in answers if a.value is not None and all(a.models) and a.models[0] != a.models[1]]


def _models(answers: Sequence[Answer]) -> Figures:
    """Per model: its Elo rating with a 95 % interval, best first."""
    decided = _decided(answers)
    names = list(dict.fromkeys(model for answer in decided for model in answer.models))
    if not names:
        return {}
    places = {name: place for place, name in enumerate(names)}
    groups = _groups(decided)
    by_prompt: list[list[Answer]] = [[] for _ in range(groups.max() + 1)]
    for answer, group in zip(decided, groups, strict=True):
        by_prompt[group].append(answer)
    wins = np.stack([count_wins(own, places) for own in by_prompt])
    games = Counter(model for answer in decided for model in answer.models)
    rated = sorted(zip(elo(wins), names, strict=True), reverse=True)
    return {name: {"elo": mid, "low": low, "high": high, "answers": games[name]} for (mid, low, high), name in rated}


def _win_rates(answers: Sequence[Answer]) -> Figures:
    """Per two models: how often the second is preferred to the first, ties half."""
    found: dict[tuple[str, str], list[tuple[Answer, float]]] = {}
    for answer in _decided(answers):
        assert answer.value is not None
        a, b = answer.models
        flip = (b, a) in found
        found.setdefault((b, a) if flip else (a, b), []).append((answer, answer.value if flip else 1 - answer.value))
    return {
        f"{b} over {a}": _rate(np.array([value for _, value in own]), _groups([answer for answer, _ in own]))
        for (a, b), own in found.items()
    }


def _rate(outcome: np.ndarray, groups: np.ndarray) -> Figures:
    rate: WinRate = rate_of_outcomes(outcome, groups)
    counts = {"wins": rate.wins, "ties": rate.ties, "losses": rate.losses}
    return {"rate": rate.rate.mean, "low": rate.rate.low, "high": rate.rate.high, **counts}


def _agreement(answers: Sequence[Answer]) -> Figures:
    """Krippendorff's alpha over all raters, and Cohen's kappa of every two: first, second or neither."""
    by_item: dict[str, list[float]] = {}
    for answer in answers:
        if answer.value is not None:
            by_item.setdefault(answer.pair, []).append(answer.value)
    several = [values for values in by_item.values() if len(values) > 1]
    by_rater = {
        own[0].rater: {a.pair: a.value for a in own if a.value is not None} for own in _by_rater(answers).values()
    }
    kappas = pairwise_kappa(by_rater)
    return {
        "alpha": _finite(krippendorff_alpha(several)),
        "pairs": len(several),
        "kappa": {f"{a} and {b}": {"kappa": _finite(k), "pairs": n} for (a, b), (k, n) in kappas.items()},
    }


def _rewards(known: Mapping[str, Comparison], answers: Sequence[Answer]) -> Figures:
    """Per reward, and for the data's own label: share of the choices of a side that it agrees with; ties half."""
    found: dict[str, tuple[list[Answer], list[float]]] = {}
    for answer in answers:
        pair = known.get(answer.pair)
        if pair is None or answer.choice not in ("first", "second"):
            continue
        for name, gap in _gaps(pair):
            own = found.setdefault(name, ([], []))
            own[0].append(answer)
            own[1].append(0.5 if gap == 0 else float((gap > 0) == (answer.choice == "first")))
    return {name: _rate(np.array(values), _groups(own)) for name, (own, values) in found.items()}


def _gaps(pair: Comparison) -> Iterator[tuple[str, float]]:
    if pair.label is not None:
        yield DATA_LABEL, pair.label - 0.5
    for name in pair.scores:
        if (gap := pair.gap(name)) is not None:
            yield name, gap


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def to_markdown(figures: Figures) -> str:
    """Format the figures as a short report."""
    choices = ", ".join(f"{name} {count}" for name, count in figures["choices"].items() if count)
    parts = [f"{figures['answers']} answers about {figures['answered_pairs']} of {figures['pairs']} pairs: {choices}"]
    raters = [
        [name, str(own["answers"]), f"{own['median_seconds']:.1f}", _percent(own["left"])]
        for name, own in figures["raters"].items()
    ]
    parts.append(_table(["rater", "answers", "median seconds", "left chosen"], raters))
    models = [
        [name, f"{own['elo']:.0f}", f"{own['low']:.0f} to {own['high']:.0f}", str(own["answers"])]
        for name, own in figures["models"].items()
    ]
    parts.append(_table(["model", "Elo", "95 % interval", "answers"], models))
    parts.append(_table(["win rate", "share", "95 % interval", "wins, ties, losses"], _rates(figures["win_rates"])))
    own = figures["agreement_of_raters"]
    if own["pairs"]:
        alpha = "–" if own["alpha"] is None else f"{own['alpha']:.2f}"
        parts.append(f"Krippendorff's alpha of {own['pairs']} pairs with several raters: {alpha}")
    kappas = [
        [name, "–" if k["kappa"] is None else f"{k['kappa']:.2f}", str(k["pairs"])] for name, k in own["kappa"].items()
    ]
    parts.append(_table(["raters", "Cohen's kappa", "pairs"], kappas))
    judged = _rates(figures["agreement_with_rewards"])
    parts.append(_table(["reward", "agreement", "95 % interval", "agrees, ties, differs"], judged))
    return "\n\n".join(filter(None, parts))


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *([inert(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _rates(figures: Mapping[str, Figures]) -> list[list[str]]:
    return [
        [name, _percent(own["rate"]), f"{_percent(own['low'])} to {_percent(own['high'])}",
         f"{own['wins']}, {own['ties']}, {own['losses']}"]
        for name, own in figures.items()
    ]  # fmt: skip


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"
