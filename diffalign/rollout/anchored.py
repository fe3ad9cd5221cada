"""Sample groups whose trees branch from one ODE: TempFlow-GRPO with branches, Granular-GRPO.

The trunk, an ODE from the noise that a group shares, is sampled once per group. At each anchor of the plan a tree
begins: the trunk's state, its children after one noisy step, and the ODE from each child to the end, once per stride.
The evaluation of the trunk at an anchor also is that of the children's mean, so that a group takes

    last anchor + 1 + sum over anchors s, children and strides g of ceil((N - s - 1) / g)

evaluations. Trees of a process are ordered by anchor, then by group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from diffalign.device import float64_device
from diffalign.diffusion.plan import Plan
from diffalign.models import DiffusionModel
from diffalign.rollout.buffer import RolloutBuffer
from diffalign.rollout.generate import NoiseKeys, store
from diffalign.rollout.sampler import SamplingPlan, Solver, micro_batches, ode_plan, sample
from diffalign.rollout.tree import trees_per_group
from diffalign.structures import Conditioning, Prompt


def anchored_trees(plan: Plan, groups: Sequence[int], group_size: int) -> tuple[Tensor, Tensor]:
    """Return (group, index in the group) of the trees of some groups, ordered by anchor."""
    anchors = len(plan.anchors)
    rounds = trees_per_group(plan, group_size) // anchors
    group = torch.tensor(list(groups)).repeat_interleave(rounds).repeat(anchors)
    turn = torch.arange(rounds).repeat(len(groups) * anchors) * anchors
    return group, turn + torch.arange(anchors).repeat_interleave(len(groups) * rounds)


def allocate_anchored(
    plan: Plan,
    group: Tensor,
    sample_index: Tensor,
    prompts: list[Prompt],
    latent_shape: Sequence[int],
    *,
    device: torch.device | str = "cpu",
    means: bool = False,
    pinned: bool = False,
) -> RolloutBuffer:
    """Allocate the nodes of trees that ``anchored_trees`` ordered, without latents; see ``RolloutBuffer.allocate``."""
    anchor = sample_index % len(plan.anchors)
    parts = [
        RolloutBuffer.allocate(plan.tree(index), group[anchor == index], sample_index[anchor == index], prompts, (0,))
        for index in range(len(plan.anchors))
    ]
    starts = [0, *torch.tensor([len(part.step) for part in parts]).cumsum(0).tolist()]
    names = ("group", "sample", "depth", "step", "path", "leaf", "trained")
    columns: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    parents = [torch.where(p.parent < 0, -1, p.parent + start) for p, start in zip(parts, starts, strict=False)]
    place: dict[str, Any] = {"device": "cpu", "pin_memory": True} if pinned else {"device": device}
    count = starts[-1]
    return RolloutBuffer(
        **columns,
        parent=torch.cat(parents),
        x=torch.empty(count, *latent_shape, **place),
        log_prob=torch.full((count,), torch.nan, dtype=torch.float64, device=float64_device(device)),
        advantage=torch.zeros(count, device=device),
        prompts=prompts,
        mean=torch.empty(int(columns["trained"].sum()), *latent_shape, **place) if means else None,
    )


def _view(buffer: RolloutBuffer, rows: slice) -> RolloutBuffer:
    """Return the nodes of consecutive trees; what is written to its latents and log-probs is written to the buffer."""
    columns = {
        f.name: getattr(buffer, f.name)[rows] for f in fields(buffer) if f.name not in ("prompts", "mean", "rewards")
    }
    columns["parent"] = torch.where(columns["parent"] < 0, -1, columns["parent"] - rows.start)
    begin, count = int(buffer.trained[: rows.start].sum()), int(columns["trained"].sum())
    mean = None if buffer.mean is None else buffer.mean[begin : begin + count]
    return replace(buffer, **columns, mean=mean, rewards={})


@dataclass(frozen=True)
class _Part:
    """The trees of one anchor.

    Attributes:
        anchor: The step at which they branch.
        plan: How they are sampled.
        keys: An entry per tree.
        buffer: Their nodes.
        first: Index of their first leaf among all leaves.
        children: Children of each state.
    """

    anchor: int
    plan: SamplingPlan
    keys: NoiseKeys
    buffer: RolloutBuffer
    first: int
    children: int


def anchored_latents(
    model: DiffusionModel,
    plan: SamplingPlan,
    conditioning: Conditioning,
    keys: NoiseKeys,
    buffer: RolloutBuffer,
    size: int,
) -> Iterator[tuple[slice, Tensor]]:
    """Sample the trees of a buffer of ``allocate_anchored``, and yield their latents; as ``rollout_latents``.

    Raises:
        ValueError: The groups do not share their initial noise.
    """
    if not keys.shared_start:
        raise ValueError("trees of one trunk share their initial noise: set shared_start: true")
    parts = _parts(plan, keys, buffer)
    groups = torch.unique_consecutive(parts[0].keys.group)
    for rows in micro_batches(len(groups), size):
        _sample_trunk(
            model, plan, conditioning, replace(keys, group=groups[rows], sample=groups[rows] * 0), parts, rows
        )
    buffer.settle()
    for part in parts:
        yield from _finish(model, part, conditioning, max(1, size // len(plan.plan.strides)))


def _parts(plan: SamplingPlan, keys: NoiseKeys, buffer: RolloutBuffer) -> list[_Part]:
    anchors = plan.plan.anchors
    trees, nodes, leaves = (len(column) // len(anchors) for column in (keys.group, buffer.step, buffer.leaves))
    return [
        _Part(
            anchor,
            replace(plan, plan=plan.plan.tree(index)),
            keys[index * trees : (index + 1) * trees],
            _view(buffer, slice(index * nodes, (index + 1) * nodes)),
            index * leaves,
            plan.plan.rows[anchor].branch,
        )
        for index, anchor in enumerate(anchors)
    ]


@torch.no_grad()
def _sample_trunk(
    model: DiffusionModel,
    plan: SamplingPlan,
    conditioning: Conditioning,
    keys: NoiseKeys,
    parts: Sequence[_Part],
    rows: slice,
) -> None:
    """Sample the trunk of some groups up to the last anchor, and the children at each; store states and children.

    Args:
        keys: An entry per group.
        rows: The groups, by their order in each part.
    """
    own, by_anchor, shape = conditioning[keys.group], {part.anchor: part for part in parts}, model.latent_shape()
    ode = Solver(replace(plan, plan=ode_plan(len(plan.plan), plan.plan.rows[-1].solver)), model.parameterization)
    guidance = model.resolve_guidance(plan.guidance)
    x = keys.start(shape).to(model.device, parts[0].buffer.x.dtype, non_blocking=True)

    for index in range(plan.plan.anchors[-1] + 1):
        output = model.predict(x, plan.levels[index], own, guidance)
        if (part := by_anchor.get(index)) is not None:
            rounds = len(part.keys.group) // len(torch.unique_consecutive(part.keys.group))
            trees = slice(rows.start * rounds, rows.stop * rounds)
            store(part.buffer, index, trees, x.repeat_interleave(rounds, 0))
            children = slice(trees.start * part.children, trees.stop * part.children)
            noise = part.keys.at(part.plan.plan, index + 1)[children].step(shape, index)
            many = rounds * part.children
            result = Solver(part.plan, model.parameterization).step(
                x.repeat_interleave(many, 0), output.repeat_interleave(many, 0), index, noise=noise.to(x.device)
            )
            store(part.buffer, index + 1, children, result.x_next, result)
        if index < plan.plan.anchors[-1]:
            x = ode.step(x, output, index).x_next


def _finish(
    model: DiffusionModel, part: _Part, conditioning: Conditioning, size: int
) -> Iterator[tuple[slice, Tensor]]:
    """Sample the ODE from the children of a part to the end, once per stride; yield the latents."""
    tree, steps = part.plan.plan, len(part.plan.plan)
    level, solver = part.buffer.level(part.anchor + 1), tree.rows[-1].solver
    for nodes in micro_batches(len(level), size):
        x, own = part.buffer.latents(level[nodes]), conditioning[part.buffer.group[level[nodes]]]
        finals = []
        for stride in tree.strides:
            grid = torch.tensor([*range(part.anchor + 1, steps, stride), steps])
            coarse = replace(part.plan, plan=ode_plan(len(grid) - 1, solver), levels=part.plan.levels[grid])
            finals.append(sample(model, coarse, own, x))
        final = torch.stack(finals, 1).flatten(0, 1)
        leaves = slice(nodes.start * len(finals), nodes.stop * len(finals))
        store(part.buffer, steps, leaves, final)
        yield slice(part.first + leaves.start, part.first + leaves.stop), final


def anchored_evaluations(plan: Plan, groups: int, trees: int) -> int:
    """Count the evaluations that sample some groups, which have so many trees together."""
    each, steps = trees // len(plan.anchors), len(plan)
    finishes = sum(
        each * plan.rows[anchor].branch * -(-(steps - anchor - 1) // stride)
        for anchor in plan.anchors
        for stride in plan.strides
    )
    return groups * (plan.anchors[-1] + 1) + finishes
