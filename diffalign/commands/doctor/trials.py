"""Train two steps with every trainer on the embedded world."""

from __future__ import annotations

import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffalign.commands.doctor.config import PIPELINE
from diffalign.commands.doctor.findings import Finding
from diffalign.config import from_dict
from diffalign.config.sections import JUDGE
from diffalign.models.lora import WEIGHTS_NAME, learned_nothing
from diffalign.rewards import get_reward
from diffalign.runtime.tracking import MetricsLog
from diffalign.trainers.registry import JUDGES, Entry, find_algorithm

STEPS = 2


@dataclass(frozen=True)
class Kind:
    """What trials of a kind of trainers share.

    Attributes:
        config: Configuration of every trial.
        made: What a trial makes.
        check: Checks it, given the configuration; raises RuntimeError.
    """

    config: Mapping[str, Any]
    made: str
    check: Callable[[Any], None]


def check_lora(args: Any) -> None:
    """Raise RuntimeError if the LoRA did not change."""
    if learned_nothing(args.output_dir / WEIGHTS_NAME):
        raise RuntimeError("the LoRA did not change")


def check_judge(args: Any) -> None:
    """Raise RuntimeError if the judge scores an image as its backbone does."""
    before = _score("pickscore", path=args.backbone, tokenizer=args.backbone)
    after = _score(JUDGE, path=str(args.output_dir))
    if not math.isfinite(after) or before == after:
        raise RuntimeError(f"the judge scores {after:g}, and its backbone {before:g}")


def _score(name: str, **options: Any) -> float:
    found = get_reward(name, **options)(torch.full((1, 3, 64, 64), 0.5), ["a red circle"], [{}])
    assert isinstance(found, torch.Tensor)
    return found.item()


COMMON: Mapping[str, Any] = {"max_train_steps": STEPS, "learning_rate": 1e-3}
LORA = Kind(
    {**COMMON, "model": f"{{assets}}/{PIPELINE}", "max_sequence_length": 16, "lora": {"rank": 4}}, "a LoRA", check_lora
)
REWARD = Kind(COMMON, "a judge", check_judge)


def kind_of(entry: Entry) -> Kind:
    """Return the kind of an algorithm's trials."""
    return REWARD if entry.name in JUDGES else LORA


def trials(names: Iterable[str], assets: Path) -> Iterator[Finding]:
    """Train two steps with each algorithm on the embedded world."""
    for name in names:
        start = time.perf_counter()
        try:
            text = _trial(find_algorithm(name), assets)
        except Exception as error:  # any error of a trainer is the finding
            text = f"{type(error).__name__}: {error}"
            fix = (
                f"see the traceback of: diffalign train {name} --config configs/{name}/shapes.yaml --max_train_steps 2"
            )
            yield Finding(f"trainer {name}", "problem", text, fix)
            continue
        yield Finding(f"trainer {name}", "ok", f"{text} in {time.perf_counter() - start:.0f} s")


def _trial(entry: Entry, assets: Path) -> str:
    """Train and describe the result. Raises RuntimeError if a step is not finite, or nothing was learned."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args = from_dict(entry.config, settings(entry, assets, Path(folder) / "run"), f"trial of {entry.name}")
        entry.trainer(args=args).train()
        rows = MetricsLog.read(args.output_dir / "metrics.jsonl")
        steps = [(row["loss"], row["grad_norm"]) for row in rows if "loss" in row]
        if len(steps) != STEPS or not all(math.isfinite(value) for step in steps for value in step):
            raise RuntimeError(f"{STEPS} steps gave (loss, gradient norm) {steps}")
        kind_of(entry).check(args)
    return f"{STEPS} steps, gradient norms {', '.join(f'{norm:.2g}' for _, norm in steps)}, {kind_of(entry).made},"


def settings(entry: Entry, assets: Path, output_dir: Path) -> dict[str, Any]:
    """Return the config of a trial as plain values."""
    config = {**kind_of(entry).config, **entry.trial}
    return {**_with_assets(config, assets), "output_dir": str(output_dir)}


def _with_assets(value: Any, assets: Path) -> Any:
    if isinstance(value, str):
        return value.replace("{assets}", str(assets))
    if isinstance(value, Mapping):
        return {key: _with_assets(one, assets) for key, one in value.items()}
    return [_with_assets(one, assets) for one in value] if isinstance(value, list) else value
