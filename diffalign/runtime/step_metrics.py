"""Metrics, guard flags and requests of an optimizer step, over all processes, in one transfer to the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from diffalign.runtime.gradient_guard import GradientGuard
from diffalign.runtime.interfaces import Metrics


def reduce_step(
    accelerator: Accelerator,
    guard: GradientGuard,
    passes: Sequence[Mapping[str, Tensor]],
    norm: Tensor,
    requests: Sequence[bool],
) -> tuple[Metrics, str | None, list[bool]]:
    """Reduce a step over its passes and processes.

    Args:
        accelerator: Processes.
        guard: Judges loss and norm.
        passes: Metrics of each forward and backward pass; "loss" among them.
        norm: Norm of the whole gradient, equal on all processes.
        requests: What this process asks for.

    Returns:
        The metrics of the step, why to skip it (None: it is taken), and which requests some process has made.
    """
    device = accelerator.device  # metrics may be numbers of the CPU
    found = {name: torch.stack([one[name].float().to(device) for one in passes]) for name in passes[0]}
    # `mean` for the loss, so NaN reaches the guard; `nanmean` for metrics that some micro-batches do not report.
    means = torch.stack([x.mean() if name == "loss" else x.nanmean() for name, x in found.items()])
    asked = torch.tensor([float(request) for request in requests])
    seen = torch.cat([means, guard.flags(means[0], norm.to(means)), asked.to(means)])
    *values, last = torch.cat([accelerator.reduce(seen, "mean"), norm[None].to(means)]).tolist()
    shares, agreed = values[len(found) : -len(requests)], values[-len(requests) :]
    metrics = {**dict(zip(found, values, strict=False)), "grad_norm": last}
    return metrics, guard.reason(shares), [share > 0 for share in agreed]
