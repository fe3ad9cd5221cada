"""Width pruning of trees (BranchGRPO, arXiv 2509.06040): which branches after the last split are trained."""

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


def kept_nodes(buffer: RolloutBuffer, plan: Plan, pruning: Pruning, rewards: Tensor) -> Tensor:
    """Return which nodes are not pruned: (N,) bool; all up to the last split.

    Advantages are computed with all nodes, pruned ones included.

    Args:
        buffer: Nodes of trees of ``plan``.
        plan: It splits.
        pruning: "none" keeps all; "best" the best leaf below each state that splits last; "best_worst" the best and
            the worst leaf of each tree.
        rewards: (L,), of the leaves; one that is not finite is neither best nor worst, unless all are.
    """
    if pruning == "none":
        return torch.ones_like(buffer.leaf)
    per_tree, split = leaves_per_tree(plan), last_split(plan)
    each = per_tree // paths(plan, split) if pruning == "best" else per_tree
    high, low = (rewards.double().cpu().nan_to_num(nan=v, posinf=v, neginf=v).view(-1, each) for v in (-1e300, 1e300))
    best = high.argmax(1)
    kept = torch.nn.functional.one_hot(best, each).bool()
    if pruning == "best_worst":
        worst = low.scatter(1, best[:, None], torch.inf).argmin(1)
        kept |= torch.nn.functional.one_hot(worst, each).bool()

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


def kept_per_level(plan: Plan, pruning: Pruning, level: int) -> int:
    """Count the nodes of a tree at a level that are not pruned."""
    nodes = paths(plan, level)
    if pruning == "none" or level <= last_split(plan):
        return nodes
    return paths(plan, last_split(plan)) if pruning == "best" else min(2, nodes)
