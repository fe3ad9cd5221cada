"""Train two steps with every trainer on the embedded world."""

from __future__ import annotations

import math
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.commands.doctor.config import PIPELINE
from diffalign.commands.doctor.findings import Finding
from diffalign.config import from_dict
from diffalign.models.lora import WEIGHTS_NAME, learned_nothing
from diffalign.runtime.tracking import MetricsLog

if TYPE_CHECKING:
    from diffalign.trainers.config import TrainerConfig

STEPS = 2
# config of every trial
COMMON: Mapping[str, Any] = {
    "max_sequence_length": 16,
    "lora": {"rank": 4},
    "max_train_steps": STEPS,
    "learning_rate": 1e-3,
}
ROLLOUTS: Mapping[str, Any] = {"num_groups": 2, "group_size": 4, "rollout_batch_size": 8, "train_batch_size": 8}
# trainer -> additional config of its trial; "{assets}" is replaced by the folder of the embedded world
TRIALS: dict[str, Mapping[str, Any]] = {
    "diffusion_dpo": {
        "train_data": ["{assets}/preferences/shapes.parquet"],
        "data": {"scan": 8},
        "num_pairs": 4,
        "train_batch_size": 4,
        "cache": False,
    },
    # this reward differs between any two images, so advantages are non-zero
    "flow_grpo": {
        **ROLLOUTS,
        "train_prompts": "{assets}/prompts/shapes_train.jsonl",
        "rewards": {"jpeg_compressibility": 1.0},
        "plan": {"preset": "first_steps", "num_steps": 4, "window_size": 2},
    },
    "refl": {
        "train_prompts": "{assets}/prompts/shapes_train.jsonl",
        "rewards": {
            "pickscore": {"options": {"path": "{assets}/judges/pickscore", "tokenizer": "{assets}/judges/pickscore"}}
        },
        "num_groups": 4,
        "rollout_batch_size": 4,
        "train_batch_size": 4,
        "recipe": {"preset": "draft_1", "num_steps": 4},
    },
}


def trials(trainers: Mapping[str, tuple[type[TrainerConfig], type]], assets: Path) -> Iterator[Finding]:
    """Train two steps with each trainer. trainers: name -> (config class, trainer class)."""
    for name, (config, trainer) in trainers.items():
        start = time.perf_counter()
        try:
            text = _trial(config, trainer, name, assets)
        except Exception as error:  # any error of a trainer is the finding
            text = f"{type(error).__name__}: {error}"
            fix = (
                f"see the traceback of: diffalign train {name} --config configs/{name}/shapes.yaml --max_train_steps 2"
            )
            yield Finding(f"trainer {name}", "problem", text, fix)
            continue
        yield Finding(f"trainer {name}", "ok", f"{text} in {time.perf_counter() - start:.0f} s")


def _trial(config: type[TrainerConfig], trainer: type, name: str, assets: Path) -> str:
    """Train and describe the result. Raises RuntimeError if a step is not finite or the LoRA did not change."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args = from_dict(config, settings(name, assets, Path(folder) / "run"), f"trial of {name}")
        trainer(args=args).train()
        rows = MetricsLog.read(args.output_dir / "metrics.jsonl")
        steps = [(row["loss"], row["grad_norm"]) for row in rows if "loss" in row]
        if len(steps) != STEPS or not all(math.isfinite(value) for step in steps for value in step):
            raise RuntimeError(f"{STEPS} steps gave (loss, gradient norm) {steps}")
        if learned_nothing(args.output_dir / WEIGHTS_NAME):
            raise RuntimeError("the LoRA did not change")
    return f"{STEPS} steps, gradient norms {', '.join(f'{norm:.2g}' for _, norm in steps)}, a LoRA,"


def settings(name: str, assets: Path, output_dir: Path) -> dict[str, Any]:
    """Return the config of a trial as plain values."""
    config = {**COMMON, "model": str(assets / PIPELINE), **TRIALS.get(name, {})}
    return {**_with_assets(config, assets), "output_dir": str(output_dir)}


def _with_assets(value: Any, assets: Path) -> Any:
    if isinstance(value, str):
        return value.replace("{assets}", str(assets))
    if isinstance(value, Mapping):
        return {key: _with_assets(one, assets) for key, one in value.items()}
    return [_with_assets(one, assets) for one in value] if isinstance(value, list) else value
