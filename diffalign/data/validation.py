"""What is wrong with a data set, sample by sample, and what becomes of it."""

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
    "Fault",
    "Kind",
    "Quarantine",
    "check_actions",
    "fault_lines",
    "printable",
]
EXAMPLES = 5  # of each kind of fault, in a message


@dataclass(frozen=True)
class Kind:
    """A kind of fault. actions: what can be done about it, the default first. image: found by reading images."""

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
    """Something in a data set is wrong or odd; it was left out, or kept as configured."""


class Fault(ValueError):
    """A sample that cannot be used as it is. kind: one of ``KINDS``; where: file, or source and row, and column."""

    def __init__(self, kind: str, where: str, detail: str) -> None:
        assert kind in KINDS, kind
        detail = shorten(detail, 500)
        super().__init__(f"{shorten(where, 600)}: {detail}")
        self.kind, self.where, self.detail = kind, where, detail


class Quarantine:
    """Collects the faults of a data set: each sample once, however often it comes by.

    actions: by kind, where the default will not do. max_bad_share: the largest share of samples that may be left out.
    rows: of the data set; examined: samples whose images were decoded before the run; skipped: what is left out without
    being a fault, "ties" and "unlabelled"; notes: files of a folder that are not read, a line per kind; dropped: where
    a sample was left out; found: by kind, where and why, of kept samples only the first few; kept: by kind, how many.
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

    def keeps(self, fault: Fault) -> bool:
        """Notes a fault; True where its sample is used all the same. ValueError: its kind is not tolerated."""
        action = self.actions[fault.kind]
        if action == "error":
            raise ValueError(f"{fault} ({fault.kind}): fix it, or set on_fault.{fault.kind} to drop") from fault
        if action == "keep":
            self.kept[fault.kind] += 1
        else:
            self.dropped.add(fault.where)
        if action == "drop" or self.kept[fault.kind] <= EXAMPLES:
            self.found[fault.kind][fault.where] = fault.detail
        return action == "keep"

    def why(self, where: str) -> str:
        """Why a sample was left out."""
        return next(faults[where] for faults in self.found.values() if where in faults)

    def count(self, kind: str) -> int:
        """How many faults of a kind there are."""
        return self.kept[kind] or len(self.found[kind])

    def bad(self, image: bool) -> int:
        """How many samples are left out: for what their images are, or for what their rows are."""
        kinds = (kind for kind in KINDS if KINDS[kind].image == image and self.actions[kind] == "drop")
        return sum(len(self.found[kind]) for kind in kinds)

    def bad_share(self, images: int | None = None) -> float:
        """The share of rows left out, plus that of pairs among those ``images`` that were read; default: examined."""
        return self.bad(False) / max(1, self.rows) + self.bad(True) / max(1, images or self.examined)

    def enforce(self, images: int | None = None) -> None:
        """ValueError where more than ``max_bad_share`` is left out."""
        if (share := self.bad_share(images)) > self.max_bad_share:
            text = (
                f"{share:.1%} of the data cannot be used, more than max_bad_share {self.max_bad_share:.1%}:\n"
                + "\n".join(self.lines())
                + "\nfix the data (diffalign check names every fault), or raise max_bad_share"
            )
            raise ValueError(bounded(text))

    def lines(self) -> list[str]:
        """A line per kind of fault that was found, with the first few by name, and the notes."""
        return [*fault_lines(self.summary()["faults"]), *self.notes]

    def summary(self) -> dict[str, Any]:
        """For JSON: rows, examined, skipped, bad_share, and of each kind action, count and samples."""
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
    """The "faults" of a summary, for people."""
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
    """The action for every kind. ValueError: an unknown kind, or an action that cannot be taken."""
    for kind, action in actions.items():
        if kind not in KINDS:
            raise ValueError(f"on_fault: unknown kind {kind!r}; known: {', '.join(KINDS)}")
        if action not in KINDS[kind].actions:
            raise ValueError(f"on_fault.{kind}: {action!r} is not possible; choose {' or '.join(KINDS[kind].actions)}")
    return {kind: actions.get(kind, KINDS[kind].actions[0]) for kind in KINDS}
