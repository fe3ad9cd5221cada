"""Where the networks of rewards live: loaded at first use, once per process, and off the device when told to."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from huggingface_hub import hf_hub_download
from torch import Tensor, nn

from diffalign.rewards.base import RewardUnavailable

PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
_LOADED: dict[tuple[Any, ...], Any] = {}
_LOCK = threading.Lock()  # of the two tables below
_LOADING: dict[tuple[Any, ...], threading.RLock] = {}
_IN_USE: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()


@dataclass(frozen=True)
class Weights:
    """Which weights a network reward uses, and where.

    path: a folder or file, or an id on the hub. revision: of the hub; None for its newest. precision: of the network, a
    key of ``PRECISIONS``. offload: back to the CPU after each use, so that the device is free for the next phase.
    """

    path: str
    revision: str | None = None
    precision: str = "no"
    offload: bool = False

    def __post_init__(self) -> None:
        """ValueError for an unknown precision."""
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")

    @property
    def spec(self) -> str:
        """path and revision in one, as ``split`` takes them."""
        return self.path if self.revision is None else f"{self.path}@{self.revision}"

    @property
    def dtype(self) -> torch.dtype:
        """Of the network's weights."""
        return PRECISIONS[self.precision]


def split(spec: str) -> tuple[str, str | None]:
    """``ID@REVISION`` of the hub (a commit, tag or branch), apart; without one None. What exists on disk is a path."""
    name, _, revision = spec.partition("@")
    return (spec, None) if Path(spec).exists() else (name, revision or None)


def pinned(spec: str) -> dict[str, str | None]:
    """``split``, as what ``from_pretrained`` takes."""
    return dict(zip(("pretrained_model_name_or_path", "revision"), split(spec), strict=True))


def check_path(path: str) -> None:
    """RewardUnavailable: it is no id of the hub (NAME or OWNER/NAME), and not there. Asking the hub takes a minute."""
    if (Path(path).is_absolute() or path.startswith(".") or path.count("/") > 1) and not Path(path).exists():
        raise RewardUnavailable(f"there is no file or folder {path}: check the path")


def load_once(loader: Callable[..., Any], *arguments: Any) -> Any:
    """``loader(*arguments)``, the first time; later calls of the process get the same object.

    Whoever loads it first, it can be differentiated: tensors made in inference mode cannot. RewardUnavailable: whatever
    the loader raises.
    """
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
    except Exception as error:  # of the hub and of the libraries that own the formats
        paths = " and ".join(item.path for item in arguments if isinstance(item, Weights))
        hint = "; check path and revision, and that the hub can be reached" if paths else ""
        problem = f"{paths or 'what it needs'} cannot be loaded: {type(error).__name__}: {error}{hint}"
        raise RewardUnavailable(problem) from error
    return _LOADED[key]


def repositories() -> list[tuple[str, str | None]]:
    """(name, revision) of all that this process has loaded; paths and other settings are among the names."""
    arguments = [item for _, *arguments in _LOADED for item in arguments]
    weights = [(item.path, item.revision) for item in arguments if isinstance(item, Weights)]
    return weights + [split(item) for item in arguments if isinstance(item, str)]


def repositories_of(reward: Any) -> list[tuple[str, str | None]]:
    """(path or id, revision) of what a reward will load, of all its parts where it combines others."""
    found: list[tuple[str, str | None]] = []
    for name, value in getattr(reward, "__dict__", {}).items():
        if isinstance(value, Weights):
            found.append((value.path, value.revision))
        elif name == "tokenizer" and isinstance(value, str):
            found.append(split(value))
        elif name == "rewards" and isinstance(value, Mapping):
            found += [source for part, _ in value.values() for source in repositories_of(part)]
    return found


def weights_file(weights: Weights, file: str) -> Path:
    """``file`` in the folder of ``weights``, the path itself if it is a file, or ``file`` in the hub's repository."""
    local = Path(weights.path)
    if local.is_file():
        return local
    if local.is_dir():
        return local / file
    return Path(hf_hub_download(weights.path, file, revision=weights.revision))


def state_dict(weights: Weights, file: str) -> dict[str, Tensor]:
    """The tensors of ``weights_file``, unpickled without running code."""
    found = torch.load(weights_file(weights, file), map_location="cpu", weights_only=True)
    return found.get("state_dict", found)


@contextmanager
def quiet() -> Iterator[None]:
    """Holds back warnings of the root logger, such as open_clip's about weights that are loaded a moment later."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def check_report(report: Mapping[str, Any], path: str, kind: str) -> None:
    """ValueError where ``from_pretrained`` reports weights that are missing, left over, or of another shape."""
    if wrong := {key: sorted(map(str, names))[:5] for key, names in report.items() if names}:
        raise ValueError(f"{path} does not fit {kind}: {wrong}; check the path, or use other weights")


def frozen(network: nn.Module, weights: Weights) -> nn.Module:
    """``network`` in its dtype, in evaluation mode, without trainable weights."""
    return network.requires_grad_(False).eval().to(weights.dtype)


@contextmanager
def on_device(network: nn.Module, weights: Weights, device: torch.device) -> Iterator[nn.Module]:
    """``network`` on ``device``; then back where it belongs. A server's threads use it one after the other.

    It stays where gradients are recorded: the backward pass still needs it there.
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


def release() -> None:
    """Forgets every network that rewards have loaded; the next use loads it again."""
    _LOADED.clear()
