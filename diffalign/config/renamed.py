"""Renamed and removed fields: class name -> field -> its new name, or the reason for its removal."""

from __future__ import annotations

from collections.abc import Mapping

RENAMED: Mapping[str, Mapping[str, str]] = {
    "ForwardRLConfig": {"times_per_pass": "train_times_per_forward"},
}
NO_ADVANTAGES = "Diffusion-DPO computes no advantages"
REMOVED: Mapping[str, Mapping[str, str]] = {
    "DiffusionDPOConfig": {
        "advantage_std": NO_ADVANTAGES,
        "advantage_epsilon": NO_ADVANTAGES,
        "advantage_clip": NO_ADVANTAGES,
        "aggregate": NO_ADVANTAGES,
    },
}


def about_removed(owner: str, path: str) -> str | None:
    """Suggest a replacement for a field of an earlier version; None for any other name."""
    if (new := RENAMED.get(owner, {}).get(path)) is not None:
        return f"is now {new!r}"
    if (reason := REMOVED.get(owner, {}).get(path)) is not None:
        return f"{reason}; leave it out"
    return None
