"""Convert an optimizer's state to named tensors and JSON values, and restore it bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffalign.fsdp import shard_like


def _shapes(optimizer: torch.optim.Optimizer) -> list[list[list[int]]]:
    return [[list(parameter.shape) for parameter in group["params"]] for group in optimizer.param_groups]


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (tensors, JSON values) for a checkpoint; the tensors are the live ones, not copies.

    Parameters are identified by their index, so that names are "<parameter>.<entry>" and "group<number>.<option>".
    """
    saved = optimizer.state_dict()
    entries = {f"{index}.{name}": value for index, state in saved["state"].items() for name, value in state.items()}
    for number, group in enumerate(saved["param_groups"]):
        entries |= {f"group{number}.{name}": value for name, value in group.items() if name != "params"}
    tensors = {name: value for name, value in entries.items() if isinstance(value, Tensor)}
    values = {name: list(v) if isinstance(v, tuple) else v for name, v in entries.items() if name not in tensors}
    return tensors, {"shapes": _shapes(optimizer), "values": values}


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], saved: Mapping[str, Any]
) -> None:
    """Restore a flattened state; it shares no memory with ``tensors``.

    Raises:
        ValueError: The parameters have other shapes.
    """
    if _shapes(optimizer) != saved["shapes"]:
        raise ValueError("the optimizer state is of other parameters: resume with the rank and targets of its run")
    groups = optimizer.state_dict()["param_groups"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**saved["values"], **tensors}.items():
        owner, name = key.split(".", 1)
        value = value.clone() if isinstance(value, Tensor) else value
        if isinstance(value, Tensor) and not owner.startswith("group"):
            parameter = parameters[int(owner)]
            value = shard_like(value, parameter) if value.shape == parameter.shape else value
        if owner.startswith("group"):
            group = groups[int(owner.removeprefix("group"))]
            group[name] = tuple(value) if isinstance(group.get(name), tuple) else value
        else:
            state.setdefault(int(owner), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    _undo_casts(optimizer, state)


def _undo_casts(optimizer: torch.optim.Optimizer, state: Mapping[int, Mapping[str, Any]]) -> None:
    """Restore the dtype of moments, which torch casts to that of their parameter: bfloat16 would lose bits."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, named in state.items():
        current = optimizer.state[parameters[index]]
        for name, value in named.items():
            if isinstance(value, Tensor) and current[name].dtype != value.dtype:
                current[name] = value.to(current[name].device)
