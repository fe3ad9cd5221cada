"""Group-relative advantages (GRPO, arXiv 2402.03300; on images Flow-GRPO, arXiv 2505.05470)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# Rewards arrive in float32: a spread of a few units in the last place of their magnitude is rounding, not preference.
FLAT = 4 * torch.finfo(torch.float32).eps


def group_advantages(
    rewards: Mapping[str, Tensor],
    groups: Tensor,
    *,
    weights: Mapping[str, float] | None = None,
    std: Literal["group", "global", "unit"] = "group",
    aggregate: Literal["rewards", "advantages"] = "rewards",
    epsilon: float = 1e-4,
    clip: float | None = 5.0,
    diversity: Tensor | None = None,
) -> Tensor:
    """Compute advantages A = (r - mean of its group) / (std + epsilon), clipped to +-clip: (N,), float32.

    A sample with a non-finite reward gets 0 and is left out of every mean and deviation. A group whose rewards are all
    equal, or that has one sample left, gets exactly 0.

    Args:
        rewards: Rewards by name, each (N,), of the whole iteration (gathered over processes).
        groups: (N,), integer labels.
        weights: Factor of each reward, 1 by default; rewards of weight 0 are ignored.
        std: Population standard deviation to divide by: that of the sample's "group", or of the iteration ("global");
            "unit" divides by 1, so that A = r - mean.
        aggregate: "rewards" normalises the weighted sum; "advantages" sums the weighted advantages of each reward.
        epsilon: Added to the standard deviation.
        clip: Largest absolute value; None for no bound.
        diversity: (N,), d >= 0; positive advantages are multiplied by d / mean of its group (GARDO, arXiv 2512.24138),
            but where that is not finite.

    Raises:
        ValueError: An unknown option or weight, no reward of non-zero weight, or lengths that differ.
    """
    if std not in ("group", "global", "unit") or aggregate not in ("rewards", "advantages"):
        raise ValueError(
            f"got std {std!r}, aggregate {aggregate!r}: use group, global or unit, and rewards or advantages"
        )
    if epsilon < 0 or (clip is not None and not clip > 0):
        raise ValueError(f"got epsilon {epsilon}, clip {clip}: epsilon must not be negative, clip positive or None")
    terms, finite = _terms(rewards, groups, weights)
    zero = torch.zeros((), dtype=torch.float64)
    if aggregate == "rewards":
        terms = [(1.0, sum((w * r for w, r, _ in terms), zero), sum((abs(w) * m for w, _, m in terms), zero))]
    members = _Groups(groups, finite)
    total = sum((w * members.normalise(r, m, std, epsilon) for w, r, m in terms), zero)
    if diversity is not None:
        share = members.relative(diversity.double())
        total = torch.where((total > 0) & share.isfinite(), total * share, total)
    return (total if clip is None else total.clamp(-clip, clip)).float()


def flat_share(rewards: Mapping[str, Tensor], groups: Tensor, weights: Mapping[str, float] | None = None) -> float:
    """Return the share of groups, in [0, 1], whose rewards are equal up to rounding, so that they have no gradient.

    Arguments and errors as in ``group_advantages``.
    """
    terms, finite = _terms(rewards, groups, weights)
    members = _Groups(groups, finite)
    flat = torch.stack([members.flat(r, m) for _, r, m in terms]).all(0)
    return float(flat.double().mean())


def weighted_total(rewards: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Sum rewards by their weights, in their dtype; NaN where one failed that has a weight other than 0.

    Args:
        rewards: Tensors of one shape, by name.
        weights: Factors of those that count.
    """
    known = next(iter(rewards.values()))
    return sum((weight * rewards[name] for name, weight in weights.items() if weight), torch.zeros_like(known))


def subtree_mean(leaf_values: Tensor, leaf: Tensor, parent: Tensor) -> Tensor:
    """Average values of the leaves over the subtree of each node: (N,), float64. NaN where no leaf has a value.

    Args:
        leaf_values: (L,), in the order of the leaves; NaN leaves are left out of every mean.
        leaf: (N,) bool.
        parent: (N,) int64, the row of the parent, -1 for a root.
    """
    total, count = _subtree_sums(leaf_values, leaf, parent)
    return total / count


