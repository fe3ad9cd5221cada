"""Leave out samples without an advantage, and spread the others evenly over the processes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffalign.rollout.collector import Rollout
from diffalign.rollout.load_balancing import at_home, deal, exchange
from diffalign.runtime.run import Run


def rebalanced(run: Run[Any], rollout: Rollout, samples: Tensor) -> tuple[Rollout, Tensor]:
    """Return the samples that this process trains on in an optimizer step: a rollout and rows of it.

    The rollout holds samples of other processes too. The loss stays the mean over all samples: those without an
    advantage have neither loss nor gradient, so gradients agree up to rounding. All processes must call it.

    Args:
        run: The training.
        rollout: This process's rollout, of chains.
        samples: (n,), this process's samples in the step.
    """
    buffer, rank, own = rollout.buffer, run.rank, len(samples)
    trained = buffer.advantage[buffer.leaves[samples]] != 0
    assigned = deal(run.gather(trained.long()).view(-1, own) > 0)
    if at_home(assigned, own):
        return rollout, samples[assigned[rank] - rank * own]
    move = partial(exchange, dealt=assigned, rank=rank, device=run.accelerator.device)
    return replace(rollout, buffer=buffer.moved(samples, move)), torch.arange(assigned.shape[1])
