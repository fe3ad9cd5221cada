"""Collect the errors of a data set by sample, and drop, keep or refuse the samples as configured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffalign.files import bounded, printable, shorten

__all__ = [
    "EXAMPLES",
    "KINDS",
    "DataWarning",
    "Kind",
    "Quarantine",
    "SampleError",
    "check_actions",
    "fault_lines",
    "printable",
]
EXAMPLES = 5  # of each kind of error, in a message


@dataclass(frozen=True)
class Kind:
    """A kind of error. actions: the possible actions, default first. image: whether finding it decodes images."""

    meaning: str
    actions: tuple[str, ...]
    image: bool = False


KINDS: dict[str, Kind] = {
    "bad_label": Kind("a label outside the set of its format", ("drop", "error")),
    "empty_caption": Kind("no text to go with the images", ("drop", "keep", "error")),
    "bad_row": Kind("a row whose cells do not fit its format", ("drop", "error")),
    "unreadable": Kind("an image that is missing or cannot be decoded", ("drop", "error"), image=True),
    "bad_mask": Kind("a mask that is missing, or does not fit its images", ("drop", "error"), image=True),
    "too_small": Kind("an image with a side below min_side", ("drop", "keep", "error"), image=True),
    "same_image": Kind("the same image on both sides", ("drop", "keep", "error"), image=True),
    "different_size": Kind("two images of different size", ("keep", "drop", "error"), image=True),
}


class DataWarning(UserWarning):
    """Warning about samples of a data set that were dropped, or kept as configured."""


class SampleError(ValueError):
    """An error of one sample. kind: one of ``KINDS``; where: file, or source and row, and column."""

    def __init__(self, kind: str, where: str, detail: str) -> None:
        assert kind in KINDS, kind
        detail = shorten(detail, 500)
        super().__init__(f"{shorten(where, 600)}: {detail}")
        self.kind, self.where, self.detail = kind, where, detail


class Quarantine:
    """The errors of a data set. A sample counts once, however often it is read.

    Args:
        actions: By kind of error; kinds that are not named take their default action.
        max_bad_share: Largest share of dropped samples, in [0, 1].

    Attributes:
        rows: Rows of the data set.
        examined: Samples whose images were decoded before the run.
        skipped: Counts of pairs that are not used though nothing is wrong with them: "ties" and "unlabelled".
        notes: A line per kind of file in a folder that is not read.
        dropped: Names of the dropped samples.
        found: By kind, name and detail of the errors; of kept samples only the first ``EXAMPLES``.
        kept: By kind, how many samples with this error were kept.
    """

    def __init__(self, actions: Mapping[str, str] | None = None, max_bad_share: float = 0.01) -> None:
        self.actions = check_actions(actions or {})
        self.max_bad_share = max_bad_share
        self.rows = 0
        self.examined = 0
        self.skipped: Counter[str] = Counter()
        self.notes: list[str] = []
        self.kept: Counter[str] = Counter()
        self.found: dict[str, dict[str, str]] = {kind: {} for kind in KINDS}
        self.dropped: set[str] = set()

    def keeps(self, error: SampleError) -> bool:
        """Record an error; return whether its sample is kept. Raises ValueError if the action is "error"."""
        action = self.actions[error.kind]
        if action == "error":
            raise ValueError(f"{error} ({error.kind}): fix it, or set on_fault.{error.kind} to drop") from error
        if action == "keep":
            self.kept[error.kind] += 1
        else:
            self.dropped.add(error.where)
        if action == "drop" or self.kept[error.kind] <= EXAMPLES:
            self.found[error.kind][error.where] = error.detail
        return action == "keep"

    def why(self, where: str) -> str:
        """Return why a sample was dropped."""
        return next(faults[where] for faults in self.found.values() if where in faults)

    def count(self, kind: str) -> int:
        """Count the errors of a kind."""
        return self.kept[kind] or len(self.found[kind])

    def bad(self, image: bool) -> int:
        """Count the dropped samples, by errors of images or by errors of rows."""
        kinds = (kind for kind in KINDS if KINDS[kind].image == image and self.actions[kind] == "drop")
        return sum(len(self.found[kind]) for kind in kinds)

    def bad_share(self, images: int | None = None) -> float:
        """Add the share of dropped rows and that of dropped samples among ``images`` (default: ``examined``)."""
        return self.bad(False) / max(1, self.rows) + self.bad(True) / max(1, images or self.examined)

    def enforce(self, images: int | None = None) -> None:
        """Raise ValueError if more than ``max_bad_share`` of the data was dropped."""
        if (share := self.bad_share(images)) > self.max_bad_share:
            text = (
                f"{share:.1%} of the data cannot be used, more than max_bad_share {self.max_bad_share:.1%}:\n"
                + "\n".join(self.lines())
                + "\nfix the data (diffalign check names every fault), or raise max_bad_share"
            )
            raise ValueError(bounded(text))

    def lines(self) -> list[str]:
        """Format the errors, a line per kind with the first few samples, and the notes."""
        return [*fault_lines(self.summary()["faults"]), *self.notes]

    def summary(self) -> dict[str, Any]:
        """Return JSON values: rows, examined, skipped, bad_share, and by kind action, count and samples."""
        return {
            "rows": self.rows,
            "examined": self.examined,
            "skipped": dict(self.skipped),
            "not_read": list(self.notes),
            "bad_share": self.bad_share(),
            "faults": {
                kind: {"action": self.actions[kind], "count": self.count(kind), "samples": dict(faults)}
                for kind, faults in self.found.items()
            },
        }


def fault_lines(faults: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Format the "faults" of a summary, a line per kind with the first few samples."""
    lines = []
    for kind, found in faults.items():
        if count := found["count"]:
            lines.append(f"{kind}: {count} ({KINDS[kind].meaning}; {found['action']})")
            lines += [
                f"  {shorten(f'{where}: {detail}', 600)}" for where, detail in list(found["samples"].items())[:EXAMPLES]
            ]
            lines += [f"  ... and {count - EXAMPLES} more"] if count > EXAMPLES else []
    return lines


def check_actions(actions: Mapping[str, str]) -> dict[str, str]:
    """Complete actions with the defaults. Raises ValueError for an unknown kind or an impossible action."""
    for kind, action in actions.items():
        if kind not in KINDS:
            raise ValueError(f"on_fault: unknown kind {kind!r}; known: {', '.join(KINDS)}")
        if action not in KINDS[kind].actions:
            raise ValueError(f"on_fault.{kind}: {action!r} is not possible; choose {' or '.join(KINDS[kind].actions)}")
    return {kind: actions.get(kind, KINDS[kind].actions[0]) for kind in KINDS}
