"""Load reward networks at first use, once per process, and offload them if configured."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from huggingface_hub import hf_hub_download
from torch import Tensor, nn

from diffalign.rewards.base import RECIPE, Reward, RewardUnavailable

Network = TypeVar("Network", bound=nn.Module)
PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
_LOADED: dict[tuple[Any, ...], Any] = {}
_REPLACED: ContextVar[Callable[..., Any] | None] = ContextVar("replaced", default=None)
_LOCK = threading.Lock()  # guards the two tables below
_LOADING: dict[tuple[Any, ...], threading.RLock] = {}
_IN_USE: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()


@dataclass(frozen=True)
class Weights:
    """Source, precision and placement of a reward's weights.

    Args:
        path: a folder, a file, or a hub id.
        revision: of the hub; None for the newest.
        precision: of the network, a key of ``PRECISIONS``.
        offload: move the network to the CPU after each use, to free device memory.
    """

    path: str
    revision: str | None = None
    precision: str = "no"
    offload: bool = False

    def __post_init__(self) -> None:
        """Check the precision."""
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")

    @property
    def spec(self) -> str:
        """path and revision as one text, the argument of ``split``."""
        return self.path if self.revision is None else f"{self.path}@{self.revision}"

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights."""
        return PRECISIONS[self.precision]


def split(spec: str) -> tuple[str, str | None]:
    """Split ``ID@REVISION`` (a commit, tag or branch) into id and revision or None. A path on disk is not split."""
    name, _, revision = spec.partition("@")
    return (spec, None) if Path(spec).exists() else (name, revision or None)


def pinned(spec: str) -> dict[str, str | None]:
    """Return ``split`` as arguments of ``from_pretrained``."""
    return dict(zip(("pretrained_model_name_or_path", "revision"), split(spec), strict=True))


def check_path(path: str) -> None:
    """Raise RewardUnavailable for a missing path that is no hub id, to avoid a slow request to the hub."""
    if (Path(path).is_absolute() or path.startswith(".") or path.count("/") > 1) and not Path(path).exists():
        raise RewardUnavailable(f"there is no file or folder {path}: check the path")


@contextmanager
def loading_with(make: Callable[..., Any]) -> Iterator[None]:
    """Let ``load_once(loader, *arguments)`` return ``make(loader, *arguments)`` inside the context, uncached."""
    token = _REPLACED.set(make)
    try:
        yield
    finally:
        _REPLACED.reset(token)


def load_once(loader: Callable[..., Any], *arguments: Any) -> Any:
    """Return ``loader(*arguments)``, cached for the process.

    The loader runs outside inference mode, because inference tensors do not support autograd. Exceptions of the loader
    become RewardUnavailable.
    """
    if (make := _REPLACED.get()) is not None:
        return make(loader, *arguments)
    key = (loader, *arguments)
    with _LOCK:
        lock = _LOADING.setdefault(key, threading.RLock())
    with lock:
        return _LOADED[key] if key in _LOADED else _load(key)


def _load(key: tuple[Any, ...]) -> Any:
    loader, *arguments = key
    for item in arguments:
        if isinstance(item, Weights):
            check_path(item.path)
    try:
        with torch.inference_mode(False):
            _LOADED[key] = loader(*arguments)
    except Exception as error:  # the hub and the format libraries raise many types
        paths = " and ".join(item.path for item in arguments if isinstance(item, Weights))
        hint = "; check path and revision, and that the hub can be reached" if paths else ""
        problem = f"{paths or 'what it needs'} cannot be loaded: {type(error).__name__}: {error}{hint}"
        raise RewardUnavailable(problem) from error
    return _LOADED[key]


def repositories() -> list[tuple[str, str | None]]:
    """List (name, revision) of everything loaded in this process; names include paths and other settings."""
    arguments = [item for _, *arguments in _LOADED for item in arguments]
    weights = [(item.path, item.revision) for item in arguments if isinstance(item, Weights)]
    return weights + [split(item) for item in arguments if isinstance(item, str)]


def repositories_of(reward: Any) -> list[tuple[str, str | None]]:
    """List (path or id, revision) of what a reward will load, including the rewards that it combines."""
    found: list[tuple[str, str | None]] = []
    for name, value in getattr(reward, "__dict__", {}).items():
        if isinstance(value, Weights) and value.path:
            found.append((value.path, value.revision))
        elif name == "tokenizer" and isinstance(value, str):
            found.append(split(value))
        elif name == "rewards" and isinstance(value, Mapping):
            found += [source for part, _ in value.values() for source in repositories_of(part)]
    return found


def weights_file(weights: Weights, file: str) -> Path:
    """Locate ``file`` in the folder or hub repository of ``weights``; a path to a file is returned as it is."""
    local = Path(weights.path)
    if local.is_file():
        return local
    if local.is_dir():
        return local / file
    return Path(hf_hub_download(weights.path, file, revision=weights.revision))


def state_dict(weights: Weights, file: str) -> dict[str, Tensor]:
    """Load the tensors of ``weights_file`` with ``weights_only=True``."""
    found = torch.load(weights_file(weights, file), map_location="cpu", weights_only=True)
    return found.get("state_dict", found)


def offloaded(reward: Reward) -> Reward:
    """Return a reward whose networks are offloaded after each use; the same one where it has no ``Weights``."""
    held = {name: value for name, value in getattr(reward, "__dict__", {}).items() if isinstance(value, Weights)}
    if not held or not dataclasses.is_dataclass(reward):
        return reward
    changed: Any = dataclasses.replace(
        reward, **{name: dataclasses.replace(value, offload=True) for name, value in held.items()}
    )
    if RECIPE in vars(reward):
        object.__setattr__(changed, RECIPE, vars(reward)[RECIPE])
    return changed


def unload() -> None:
    """Move the networks that are configured to be offloaded to the CPU, after passes that recorded gradients."""
    for (_, *arguments), parts in list(_LOADED.items()):
        if any(isinstance(item, Weights) and item.offload for item in arguments):
            for part in parts if isinstance(parts, tuple) else (parts,):
                if isinstance(part, nn.Module):
                    part.to("cpu")


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings of the root logger, such as open_clip's about weights that are loaded afterwards."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def check_report(report: Mapping[str, Any], path: str, kind: str) -> None:
    """Raise ValueError if ``from_pretrained`` reports missing, unexpected or mismatched weights."""
    if wrong := {key: sorted(map(str, names))[:5] for key, names in report.items() if names}:
        raise ValueError(f"{path} does not fit {kind}: {wrong}; check the path, or use other weights")


def frozen(network: Network, weights: Weights) -> Network:
    """Freeze a network, in evaluation mode and in the dtype of ``weights``."""
    return network.requires_grad_(False).eval().to(weights.dtype)


@contextmanager
def on_device(network: nn.Module, weights: Weights, device: torch.device) -> Iterator[nn.Module]:
    """Move a network to ``device`` inside the context, under a lock for threads of a server.

    Afterwards it is offloaded if configured, unless gradients are recorded: the backward pass needs it on the device.
    """
    with _LOCK:
        lock = _IN_USE.setdefault(network, threading.RLock())
    with lock:
        network.to(device)
        try:
            yield network
        finally:
            if weights.offload and not torch.is_grad_enabled():
                network.to("cpu")
