"""Peaks of real iterations on a CPU, by the allocator's own events, to hold rehearsals to."""

from __future__ import annotations

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from diffalign.fsdp import local_tensor
from diffalign.models.offload import tensors_of
from tests.phases import collect


def peak_of(call) -> int:
    """The most bytes beyond those at its start that a call has allocated at a time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def resident(trainer) -> int:
    """Bytes of all weights, and of the optimizer's state."""
    parts = [part for part in trainer.model.pipeline.components.values() if isinstance(part, nn.Module)]
    state = trainer.loop.state
    moments = [t for table in state.optimizer.optimizer.state.values() for t in table.values()]
    extra = [t for kept in trainer.model.weights.copies.values() for t in kept] + moments
    return sum(local_tensor(t).untyped_storage().nbytes() for t in [*tensors_of(parts), *extra])


def measure(trainer) -> dict[str, int]:
    """Phase -> the most bytes at a time, in an iteration of a trainer whose optimizer has its moments."""
    state, algorithm = trainer.loop.state, trainer.algorithm
    for parameter in state.parameters:
        parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    base, found = resident(trainer), {}

    def sample():
        found["batch"] = collect(trainer)

    def update():
        minibatch = next(algorithm.minibatches(found["batch"], 0))
        with algorithm.updating():
            for micro in minibatch.micros:
                loss, _ = algorithm.loss(micro)
                trainer.run.accelerator.backward(loss * micro.weight)
                del loss
        trainer.run.accelerator.clip_grad_norm_(state.parameters, 1.0)

    return {"sample": base + peak_of(sample), "train": base + peak_of(update)}
