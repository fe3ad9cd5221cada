"""Peak rates of cards, and the time that a rehearsed iteration takes on one."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

# Shares of the peaks that are assumed: what training of diffusion transformers and UNets usually reaches uncompiled.
SHARE_OF_RATE = 0.4
SHARE_OF_BANDWIDTH = 0.7


@dataclass(frozen=True)
class Card:
    """Published peaks of a card, dense, without sparsity.

    Attributes:
        title: Full name.
        memory: GB, 10^9 bytes.
        half: 10^12 operations a second of matrix products in bf16 with float32 accumulation.
        single: The same in float32, without TF32.
        bandwidth: 10^9 bytes a second of its memory.
        source: Where the figures are published.
    """

    title: str
    memory: int
    half: float
    single: float
    bandwidth: float
    source: str


CARDS = {
    "h200": Card("H200 SXM", 141, 989.4, 66.9, 4800, "NVIDIA H200 datasheet"),
    "h100": Card("H100 SXM", 80, 989.4, 66.9, 3350, "NVIDIA H100 datasheet"),
    "a100": Card("A100 SXM 80 GB", 80, 312, 19.5, 2039, "NVIDIA A100 datasheet"),
    "a100_40gb": Card("A100 SXM 40 GB", 40, 312, 19.5, 1555, "NVIDIA A100 datasheet"),
    "l40s": Card("L40S", 48, 362, 91.6, 864, "NVIDIA L40S datasheet"),
    "a6000": Card("RTX A6000", 48, 154.8, 38.7, 768, "NVIDIA Ampere GA102 whitepaper"),
    "5090": Card("GeForce RTX 5090", 32, 209.5, 104.8, 1792, "NVIDIA RTX Blackwell whitepaper"),
    "4090": Card("GeForce RTX 4090", 24, 165.2, 82.6, 1008, "NVIDIA Ada whitepaper"),
    "3090": Card("GeForce RTX 3090", 24, 71, 35.6, 936, "NVIDIA Ampere GA102 whitepaper"),
}


def find_card(name: str) -> Card:
    """Return a card by name. ValueError: unknown, with the names that are known."""
    key = name.lower().replace("-", "_").removeprefix("rtx").strip("_ ")
    if key not in CARDS:
        close = difflib.get_close_matches(key, CARDS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"--card: no card is named {name[:80]!r}{hint} Known: {', '.join(CARDS)}")
    return CARDS[key]


def seconds(card: Card, flops: float, traffic: float, half: bool) -> float:
    """Return the time of a phase: of its operations, or of its memory traffic where that takes longer."""
    rate = (card.half if half else card.single) * 1e12 * SHARE_OF_RATE
    return max(flops / rate, traffic / (card.bandwidth * 1e9 * SHARE_OF_BANDWIDTH))
