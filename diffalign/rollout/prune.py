"""Width pruning of trees (BranchGRPO, arXiv 2509.06040): which branches after the last split are trained.

Departure from the released code: it is images that are ranked and kept, with their paths after the last split, where
that code ranks transitions.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from diffalign.diffusion.plan import Plan
from diffalign.rollout.buffer import RolloutBuffer
from diffalign.rollout.tree import leaves_per_tree, paths

Pruning = Literal["none", "best", "best_worst"]


def last_split(plan: Plan) -> int:
    """Return the last step at which a tree branches."""
    return max(step for step, row in enumerate(plan.rows) if row.branch > 1)


def kept_count(pruning: Pruning, leaves: int, ratio: float) -> int:
    """Return how many of some leaves are kept: their share, but at least one, or one of each end."""
    return min(leaves, max(1 if pruning == "best" else 2, int(leaves * ratio + 1e-9)))


def kept_nodes(buffer: RolloutBuffer, plan: Plan, pruning: Pruning, rewards: Tensor, ratio: float = 0.5) -> Tensor:
    """Return which nodes are not pruned: (N,) bool; all up to the last split.

    Advantages are computed with all nodes, pruned ones included.

    Args:
        buffer: Nodes of trees of ``plan``.
        plan: It splits.
        pruning: "none" keeps all; "best" the best leaves below each state that splits last; "best_worst" as many of
            the best as of the worst leaves of each tree, or one more of these.
        rewards: (L,), of the leaves; one that is not finite is neither best nor worst, unless too few are.
        ratio: Share of the leaves to keep, see ``kept_count``.
    """
    if pruning == "none":
        return torch.ones_like(buffer.leaf)
    per_tree, split = leaves_per_tree(plan), last_split(plan)
    each = per_tree // paths(plan, split) if pruning == "best" else per_tree
    count = kept_count(pruning, each, ratio)
    best = count if pruning == "best" else count // 2
    high, low = (rewards.double().cpu().nan_to_num(nan=v, posinf=v, neginf=v).view(-1, each) for v in (-1e300, 1e300))
    kept = torch.zeros_like(high, dtype=torch.bool)
    kept.scatter_(1, high.argsort(dim=1, descending=True, stable=True)[:, :best], True)
    kept.scatter_(1, low.masked_fill(kept, torch.inf).argsort(dim=1, stable=True)[:, : count - best], True)

    found = buffer.step <= split
    rows = buffer.leaves[kept.flatten()]
    while len(rows):
        found[rows] = True
        rows = buffer.parent[rows]
        rows = rows[rows >= 0]
    return found


def best_paths(buffer: RolloutBuffer, plan: Plan, rewards: Tensor) -> Tensor:
    """Return which nodes lie on the path to the best leaf of their tree: (N,) bool. Arguments: see ``kept_nodes``."""
    per_tree = leaves_per_tree(plan)
    best = rewards.double().cpu().nan_to_num(nan=-1e300, neginf=-1e300).view(-1, per_tree).argmax(1)
    found, rows = torch.zeros_like(buffer.leaf), buffer.leaves.view(-1, per_tree)[torch.arange(len(best)), best]
    while len(rows):
        found[rows] = True
        rows = buffer.parent[rows]
        rows = rows[rows >= 0]
    return found


def kept_per_level(plan: Plan, pruning: Pruning, level: int, ratio: float = 0.5) -> int:
    """Count the nodes of a tree at a level that are not pruned."""
    nodes = paths(plan, level)
    if pruning == "none" or level <= last_split(plan):
        return nodes
    states = paths(plan, last_split(plan)) if pruning == "best" else 1
    return states * kept_count(pruning, leaves_per_tree(plan) // states, ratio)
