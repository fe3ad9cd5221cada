"""The state that the training loop updates: weights, optimizer, schedule, EMA, gradient statistics and counters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffalign.fsdp import is_sharded, shard_like
from diffalign.runtime.config import TrainingConfig
from diffalign.runtime.ema import EMA
from diffalign.runtime.gradient_guard import GradientGuard
from diffalign.runtime.optimizer_state import flatten_optimizer, restore_optimizer
from diffalign.runtime.optimizers import lr_factor, make_optimizer
from diffalign.runtime.run import Progress

Tensors = dict[str, dict[str, Tensor]]


class LoopState:
    """Everything that an optimizer step changes.

    Attributes:
        parameters: The trained parameters.
        module: The trained module, wrapped for several processes.
        optimizer: The accelerator's wrapper of the optimizer.
        schedule: Learning rate schedule.
        ema: Moving average of the parameters; None without ``ema_decay``.
        guard: Gradient statistics.
        progress: Counters.
        sharded: Whether FSDP2 shards the parameters.
    """

    def __init__(self, module: nn.Module, config: TrainingConfig, accelerator: Accelerator) -> None:
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        optimizer = make_optimizer(self.parameters, config)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda k: lr_factor(config.lr_scheduler, k, config.lr_warmup_steps, config.max_train_steps)
        )
        self.sharded = is_sharded(module)
        # FSDP2 modules synchronise gradients by themselves: prepare them for mixed precision only.
        prepare = partial(accelerator.prepare_model, evaluation_mode=True) if self.sharded else accelerator.prepare
        self.module, self.optimizer = prepare(module), accelerator.prepare(optimizer)
        self.scaler = accelerator.scaler
        self.ema = EMA(self.parameters, config.ema_decay) if config.ema_decay else None
        self.guard = GradientGuard(config.max_grad_spike)
        self.progress = Progress()

    def state_dict(self) -> tuple[Tensors, dict[str, Any]]:
        """Return (named tensors by group, JSON values). The tensors are the live ones, and may be sharded."""
        moments, optimizer = flatten_optimizer(self.optimizer.optimizer)
        tensors: Tensors = {"weights": indexed(self.parameters), "optimizer": moments}
        progress = self.progress
        plain = {
            "step": progress.step,
            "iteration": progress.iteration,
            "update": progress.update,
            "evaluated": progress.evaluated,
            "optimizer": optimizer,
            "schedule": self.schedule.state_dict(),
            "guard": self.guard.state(),
        }
        if self.ema is not None:
            tensors["ema"] = indexed(self.ema.shadow)
            plain["ema_updates"] = self.ema.updates
        if self.scaler is not None:
            plain["scaler"] = self.scaler.state_dict()
        return tensors, plain

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Mapping[str, Tensor]], plain: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned, with full tensors. ValueError: tensors of another number or shape."""
        restore(self.parameters, tensors["weights"])
        if self.ema is not None:
            restore(self.ema.shadow, tensors["ema"])
            self.ema.updates = plain["ema_updates"]
        restore_optimizer(self.optimizer.optimizer, tensors["optimizer"], plain["optimizer"])
        self.schedule.load_state_dict(plain["schedule"])
        self.guard.restore(plain["guard"])
        if self.scaler is not None:
            self.scaler.load_state_dict(plain["scaler"])
        progress = self.progress
        progress.step, progress.iteration, progress.update = plain["step"], plain["iteration"], plain["update"]
        progress.evaluated, progress.skipped = plain["evaluated"], self.guard.skipped

    def step(self, reason: str | None, norm: float) -> None:
        """Step the optimizer, or with a ``reason`` to skip leave every weight, moment and the learning rate unchanged.

        Under fp16 the loss scaler skips overflows by itself, and must see them.
        """
        if reason is not None and self.scaler is not None and reason != "gradient not finite":
            self.optimizer.zero_grad(set_to_none=True)  # the scaler's step then moves nothing
        if reason is None or self.scaler is not None:
            self.optimizer.step()
        if reason is None:
            self.schedule.step()
            if self.ema is not None:
                self.ema.update()

        self.guard.note(reason, norm)
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step, self.progress.skipped = self.progress.step + 1, self.guard.skipped


def indexed(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """Name tensors by their position, for safetensors."""
    return {f"{index:05d}": tensor.detach() for index, tensor in enumerate(tensors)}


def restore(tensors: Sequence[Tensor], stored: Mapping[str, Tensor]) -> None:
    """Copy tensors named by ``indexed`` back in place. ValueError: their number or shapes differ."""
    if len(tensors) != len(stored):
        raise ValueError(
            f"the checkpoint holds {len(stored)} tensors, this run trains {len(tensors)}: use its config.yaml"
        )
    for index, tensor in enumerate(tensors):
        found = stored[f"{index:05d}"]
        if found.shape != tensor.shape:
            raise ValueError(
                f"the checkpoint's tensor {index} is {tuple(found.shape)}, this run's is {tuple(tensor.shape)}: use "
                "the config.yaml of the checkpoint's run"
            )
        tensor.copy_(shard_like(found, tensor))
