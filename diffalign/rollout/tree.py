"""The shape of a plan's sampling tree: how many nodes each level has, their paths and parents."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.diffusion.plan import Plan


def paths(plan: Plan, step: int) -> int:
    """Count the nodes of a tree at level ``step``: the product of the branch factors up to there.

    At the end of a plan with strides, each path has an end per stride. ``plan`` is that of one tree: ``Plan.tree``.
    """
    return math.prod(row.branch for row in plan.rows[:step]) * (len(plan.strides) if step == len(plan) else 1)


def leaves_per_tree(plan: Plan) -> int:
    """Return the images of each tree of a plan."""
    return paths(plan.tree(0), len(plan))


def transitions_per_tree(plan: Plan) -> int:
    """Return the trained transitions of each tree of a plan."""
    tree = plan.tree(0)
    return sum(paths(tree, step + 1) for step in tree.trained_steps)


def parents_per_tree(plan: Plan) -> int:
    """Return the states that the trained transitions of each tree of a plan begin in: each is one evaluation."""
    tree = plan.tree(0)
    return sum(paths(tree, step) for step in tree.trained_steps)


def trees_per_group(plan: Plan, group_size: int) -> int:
    """Return the number of trees that give ``group_size`` images per prompt.

    Raises:
        ValueError: The leaves of a tree do not divide the images of a group.
    """
    leaves, anchors = leaves_per_tree(plan), max(1, len(plan.anchors))
    least = leaves * anchors
    if anchors > 1 and group_size % least:
        raise ValueError(
            f"group_size {group_size}: the plan branches at {anchors} steps into {leaves} images each, so images per "
            f"prompt come in multiples of {least}; set group_size: {-(-group_size // least) * least}"
        )
    if group_size % leaves:
        factors = " x ".join(str(row.branch) for row in plan.rows if row.branch > 1)
        raise ValueError(
            f"group_size {group_size}: a tree of branch factors {factors} has {leaves} images, so images per prompt "
            f"come in multiples of {leaves}; set group_size: {-(-group_size // leaves) * leaves}"
        )
    return group_size // leaves


def path_table(plan: Plan, step: int) -> Tensor:
    """List the paths to the nodes of a tree at level ``step``: (paths, D) int64, in ascending order.

    A path has a digit per branching row of the plan (D of them; a chain has none), the index of the child taken there,
    and -1 where the branching lies after ``step``. Several strides add a digit, of the stride.
    """
    rows = [(index, row.branch) for index, row in enumerate(plan.rows) if row.branch > 1]
    rows += [(len(plan) - 1, len(plan.strides))] if len(plan.strides) > 1 else []
    digits = [range(branch) if index < step else (-1,) for index, branch in rows]
    table = list(itertools.product(*digits))
    return torch.tensor(table, dtype=torch.int64).reshape(len(table), len(rows))


def tree_parents(widths: Sequence[int]) -> Tensor:
    """Return the parent of each node of a tree that is stored level by level.

    Args:
        widths: Number of nodes of each level.
    """
    parents, begin = [torch.full((widths[0],), -1)], 0
    for width, following in itertools.pairwise(widths):
        parents.append(begin + torch.arange(following) // (following // width))
        begin += width
    return torch.cat(parents)


def depths(parent: Tensor) -> Tensor:
    """Count the stored ancestors of each node."""
    depth, above = torch.zeros_like(parent), parent
    while (above >= 0).any():
        depth, above = depth + (above >= 0), torch.where(above < 0, -1, parent[above])
    return depth
