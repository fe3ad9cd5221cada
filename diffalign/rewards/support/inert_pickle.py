"""Read the tensors of a module that was pickled whole, without running or importing anything that the file names."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def tensors_of(path: Path) -> dict[str, Tensor]:
    """Read parameters and buffers of a file of ``torch.save``, by their names in the state dict.

    The file may hold a state dict, or a whole module. Classes of a module's pickle are replaced by ones without code;
    torch's restricted unpickler refuses everything else.

    Raises:
        ValueError: the file holds neither.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(_inert(name), name) for name in names]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(found, Mapping):
        found = found.get("state_dict", found)
        tensors = dict(found) if isinstance(found, Mapping) else {}
    else:
        tensors = dict(_walk(found, ""))
    if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{path} holds neither a state dict nor a module: give the published file")
    return tensors


def _inert(name: str) -> type:
    """Make a class that takes any arguments and does nothing, in place of the global ``name``."""
    return type(name.rpartition(".")[2], (), {"__init__": lambda self, *args, **kwargs: None})


def _walk(module: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    held = getattr(module, "__dict__", {})
    temporary = held.get("_non_persistent_buffers_set") or ()
    for kind in ("_parameters", "_buffers"):
        for name, tensor in (held.get(kind) or {}).items():
            if isinstance(tensor, Tensor) and name not in temporary:
                yield prefix + name, tensor.detach()
    for name, child in (held.get("_modules") or {}).items():
        yield from _walk(child, f"{prefix}{name}.")
