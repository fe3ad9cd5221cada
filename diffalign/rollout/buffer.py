"""The rollout buffer: what a rollout leaves behind, as a forest of nodes in columns.

A node is a latent at a level. Its parent is the stored node that it came from, and a trained node is one whose
transition from its parent the policy gradient uses. Only trained nodes, their parents and the final latents are stored,
so the bytes that an iteration needs are known before it starts.
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
from diffalign.diffusion.plan import Plan
from diffalign.files import read_text
from diffalign.rewards.support.preprocess import to_bytes
from diffalign.rollout import pinned_memory
from diffalign.structures import Prompt

NODES = "nodes.safetensors"
LARGEST = 1 << 30  # bytes of the prompts that are read
COLUMNS = ("group", "sample", "parent", "step", "trained", "x", "log_prob", "advantage")


def clear_buffer(directory: Path) -> None:
    """Delete the files that ``RolloutBuffer.save`` wrote into a folder, and no others."""
    listing = directory / "metadata.jsonl"
    for line in listing.read_text(encoding="utf-8").splitlines() if listing.is_file() else ():
        with suppress(ValueError, TypeError, KeyError):
            name = Path(json.loads(line)["file_name"])
            if name.parent == Path("images") and (directory / name).is_file():
                (directory / name).unlink()
    for path in (*directory.glob("nodes*.safetensors"), directory / "prompts.json", listing):
        if path.is_file():
            path.unlink()


def _read_prompts(path: Path) -> list[dict[str, Any]]:
    """Return the fields of each prompt. FileNotFoundError: no such file. ValueError: it is something else."""
    try:
        entries = json.loads(read_text(path, LARGEST))
        for entry in entries:
            Prompt(**entry)
        return list(entries)
    except FileNotFoundError:
        raise
    except (OSError, TypeError, ValueError, RecursionError) as error:
        problem = f"{type(error).__name__}: {str(error)[:300]}"
        raise ValueError(f"{path} holds no prompts of rollouts ({problem}): copy the folder again") from error


def stored_steps(plan: Plan) -> tuple[int, ...]:
    """The level indices at which nodes are kept, ascending; the last is the final latent."""
    ends = {end for step in plan.trained_steps for end in (step, step + 1)}
    return tuple(sorted(ends | {len(plan)}))


def bytes_needed(
    plan: Plan, samples: int, latent_shape: Sequence[int], dtype: torch.dtype, *, means: bool = False
) -> int:
    """The size of the latents that a rollout of ``samples`` samples stores."""
    latent = torch.Size(latent_shape).numel()
    stored = len(stored_steps(plan)) * latent * dtype.itemsize
    return samples * (stored + (len(plan.trained_steps) * latent * 4 if means else 0))


@dataclass
class RolloutBuffer:
    """N nodes; a sample's nodes lie together, in the order of their steps.

    group, sample: (N,) int64, the prompt's index in the iteration and the sample's index in its group.
    parent: (N,) int64, a row, -1 for a node without a stored ancestor. step: (N,) int64, the index of its level.
    trained: (N,) bool. x: (N, C, h, w), in the dtype that the sampler computed with.
    log_prob: (N,) float64, of the transition from the parent, NaN where not trained. advantage: (N,) float32.
    mean: per trained node, in their order, the mean it was drawn around, float32; only for losses that need it.
    rewards: by name (N,) float32, NaN except at leaves. prompts: by group.

    x, log_prob, advantage and mean lie on the device that samples, but x and mean may wait beside it, in pinned memory:
    ``latents`` and ``means`` bring rows of them to the device.
    """

    group: Tensor
    sample: Tensor
    parent: Tensor
    step: Tensor
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
        """An empty buffer for B samples; ``group`` and ``sample`` are (B,), on the CPU.

        steps: the level indices at which nodes are kept, ascending; default: ``stored_steps``. pinned: whether latents
        wait in pinned main memory.
        """
        steps = torch.tensor(stored_steps(plan) if steps is None else list(steps))
        per_sample, count = len(steps), len(group)
        rows = torch.arange(count * per_sample)
        step = steps.repeat(count)
        trained = torch.isin(step - 1, torch.tensor(plan.trained_steps))
        place: dict[str, Any] = {"device": "cpu", "pin_memory": True} if pinned else {"device": device}
        latents = torch.empty(len(rows), *latent_shape, dtype=dtype, **place)
        nan = torch.full((len(rows),), torch.nan, dtype=torch.float64, device=device)
        return cls(
            group=group.repeat_interleave(per_sample),
            sample=sample.repeat_interleave(per_sample),
            parent=torch.where(step == steps[0], -1, rows - 1),
            step=step,
            trained=trained,
            x=latents,
            log_prob=nan,
            advantage=torch.zeros(len(rows), device=device),
            prompts=prompts,
            mean=torch.empty(int(trained.sum()), *latent_shape, **place) if means else None,
        )

    @property
    def device(self) -> torch.device:
        """That samples, and trains."""
        return self.log_prob.device

    def latents(self, rows: Tensor) -> Tensor:
        """x of nodes (n,), on the device: (n, C, h, w)."""
        return pinned_memory.take(self.x, rows, self.device)

    def means(self, rows: Tensor) -> Tensor:
        """The means that trained nodes (n,) were drawn around, on the device: (n, C, h, w)."""
        assert self.mean is not None
        return pinned_memory.take(self.mean, self.trained_rank(rows), self.device)

    def settle(self) -> None:
        """To be called between writing latents and reading them: what a GPU still copies cannot be read."""
        pinned_memory.settle(self.x, self.device)

    def put_means(self, rows: Tensor, means: Tensor) -> None:
        """Keeps them, where this buffer does."""
        if self.mean is not None:
            pinned_memory.put(self.mean, self.trained_rank(rows), means.float())

    @property
    def leaves(self) -> Tensor:
        """The rows of final latents, one per sample, in the order of the samples."""
        return (self.step == self.step.max()).nonzero().flatten()

    def named(self, samples: Tensor) -> list[dict[str, Any]]:
        """Group, member and prompt of the samples (by their order in the buffer)."""
        rows = self.leaves[samples].tolist()
        places = [(int(self.group[row]), int(self.sample[row])) for row in rows]
        return [{"group": g, "member": m, "prompt": self.prompts[g].text} for g, m in places]

    def drawn(self) -> dict[str, Tensor]:
        """All that is not known before an iteration begins, by name; ``fill`` takes it back."""
        found = {"x": self.x, "log_prob": self.log_prob, "advantage": self.advantage}
        found |= {"mean": self.mean} if self.mean is not None else {}
        return found | {f"reward/{name}": values for name, values in self.rewards.items()}

    def fill(self, drawn: Mapping[str, Tensor]) -> None:
        """Puts in what another buffer of the same shape gave as ``drawn``."""
        for name, tensor in drawn.items():
            if name.startswith("reward/"):
                self.rewards[name.removeprefix("reward/")] = tensor
            else:
                getattr(self, name).copy_(tensor)

    @property
    def nodes_per_sample(self) -> int:
        """How many nodes each sample has."""
        return len(self.step) // len(self.leaves)

    def nodes(self, samples: Tensor | slice, step: int) -> Tensor:
        """The rows, one per sample, that hold the samples (by their order in the buffer) at a stored step."""
        first = torch.arange(len(self.leaves))[samples] * self.nodes_per_sample
        offset = (self.step[: self.nodes_per_sample] == step).nonzero()
        if len(offset) != 1:
            raise ValueError(f"step {step} is not stored; stored: {self.step[: self.nodes_per_sample].tolist()}")
        return first + offset.item()

    def trained_rank(self, rows: Tensor) -> Tensor:
        """The rows of ``mean`` that belong to trained nodes."""
        return self.trained.cumsum(0)[rows] - 1

    def set_rewards(self, rewards: Mapping[str, Tensor]) -> None:
        """Stores named rewards (B,) at the leaves."""
        for name, values in rewards.items():
            column = torch.full((len(self.step),), torch.nan)
            column[self.leaves] = values.float().cpu()
            self.rewards[name] = column

    def set_advantages(self, advantages: Tensor) -> None:
        """Gives every node of a sample the advantage (B,) of its leaf: the rule of Flow-GRPO."""
        self.advantage = advantages.to(self.advantage).repeat_interleave(self.nodes_per_sample)

    def moved(self, samples: Tensor, move: Callable[[Tensor], Tensor]) -> RolloutBuffer:
        """The buffer of the samples that ``move`` gives for ``samples`` of this one, without their rewards.

        move: from a column of those, (b, ...), to that of at most as many as this buffer has.
        """

        def of(column: Tensor) -> Tensor:
            per_sample = len(column) // len(self.leaves)
            nodes = column.unflatten(0, (-1, per_sample))[samples].unbind(1)  # a device need not have room for all
            return torch.stack([move(part) for part in nodes], 1).flatten(0, 1)

        columns = {name: of(getattr(self, name)) for name in ("group", "sample", "x", "log_prob", "advantage")}
        alike = {name: getattr(self, name)[: len(columns["group"])] for name in ("parent", "step", "trained")}
        return replace(self, **columns, **alike, mean=None if self.mean is None else of(self.mean), rewards={})

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
        """Writes the buffer as a preference data set.

        ``nodes.safetensors`` holds the columns; ``images/`` and ``metadata.jsonl`` (file_name, prompt, group, sample,
        rewards, metadata, model, seed) are what ``datasets.load_dataset("imagefolder", ...)`` reads.

        images: (B, 3, H, W), [0, 1]. share: which part of a buffer this is, where several processes have one each:
        parts but the first have ``nodes-SHARE.safetensors``, and the first writes what is of all. gather: from the
        lines of this part to those of all parts, in their order; called once by each.
        """
        (directory / "images").mkdir(parents=True, exist_ok=True)
        columns = {name: getattr(self, name).contiguous().cpu() for name in COLUMNS}
        columns |= {f"reward/{name}": values for name, values in self.rewards.items()}
        columns |= {"mean": self.mean.cpu()} if self.mean is not None else {}
        with replacing(directory / (f"nodes-{share:05d}.safetensors" if share else NODES)) as staged:
            save_file(columns, staged)
        lines = [self._describe(row, model, seed) for row in self.leaves.tolist()]
        for line, image in zip(lines, images, strict=True):
            to_pil_image(to_bytes(image).cpu()).save(directory / line["file_name"])
        everyone = gather(lines)
        if share == 0:
            prompts = [{"text": p.text, "metadata": dict(p.metadata)} for p in self.prompts]
            write_text(directory / "prompts.json", json.dumps(prompts))
            write_text(directory / "metadata.jsonl", "".join(json.dumps(line) + "\n" for line in everyone))

    def _describe(self, row: int, model: str, seed: int) -> dict:
        group, sample = int(self.group[row]), int(self.sample[row])
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
        """Reads what ``save`` wrote, all parts as one. FileNotFoundError where a file of it is missing."""
        parts = [load_file(file) for file in (directory / NODES, *sorted(directory.glob("nodes-*.safetensors")))]
        begin = 0
        for part in parts:
            part["parent"] = torch.where(part["parent"] < 0, -1, part["parent"] + begin)
            begin += len(part["parent"])
        columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        columns["log_prob"] = columns["log_prob"].double()  # float32 up to version 0.1
        prompts = [Prompt(**entry) for entry in _read_prompts(directory / "prompts.json")]
        rewards = {name.removeprefix("reward/"): t for name, t in columns.items() if name.startswith("reward/")}
        return cls(
            **{name: columns[name] for name in COLUMNS}, prompts=prompts, mean=columns.get("mean"), rewards=rewards
        )
