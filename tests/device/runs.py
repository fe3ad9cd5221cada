"""Small runs of every trainer, as ``diffalign doctor`` makes them, on either device."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

from diffalign.commands.doctor.trials import settings
from diffalign.config import from_dict
from diffalign.runtime.tracking import MetricsLog
from diffalign.trainers.registry import find_algorithm
from tests.conftest import ROOT
from tests.device import strict

PICKSCORE = str(ROOT / "assets/judges/pickscore")
JUDGE = {"pickscore": {"options": {"path": PICKSCORE, "tokenizer": PICKSCORE}}}
ONLINE = {
    "train_data": [],
    "data": None,
    "cache": None,
    "num_pairs": None,
    "train_prompts": str(ROOT / "assets/prompts/shapes_train.jsonl"),
}
ONLINE |= {"rewards": JUDGE, "num_groups": 2, "group_size": 4, "plan": {"preset": "ode", "num_steps": 3}}
GROUP = {"reward_loss": "group"}
# trainer -> runs that reach other tensors than its trial does
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "flow_grpo": {
        "all": {"kl_beta": 0.1, "ema_decay": 0.9, "loss": "grpo_guard", "save_rollouts": True},
        "bf16": {"mixed_precision": "bf16", "old_log_prob": "recompute", "rewards": JUDGE},
        "guided": {"guidance_scale": 3.0, "step_weights": "tempflow", "gradient_checkpointing": True},
    },
    "diffusion_dpo": {
        "auto_beta": {"auto_beta": 0.2, "ema_decay": 0.9},
        "moving_reference": {"reference_decay": 0.5},
        "bco": {"loss": "bco", "mixed_precision": "bf16"},
        "online": ONLINE,
    },
    # A reward that is smooth: rounding moves JPEG sizes by whole bytes, and advantages with them.
    "forward_rl": {"nft": {"rewards": JUDGE}},
    "refl": {
        "group": {
            "recipe": {"preset": "draft_k", "num_steps": 4, "gradient_steps": 2, **GROUP},
            "group_size": 2,
        },
        "bf16": {"mixed_precision": "bf16", "decode_precision": "bf16", "ema_decay": 0.9},
    },
}


@contextmanager
def on(device: str, patch: Any):
    """Accelerate's choice of the device is ``device`` within the context."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with patch.context() as inner:
        inner.setenv("ACCELERATE_TORCH_DEVICE", device)
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


def make(name: str, folder: Path, reward_funcs: Any = None, **changes: Any) -> Any:
    """Build a trainer of the embedded world."""
    entry = find_algorithm(name)
    given = {**settings(entry, ROOT / "assets", folder), **changes}
    given = {key: value for key, value in given.items() if value is not None}
    return entry.trainer(args=from_dict(entry.config, given, "test"), reward_funcs=reward_funcs)


def train(name: str, folder: Path, **changes: Any) -> list[dict[str, float]]:
    """Train, and return the rows of the optimizer steps."""
    trainer = make(name, folder, **changes)
    trainer.train()
    return [row for row in MetricsLog.read(folder / "metrics.jsonl") if "loss" in row]


def weights(folder: Path) -> torch.Tensor:
    """Return the trained weights of the newest checkpoint, flat."""
    from safetensors.torch import load_file

    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return torch.cat([t.float().flatten() for t in load_file(newest / "weights.safetensors").values()])


def is_on_device(tensor: torch.Tensor) -> bool:
    return tensor.device.type == strict.NAME
