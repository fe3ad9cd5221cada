"""The phases of an iteration, without a loop."""

from __future__ import annotations

from typing import Any

import torch


def collect(trainer: Any, iteration: int = 0) -> Any:
    """Sample, score and assign advantages; return the batch."""
    algorithm = trainer.algorithm
    batch = algorithm.sample(iteration)
    algorithm.score(batch)
    algorithm.advantage(batch)
    return batch


def update(trainer: Any, batch: Any, iteration: int = 0) -> None:
    """Take the optimizer steps of an iteration, without guard, log and checkpoints."""
    state = trainer.loop.state
    for minibatch in trainer.algorithm.minibatches(batch, iteration):
        with trainer.algorithm.updating():
            for micro in minibatch.micros:
                loss, _ = trainer.algorithm.loss(micro)
                trainer.run.accelerator.backward(loss * micro.weight)
        trainer.run.accelerator.clip_grad_norm_(state.parameters, trainer.args.max_grad_norm)
        state.step(None, torch.nan)
