"""Ask a benchmark's judges about images on disk; resumable, dealt over processes.

<images>/<model>/answers/<judge>-<digest>-<process>.jsonl    {"prompt", "sample", "answers"}, one line per image
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffalign import media
from diffalign.benchmarks.protocol import Benchmark, Judge, Judged
from diffalign.commands.resume import drop_partial_line, read_rows
from diffalign.config.sections import RewardConfig
from diffalign.files import read_bytes
from diffalign.preflight import HUB_ID, hub_problem
from diffalign.rewards.base import Reward, get_reward, needs_groups
from diffalign.rewards.support.weights import repositories_of
from diffalign.rollout.scoring import score
from diffalign.structures import Prompt

OWN = "diffalign."  # judges of this package need no consent
Pair = tuple[int, int]


@dataclass(frozen=True)
class Asked:
    """A judge, built.

    Attributes:
        name: Its name in the benchmark.
        judge: What it is asked.
        reward: The reward that answers.
        digest: Changes with the reward, its options and the texts that it is asked.
    """

    name: str
    judge: Judge
    reward: Reward
    digest: str

    def rows(self, folder: Path, process: str | int = "*") -> list[Path]:
        """Return the files of answers below the folder of a model's images."""
        name = f"{self.name}-{self.digest}-{process}.jsonl"
        return sorted((folder / "answers").glob(name)) if process == "*" else [folder / "answers" / name]


def chosen_judges(benchmark: Benchmark, given: Mapping[str, float | RewardConfig]) -> dict[str, Judge]:
    """Return the benchmark's judges, those of ``given`` replaced. Raises ValueError for a name that it has not."""
    judges = dict(benchmark.protocol.judges)
    for name, entry in given.items():
        if name not in judges:
            raise ValueError(f"judges: {benchmark.name} asks no {name[:60]!r}; it asks {', '.join(judges)}")
        if not isinstance(entry, RewardConfig) or entry.weight != 1.0:
            raise ValueError(
                f"judges: {name}: a benchmark reads no weight; write {{{name}: {{reward: NAME, options: {{}}}}}}"
            )
        before, spec = judges[name], entry.reward or judges[name].reward
        options = {**before.options, **entry.options} if spec == before.reward else dict(entry.options)
        judges[name] = Judge(spec, options, before.asks, before.published)
    return judges


def build_judges(judges: Mapping[str, Judge], prompts: Sequence[Prompt], allow_code: bool) -> list[Asked]:
    """Build the rewards of judges.

    Raises:
        ValueError: A reward is unknown, compares images within groups, or its weights are not available.
    """
    found = []
    for name, judge in judges.items():
        own = judge.reward.startswith(OWN)
        reward = get_reward(judge.reward, allow_code or own, **judge.options)
        if needs_groups(reward):
            raise ValueError(f"judges: {name}: {judge.reward} ranks images within a group; name a reward of one image")
        for source, revision in repositories_of(reward):
            if problem := _unavailable(source, revision):
                raise ValueError(f"judge {name!r} ({judge.reward}): {problem}")
        asks = [[(text.text, dict(text.metadata)) for text in judge.asks(prompt)] for prompt in prompts]
        content = json.dumps([judge.reward, dict(judge.options), asks], sort_keys=True, default=str)
        found.append(Asked(name, judge, reward, hashlib.sha256(content.encode()).hexdigest()[:12]))
    return found


def _unavailable(source: str, revision: str | None) -> str | None:
    """Explain why weights on the hub cannot be read; None for files, and if they can."""
    if HUB_ID.fullmatch(source) and not Path(source).exists():
        return hub_problem(source, revision, "model")
    return None


def ask(
    asked: Asked,
    folder: Path,
    files: Mapping[Pair, Path],
    prompts: Sequence[Prompt],
    *,
    process: int,
    size: int,
    device: torch.device,
    progress: Callable[[int], object],
) -> None:
    """Answer about the images of this process that have no answer yet; images that cannot be read are left out.

    Args:
        asked: The judge.
        folder: Folder of a model's images.
        files: (prompt, sample) -> image file, of this process.
        prompts: All prompts.
        process: Rank of this process.
        size: Images, and texts, per call.
        device: Where images are put.
        progress: Called with numbers of finished images.
    """
    (file,) = asked.rows(folder, process)
    file.parent.mkdir(parents=True, exist_ok=True)
    done = answers_in(asked, folder)
    missing = [pair for pair in files if pair not in done or any(math.isnan(value) for value in done[pair])]
    progress(len(files) - len(missing))
    drop_partial_line(file)
    for start in range(0, len(missing), size):
        chunk = missing[start : start + size]
        images = {pair: image for pair in chunk if (image := _read(files[pair])) is not None}
        with file.open("a", encoding="utf-8") as rows:
            for pair, answers in _answers(asked, images, prompts, size, device):
                values = [None if math.isnan(value) else value for value in answers]  # NaN is not JSON
                rows.write(json.dumps({"prompt": pair[0], "sample": pair[1], "answers": values}) + "\n")
        progress(len(chunk))


def _answers(
    asked: Asked, images: Mapping[Pair, Tensor], prompts: Sequence[Prompt], size: int, device: torch.device
) -> Iterator[tuple[Pair, list[float]]]:
    texts = [(pair, text) for pair in images for text in asked.judge.asks(prompts[pair[0]])]
    found: dict[Pair, list[float]] = {pair: [] for pair in images}
    for start in range(0, len(texts), size):
        part = texts[start : start + size]
        for rows in _of_one_size(part, images):
            batch = torch.stack([images[pair] for pair, _ in rows]).to(device)
            values = score({asked.name: asked.reward}, batch, [text for _, text in rows])[asked.name]
            for (pair, _), value in zip(rows, values.tolist(), strict=True):
                found[pair].append(value)
    yield from found.items()


def _of_one_size(part: Sequence[tuple[Pair, Prompt]], images: Mapping[Pair, Tensor]) -> Iterator[list]:
    """Split texts into runs whose images have one size, in order."""
    run: list[tuple[Pair, Prompt]] = []
    for one in part:
        if run and images[one[0]].shape != images[run[-1][0]].shape:
            yield run
            run = []
        run.append(one)
    if run:
        yield run


def _read(file: Path) -> Tensor | None:
    """Decode an image to (3, H, W) in [0, 1]; None if it cannot be read."""
    try:
        pixels = np.array(media.decode(read_bytes(file)))
    except media.BROKEN:
        return None
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def broken_images(files: Mapping[Pair, Path]) -> list[tuple[Path, str]]:
    """List the images that cannot be read, and why."""
    found = []
    for file in files.values():
        try:
            media.decode(read_bytes(file))
        except media.BROKEN as error:
            found.append((file, media.reason(error)))
    return found


def answers_in(asked: Asked, folder: Path) -> dict[Pair, list[float]]:
    """Load the answers of all processes; a later one counts."""
    rows = (row for file in asked.rows(folder) for row in read_rows(file))
    return {
        (row["prompt"], row["sample"]): [math.nan if value is None else value for value in row["answers"]]
        for row in rows
    }


def collect(judges: Sequence[Asked], folder: Path, pairs: Sequence[Pair], prompts: Sequence[Prompt]) -> list[Judged]:
    """Return the images that every judge has answered about."""
    answers = {asked.name: answers_in(asked, folder) for asked in judges}
    return [
        Judged(prompts[prompt], prompt, sample, {name: own[prompt, sample] for name, own in answers.items()})
        for prompt, sample in pairs
        if all((prompt, sample) in own for own in answers.values())
    ]
