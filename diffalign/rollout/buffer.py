"""The rollout buffer: the stored states of an iteration's sampling trees, as nodes in columns.

A node is a latent at a level. Its parent is the stored node that it was sampled from, and a trained node is one whose
transition from its parent the policy gradient uses. Only trained nodes, their parents and the final latents are stored,
so the bytes that an iteration needs are known before it starts. A chain is a tree whose branch factors are all 1.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from diffalign.atomic import replacing, write_text
from diffalign.device import float64_device
from diffalign.diffusion.plan import Plan
from diffalign.remote import local
from diffalign.rewards.support.preprocess import to_bytes
from diffalign.rollout import pinned_memory
from diffalign.rollout.advantages import ADVANTAGE_RULES, Tree
from diffalign.rollout.saved_prompts import FILE as PROMPTS
from diffalign.rollout.saved_prompts import SOURCES, copy_sources, read_prompts, write_prompts
from diffalign.rollout.tree import depths, path_table, paths, tree_parents
from diffalign.structures import Prompt

NODES = "nodes.safetensors"
COLUMNS = ("group", "sample", "parent", "step", "trained", "x", "log_prob", "advantage")


def clear_buffer(directory: Path) -> None:
    """Delete the files that ``RolloutBuffer.save`` wrote into a folder, and no others."""
    listing = directory / "metadata.jsonl"
    for line in listing.read_text(encoding="utf-8").splitlines() if listing.is_file() else ():
        with suppress(AttributeError, ValueError, TypeError, KeyError):
            entry = json.loads(line)
            for name in (Path(entry["file_name"]), Path(str(entry.get("metadata", {}).get("image")))):
                if name.parent in (Path("images"), Path(SOURCES)) and (directory / name).is_file():
                    (directory / name).unlink()
    for path in (*directory.glob("nodes*.safetensors"), directory / PROMPTS, listing):
        if path.is_file():
            path.unlink()


def stored_steps(plan: Plan) -> tuple[int, ...]:
    """Return the level indices at which nodes are stored, ascending; the last is the final latent."""
    ends = {end for step in plan.trained_steps for end in (step, step + 1)}
    return tuple(sorted(ends | {len(plan)}))


def bytes_needed(
    plan: Plan,
    samples: int,
    latent_shape: Sequence[int],
    dtype: torch.dtype,
    *,
    means: bool = False,
    steps: Sequence[int] | None = None,
) -> int:
    """Compute the size of the latents that a rollout stores.

    Args:
        samples: the number of trees, each with a start of its own; a chain is a tree with one leaf.
        means: whether trained nodes store the means of their steps, in float32.
        steps: the level indices at which nodes are stored; default: ``stored_steps``.
    """
    latent = torch.Size(latent_shape).numel()
    steps = stored_steps(plan) if steps is None else steps
    stored = sum(paths(plan, step) for step in steps) * latent * dtype.itemsize
    trained = sum(paths(plan, step + 1) for step in plan.trained_steps) * latent * 4
    return samples * (stored + (trained if means else 0))


@dataclass
class RolloutBuffer:
    """N nodes of B trees; the nodes of a tree are consecutive, ordered by step and within a step by path.

    x, log_prob, advantage and mean are on the device that samples, but x and mean may be in pinned main memory:
    ``latents`` and ``means`` copy rows of them to the device.

    Attributes:
        group, sample: (N,) int64, index of the prompt in the iteration, and of the tree in its group.
        parent, depth: (N,) int64, row of the parent, -1 without a stored ancestor, and number of stored ancestors.
        step, path: (N,) and (N, D) int64, index of the level, and indices of children, see ``path_table``.
        leaf, trained: (N,) bool; leaves are final latents.
        x: (N, C, *spatial), in the dtype that the sampler computed with.
        log_prob: (N,) float64, of the transition from the parent; NaN if not trained.
        advantage: (N,) float32.
        prompts: A prompt per group.
        mean: Means of the steps that end in trained nodes, in their order, float32; None if the loss needs none.
        rewards: Name -> (N,) float32, NaN except at leaves.
    """

    group: Tensor
    sample: Tensor
    parent: Tensor
    depth: Tensor
    step: Tensor
    path: Tensor
    leaf: Tensor
    trained: Tensor
    x: Tensor
    log_prob: Tensor
    advantage: Tensor
    prompts: list[Prompt]
    mean: Tensor | None = None
    rewards: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def allocate(
        cls,
        plan: Plan,
        group: Tensor,
        sample: Tensor,
        prompts: list[Prompt],
        latent_shape: Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        means: bool = False,
        steps: Sequence[int] | None = None,
        pinned: bool = False,
    ) -> RolloutBuffer:
        """Allocate the nodes of B trees of a plan, without latents.

        Args:
            group, sample: (B,) int64, on the CPU.
            latent_shape: (C, *spatial).
            means: whether trained nodes store the means of their steps.
            steps: the level indices at which nodes are stored, ascending; default: ``stored_steps``.
            pinned: whether latents are stored in pinned main memory.
        """
        steps = list(stored_steps(plan) if steps is None else steps)
        tables = [path_table(plan, step) for step in steps]
        path, step = torch.cat(tables), torch.tensor(steps).repeat_interleave(torch.tensor([len(t) for t in tables]))
        count, size = len(group), len(step)
        parent = tree_parents([len(table) for table in tables])
        first = torch.arange(count).repeat_interleave(size) * size
        # a transition can be replayed only if both of its ends are stored
        trained = torch.isin(step - 1, torch.tensor([s for s in plan.trained_steps if s in steps])).repeat(count)

        place: dict[str, Any] = {"device": "cpu", "pin_memory": True} if pinned else {"device": device}
        latents = torch.empty(count * size, *latent_shape, dtype=dtype, **place)
        return cls(
            group=group.repeat_interleave(size),
            sample=sample.repeat_interleave(size),
            parent=torch.where(parent.repeat(count) < 0, -1, parent.repeat(count) + first),
            depth=torch.bucketize(step, torch.tensor(steps)).repeat(count),
            step=step.repeat(count),
            path=path.repeat(count, 1),
            leaf=(step == steps[-1]).repeat(count),
            trained=trained,
            x=latents,
            log_prob=torch.full((count * size,), torch.nan, dtype=torch.float64, device=float64_device(device)),
            advantage=torch.zeros(count * size, device=device),
            prompts=prompts,
            mean=torch.empty(int(trained.sum()), *latent_shape, **place) if means else None,
        )

    @property
    def device(self) -> torch.device:
        """The device that samples and trains."""
        return self.advantage.device

    def latents(self, rows: Tensor) -> Tensor:
        """Copy the latents of nodes (n,) to the device: (n, C, *spatial)."""
        return pinned_memory.take(self.x, rows, self.device)

    def means(self, rows: Tensor) -> Tensor:
        """Copy the means of the steps to trained nodes (n,) to the device: (n, C, *spatial)."""
        assert self.mean is not None
        return pinned_memory.take(self.mean, self.trained_rank(rows), self.device)

    def settle(self) -> None:
        """Wait for queued copies of latents. Call it between writing and reading them."""
        pinned_memory.settle(self.x, self.device)

    def put_means(self, rows: Tensor, means: Tensor) -> None:
        """Store the means of trained nodes, if the buffer was allocated with ``means=True``."""
        if self.mean is not None:
            pinned_memory.put(self.mean, self.trained_rank(rows), means.float())

    @property
    def leaves(self) -> Tensor:
        """The rows of final latents: (L,), tree after tree. A chain has one, so that L = B."""
        return self.leaf.nonzero().flatten()

    @property
    def steps(self) -> list[int]:
        """The level indices at which nodes are stored, ascending."""
        return [int(step) for step in torch.unique(self.step)]

    def level(self, step: int) -> Tensor:
        """Return the rows of the nodes at level ``step``, tree after tree and ordered by path; none if not stored."""
        return (self.step == step).nonzero().flatten()

    def transitions(self, step: int | None = None) -> Tensor:
        """Return the rows of trained nodes (T,), the ends of stored transitions, of one step of the plan or of all.

        They are the unit of a policy gradient: an ancestor that leaves share is one transition and trains once.
        """
        chosen = self.trained if step is None else self.trained & (self.step == step + 1)
        return chosen.nonzero().flatten()

    def named(self, samples: Tensor) -> list[dict[str, Any]]:
        """Describe leaves, by their order in the buffer: group, index in the group and prompt of each."""
        rows = self.leaves[samples].tolist()
        places = [(int(self.group[row]), self.sample_index(row)) for row in rows]
        return [{"group": g, "member": index, "prompt": self.prompts[g].text} for g, index in places]

    def sample_index(self, row: int) -> int:
        """Return the index of a leaf among the leaves of its group, as if all of the group's trees were in one list."""
        base = self.path[self.leaf].amax(0) + 1 if self.path.shape[1] else self.path[0]
        index = int(self.sample[row])
        for digit, count in zip(self.path[row].tolist(), base.tolist(), strict=True):
            index = index * count + digit
        return index

    def drawn(self) -> dict[str, Tensor]:
        """Return what sampling and scoring wrote, by name; ``fill`` restores it."""
        found = {"x": self.x, "log_prob": self.log_prob, "advantage": self.advantage}
        found |= {"mean": self.mean} if self.mean is not None else {}
        return found | {f"reward/{name}": values for name, values in self.rewards.items()}

    def fill(self, drawn: Mapping[str, Tensor]) -> None:
        """Restore what ``drawn`` of a buffer of the same plan returned."""
        for name, tensor in drawn.items():
            if name.startswith("reward/"):
                self.rewards[name.removeprefix("reward/")] = tensor
            else:
                getattr(self, name).copy_(tensor)

    @property
    def nodes_per_sample(self) -> int:
        """The number of nodes of a chain. ValueError: the plan branches, see ``steps``."""
        if self.path.shape[1]:
            raise ValueError("samples of a tree share nodes, so that it has no number of nodes per sample: use chains")
        return len(self.step) // len(self.leaves)

    def nodes(self, samples: Tensor | slice, step: int) -> Tensor:
        """Return the ancestor of each leaf (by order in the buffer) at level ``step``. ValueError: it is not stored."""
        rows = self.leaves[samples]
        while len(rows) and (above := self.step[rows] > step).any():
            if (self.parent[rows[above]] < 0).any():
                break
            rows = torch.where(above, self.parent[rows], rows)
        if (self.step[rows] != step).any():
            raise ValueError(f"step {step} is not stored; stored: {self.steps}")
        return rows

    def trained_rank(self, rows: Tensor) -> Tensor:
        """Return the rows of ``mean`` that belong to trained nodes."""
        return self.trained.cumsum(0)[rows] - 1

    def set_rewards(self, rewards: Mapping[str, Tensor]) -> None:
        """Store named rewards (L,) at the leaves."""
        for name, values in rewards.items():
            column = torch.full((len(self.step),), torch.nan)
            column[self.leaves] = values.float().cpu()
            self.rewards[name] = column

    def set_advantages(self, advantages: Tensor, rule: str = "subtree_mean", *, rewards: Tensor | None = None) -> None:
        """Set the advantages of all nodes from those of the leaves, by a rule of ``ADVANTAGE_RULES``.

        On chains, "leaf" and "subtree_mean" give each node the advantage of its leaf.

        Args:
            advantages: (L,), of ``group_advantages``.
            rule: A key of ``ADVANTAGE_RULES``.
            rewards: (L,), the weighted total of each leaf, NaN or infinite where a reward failed; for rules that
                normalise rewards themselves.

        Raises:
            ValueError: An unknown rule, rewards missing, or not a value per leaf.
        """
        if rule not in ADVANTAGE_RULES:
            raise ValueError(f"unknown advantage rule {rule!r}; known: {', '.join(ADVANTAGE_RULES)}")
        values = advantages if ADVANTAGE_RULES[rule].of == "advantages" else rewards
        if values is None:
            raise ValueError(f"advantage rule {rule!r} normalises the rewards of leaves: pass rewards")
        if values.shape != self.leaves.shape:
            raise ValueError(f"values of shape {tuple(values.shape)} for {len(self.leaves)} leaves: pass one per leaf")
        roots = torch.unique(torch.stack([self.group, self.sample], 1), dim=0, return_inverse=True)[1]
        tree = Tree(roots, self.parent, self.depth, self.leaf, self.log_prob)
        self.advantage = ADVANTAGE_RULES[rule].compute(tree, values.cpu()).to(self.advantage)

    def moved(self, samples: Tensor, move: Callable[[Tensor], Tensor]) -> RolloutBuffer:
        """Exchange the samples of chains between processes, without their rewards. Raises ValueError for trees.

        Args:
            samples: Leaves, by their order in the buffer.
            move: Maps a column of these samples, (b, ...), to that of at most as many.
        """
        if self.path.shape[1]:
            raise ValueError("leaves of a tree share ancestors and cannot move alone: do not filter or rebalance trees")
        per_sample = self.nodes_per_sample

        def of(column: Tensor, size: int) -> Tensor:
            nodes = torch.unflatten(column, 0, (-1, size))[samples].unbind(1)  # a device need not have room for all
            return torch.stack([move(part) for part in nodes], 1).flatten(0, 1)

        names = ("group", "sample", "x", "log_prob", "advantage")
        columns: dict[str, Any] = {name: of(getattr(self, name), per_sample) for name in names}
        same = ("parent", "depth", "step", "path", "leaf", "trained")
        alike: dict[str, Any] = {name: getattr(self, name)[: len(columns["group"])] for name in same}
        mean = None if self.mean is None else of(self.mean, len(self.mean) // len(self.leaves))
        return replace(self, **columns, **alike, mean=mean, rewards={})

    def save(
        self,
        directory: Path,
        images: Tensor,
        *,
        model: str,
        seed: int,
        share: int = 0,
        gather: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] = list,
    ) -> None:
        """Write the buffer as a preference data set.

        ``nodes.safetensors`` holds the columns; ``images/`` and ``metadata.jsonl`` (file_name, prompt, group, sample,
        rewards, metadata, model, seed) can be read by ``datasets.load_dataset("imagefolder", ...)``. Source images of
        edits are copied to ``sources/``.

        Args:
            images: (L, 3, H, W), [0, 1], images of the leaves.
            model, seed: Entries of the metadata.
            share: Index of this part of the buffer, of which each process has one. Part 0 also writes prompts and
                metadata; the columns of other parts are in ``nodes-SHARE.safetensors``.
            gather: Concatenates the lines of all parts in their order; every part calls it once.
        """
        (directory / "images").mkdir(parents=True, exist_ok=True)
        columns = {name: getattr(self, name).contiguous().cpu() for name in COLUMNS}
        if self.path.shape[1]:  # the files of chains have no paths
            columns["path"] = self.path.contiguous()
        columns |= {f"reward/{name}": values for name, values in self.rewards.items()}
        columns |= {"mean": self.mean.cpu()} if self.mean is not None else {}
        with replacing(directory / (f"nodes-{share:05d}.safetensors" if share else NODES)) as staged:
            save_file(columns, staged)
        saved = replace(self, prompts=copy_sources(self.prompts, directory))
        lines = [saved._describe(row, model, seed) for row in self.leaves.tolist()]
        for line, image in zip(lines, images, strict=True):
            to_pil_image(to_bytes(image).cpu()).save(directory / line["file_name"])
        everyone = gather(lines)
        if share == 0:
            write_prompts(saved.prompts, directory)
            write_text(directory / "metadata.jsonl", "".join(json.dumps(line) + "\n" for line in everyone))

    def _describe(self, row: int, model: str, seed: int) -> dict[str, Any]:
        group, sample = int(self.group[row]), self.sample_index(row)
        scores = {name: float(values[row]) for name, values in self.rewards.items()}
        prompt = self.prompts[group]
        return {
            "file_name": f"images/{group:05d}-{sample:03d}.png",
            "prompt": prompt.text,
            "group": group,
            "sample": sample,
            "rewards": {name: value if value == value else None for name, value in scores.items()},
            "metadata": dict(prompt.metadata),
            "model": model,
            "seed": seed,
        }

    @classmethod
    def load(cls, directory: Path) -> RolloutBuffer:
        """Read all parts that ``save`` wrote as one buffer. Raises FileNotFoundError if a file is missing."""
        directory = local(directory)
        parts = [load_file(file) for file in (directory / NODES, *sorted(directory.glob("nodes-*.safetensors")))]
        begin = 0
        for part in parts:
            part["parent"] = torch.where(part["parent"] < 0, -1, part["parent"] + begin)
            begin += len(part["parent"])
        columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        columns["log_prob"] = columns["log_prob"].double()  # float32 up to version 0.1
        return cls(
            **{name: columns[name] for name in COLUMNS},
            path=columns.get("path", torch.empty(len(columns["step"]), 0, dtype=torch.int64)),
            depth=depths(columns["parent"]),
            leaf=columns["step"] == columns["step"].max(),
            prompts=read_prompts(directory),
            mean=columns.get("mean"),
            rewards={n.removeprefix("reward/"): t for n, t in columns.items() if n.startswith("reward/")},
        )