def _subtree_sums(leaf_values: Tensor, leaf: Tensor, parent: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the values of the leaves under each node that are not NaN, and count them."""
    values = leaf_values.double()
    usable = ~values.isnan()
    total = torch.zeros(len(leaf), dtype=torch.float64)
    count = torch.zeros(len(leaf), dtype=torch.float64)

    rows = leaf.nonzero().flatten()
    while len(rows):
        total.index_add_(0, rows, torch.where(usable, values, 0.0))
        count.index_add_(0, rows, usable.double())
        rows = parent[rows]
        values, usable, rows = values[rows >= 0], usable[rows >= 0], rows[rows >= 0]
    return total, count


@dataclass(frozen=True)
class Tree:
    """The columns of a buffer that advantage rules read.

    Attributes:
        tree: (N,) int64, equal for the nodes of one tree.
        parent: (N,) int64, row of the parent, -1 for a root.
        depth: (N,) int64.
        leaf: (N,) bool.
        log_prob: (N,) float64, of the transition from the parent, NaN if not trained; None if no rule needs it.
    """

    tree: Tensor
    parent: Tensor
    depth: Tensor
    leaf: Tensor
    log_prob: Tensor | None = None


RuleFunction = Callable[[Tree, Tensor], Tensor]


@dataclass(frozen=True)
class AdvantageRule:
    """A rule that gives every node of trees an advantage.

    Attributes:
        compute: Maps trees and a value per leaf, (L,), to advantages of nodes, (N,), float64.
        of: The values that it reads: the leaves' group-relative advantages, or their weighted total rewards.
    """

    compute: RuleFunction
    of: Literal["advantages", "rewards"]


ADVANTAGE_RULES: dict[str, AdvantageRule] = {}


def advantage_rule(
    name: str, of: Literal["advantages", "rewards"] = "advantages"
) -> Callable[[RuleFunction], RuleFunction]:
    """Register an advantage rule in ``ADVANTAGE_RULES``. ValueError: the name is taken."""

    def register(compute: RuleFunction) -> RuleFunction:
        if name in ADVANTAGE_RULES:
            raise ValueError(f"advantage rule {name!r} is registered already: choose another name")
        ADVANTAGE_RULES[name] = AdvantageRule(compute, of)
        return compute

    return register


@advantage_rule("leaf")
def leaf_advantages(tree: Tree, advantages: Tensor) -> Tensor:
    """Give a node the advantage of the one leaf under it, and 0 where leaves of a branching share it.

    On chains this is Flow-GRPO; on trees only the transitions after the last branching are trained on.
    """
    total, _ = _subtree_sums(advantages, tree.leaf, tree.parent)
    _, leaves = _subtree_sums(torch.ones_like(advantages), tree.leaf, tree.parent)
    return torch.where(leaves == 1, total, 0.0)


@advantage_rule("subtree_mean")
def subtree_mean_advantages(tree: Tree, advantages: Tensor) -> Tensor:
    """Give a node the mean advantage of the leaves in its subtree.

    Training each shared transition once on it has the gradient of training it once per leaf, up to the clipping.
    """
    return subtree_mean(advantages, tree.leaf, tree.parent)


@advantage_rule("per_depth", of="rewards")
def per_depth_advantages(tree: Tree, rewards: Tensor) -> Tensor:
    """Normalise the mean reward of each node's leaves over the nodes of its depth and tree (BranchGRPO, 2509.06040).

    A = (r - mean) / (std + 1e-8) with the population std, and 0 where the rewards of a depth are equal up to rounding.

    Departures from the released code:
    1. A depth is flat where its spread is rounding of float32 (``FLAT``), not where its std is below 1e-6.
    2. Leaves with a non-finite reward are left out; a node without any other leaf gets 0.

    Raises:
        ValueError: Every tree is a chain, in which no node has another to compare with.
    """
    _need_branches(tree, "per_depth")
    return _by_depth(tree, subtree_mean(_usable(rewards), tree.leaf, tree.parent))


@advantage_rule("per_depth_weighted", of="rewards")
def per_depth_weighted_advantages(tree: Tree, rewards: Tensor) -> Tensor:
    """Normalise as ``per_depth`` what paths are worth: V = sum over children of softmax(log p of the child) V(child).

    It is BranchGRPO's other fusion of rewards (2509.06040). log p is a mean over dimensions, as in the released code;
    children of untrained steps weigh the same.
    """
    _need_branches(tree, "per_depth_weighted")
    assert tree.log_prob is not None
    value = torch.full(tree.leaf.shape, torch.nan, dtype=torch.float64)
    value[tree.leaf] = _usable(rewards)
    density = tree.log_prob.cpu().nan_to_num(nan=0.0)
    for depth in range(int(tree.depth.max()), 0, -1):
        rows = ((tree.depth == depth) & value.isfinite()).nonzero().flatten()
        parents = tree.parent[rows]
        most = torch.full_like(value, -math.inf).scatter_reduce(0, parents, density[rows], "amax")
        weight = (density[rows] - most[parents]).exp()
        total, norm = (torch.zeros_like(value).index_add(0, parents, w) for w in (weight * value[rows], weight))
        value[norm > 0] = (total / norm)[norm > 0]
    return _by_depth(tree, value)


@advantage_rule("granular", of="rewards")
def granular_advantages(tree: Tree, rewards: Tensor) -> Tensor:
    """Sum the standardised rewards of a state's finishes at several strides (Granular-GRPO, 2510.01982).

    The i-th leaves of the states of a tree are a granularity: A = sum over i of (r_i - mean) / (std + 1e-8) over the
    tree's states. Leaves get their own term. A state without a finite reward at a granularity has no term of it.
    """
    leaves = tree.leaf.nonzero().flatten()
    parents = tree.parent[leaves]
    if len(leaves) == 0 or (parents < 0).any():
        raise ValueError("granular compares the finishes of states, and the plan does not branch: use subtree_mean")
    begins = torch.cat([torch.tensor([True]), parents[1:] != parents[:-1]])
    first = torch.where(begins, torch.arange(len(leaves)), 0).cummax(0).values
    labels = torch.unique(torch.stack([tree.tree[leaves], torch.arange(len(leaves)) - first], 1), dim=0,
                          return_inverse=True)[1]  # fmt: skip
    values = _usable(rewards)
    clean = values.nan_to_num(nan=0.0)
    terms = _Groups(labels, values.isfinite()).normalise(clean, clean.abs(), std="group", epsilon=1e-8)
    found = torch.zeros(tree.leaf.shape, dtype=torch.float64).index_add(0, parents, terms)
    found[leaves] = terms
    return found


def _need_branches(tree: Tree, name: str) -> None:
    if int(tree.leaf.sum()) == len(torch.unique(tree.tree)):
        raise ValueError(f"{name} compares the nodes of a tree, and the plan does not branch: use subtree_mean")


def _usable(rewards: Tensor) -> Tensor:
    return torch.where(rewards.isfinite(), rewards.double(), torch.nan)


def _by_depth(tree: Tree, values: Tensor) -> Tensor:
    """Standardise values of nodes over the nodes of their depth and tree; 0 where they are NaN."""
    usable = values.isfinite()
    clean = torch.where(usable, values, 0.0)
    labels = torch.unique(torch.stack([tree.tree, tree.depth], 1), dim=0, return_inverse=True)[1]
    return _Groups(labels, usable).normalise(clean, clean.abs(), std="group", epsilon=1e-8)


Term = tuple[float, Tensor, Tensor]


def _terms(
    rewards: Mapping[str, Tensor], groups: Tensor, weights: Mapping[str, float] | None
) -> tuple[list[Term], Tensor]:
    """Return (weight, reward, magnitude) of rewards of non-zero weight, float64, 0 if unusable; usable samples (N,)."""
    weights = {} if weights is None else weights
    if unknown := sorted(weights.keys() - rewards.keys()):
        raise ValueError(f"weights for unknown rewards {', '.join(unknown)}; known: {', '.join(rewards)}")
    used = {name: reward.double() for name, reward in rewards.items() if weights.get(name, 1.0) != 0}
    if not used:
        raise ValueError("no reward of non-zero weight: give at least one")
    for name, reward in used.items():
        if groups.ndim != 1 or reward.shape != groups.shape:
            raise ValueError(f"reward {name!r} of shape {tuple(reward.shape)}, groups {tuple(groups.shape)}: both (N,)")
    finite = torch.stack([reward.isfinite() for reward in used.values()]).all(0)
    clean = {name: torch.where(finite, reward, 0.0) for name, reward in used.items()}
    return [(weights.get(name, 1.0), reward, reward.abs()) for name, reward in clean.items()], finite


class _Groups:
    """Sums and extremes of the usable samples of each group."""

    def __init__(self, groups: Tensor, finite: Tensor) -> None:
        labels, self.index = torch.unique(groups, return_inverse=True)
        self.finite = finite
        self.num = len(labels)
        self.count = self.sum(finite.double())

    def sum(self, values: Tensor) -> Tensor:
        """Sum values (N,), which are 0 where unusable, over groups: (G,)."""
        return values.new_zeros(self.num).index_add(0, self.index, values)

    def max(self, values: Tensor) -> Tensor:
        """Return the largest usable value of each group, (G,); -inf for a group without one."""
        usable = torch.where(self.finite, values, -math.inf)
        return values.new_full((self.num,), -math.inf).scatter_reduce(0, self.index, usable, "amax")

    def centre(self, values: Tensor) -> Tensor:
        """Subtract the mean of the group, (N,); 0 where unusable."""
        mean = self.sum(values) / self.count.clamp(min=1)
        return torch.where(self.finite, values - mean[self.index], 0.0)

    def relative(self, values: Tensor) -> Tensor:
        """Divide values by the mean of their group over those that are finite: (N,); not finite where that is 0."""
        known = values.isfinite()
        mean = self.sum(torch.where(known, values, 0.0)) / self.sum(known.double())
        return values / mean[self.index]

    def flat(self, values: Tensor, magnitude: Tensor) -> Tensor:
        """Return whether the usable values of each group are equal up to rounding or fewer than two: (G,) bool."""
        spread = self.max(values) + self.max(-values)
        return (self.count < 2) | (spread <= FLAT * self.max(magnitude))

    def normalise(
        self, values: Tensor, magnitude: Tensor, std: Literal["group", "global", "unit"], epsilon: float
    ) -> Tensor:
        """Divide offsets from the group's mean by (std + epsilon), (N,); exactly 0 in flat groups."""
        offsets = centred = self.centre(values)
        if std == "global":
            chosen = values[self.finite]
            offsets = centred / ((chosen - chosen.mean()).square().mean().sqrt() + epsilon)
        elif std == "group":
            deviation = (self.sum(centred.square()) / self.count.clamp(min=1)).sqrt()[self.index]
            offsets = centred / (deviation + epsilon)
        return torch.where(self.flat(values, magnitude)[self.index], 0.0, offsets)
