"""Isolate user code: copy its inputs, and restore the process state and signal handlers that it changes."""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import FrameType, TracebackType
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from numpy.random import mtrand

from diffalign.rewards.support import process_state

T = TypeVar("T")


class RewardExit(RuntimeError):
    """Ordinary error in place of an exception of user code that would end the program, such as ``SystemExit``."""


def isolated(call: Callable[[], T]) -> T:
    """Return ``call()``, and restore the process state and signal handlers afterwards.

    Exceptions of ``call`` propagate, except those that would end the program (``SystemExit``, ``KeyboardInterrupt``,
    ``GeneratorExit`` ...), which become a ``RewardExit``. What a signal handler of the program raises while ``call``
    runs, such as KeyboardInterrupt at Ctrl-C, propagates unchanged, even if ``call`` catches it.
    """
    with _StateGuard(), _SignalGuard() as signals:
        try:
            result = call()
        except BaseException as error:
            if signals.raised is not None:
                raise signals.raised from None
            if isinstance(error, Exception):
                raise
            raise RewardExit(f"it raised {type(error).__name__} {error.args!r}"[:200]) from error
        if signals.raised is not None:
            raise signals.raised
        return result


def said(error: BaseException | None, length: int = 500) -> str:
    """Format an error's type and message in about ``length`` characters; survives a ``__str__`` that raises."""
    try:
        text = f"{type(error).__name__}: {error}"
    except BaseException:  # __str__ is user code too
        text = f"{type(error).__name__}, whose message cannot be printed"
    return text if len(text) <= length else text[:length] + " ..."


def named(texts: Iterable[str], most: int = 8, length: int = 80) -> str:
    """List distinct texts, quoted and shortened, with the number of those omitted."""
    found = list(dict.fromkeys(texts))
    short = [repr(text if len(text) <= length else text[:length] + "...") for text in found[:most]]
    return ", ".join(short) + (f" and {len(found) - most} more" if len(found) > most else "")


def copy_metadata(value: Any) -> Any:
    """Deep-copy metadata; values that cannot be copied, such as an open file, are shared."""
    try:
        return copy.deepcopy(value)
    except Exception:  # deepcopy runs code of the object's class
        return {key: copy_metadata(item) for key, item in value.items()} if isinstance(value, Mapping) else value


class _SignalGuard:
    """Forward signals to the program's Python handlers, and record what they raise, to tell it from user code's errors.

    Handlers that user code replaces are restored. Only the main thread receives signals; elsewhere this does nothing.
    """

    NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM")

    def __init__(self) -> None:
        self.raised: BaseException | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> _SignalGuard:
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in self.NAMES if hasattr(signal, name)):
                handler = self._handlers[number] = signal.getsignal(number)
                if callable(handler):
                    signal.signal(number, partial(self._forward, handler))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._handlers.items():
            if handler is not None and signal.getsignal(number) is not handler:  # None: set outside of Python
                signal.signal(number, handler)

    def _forward(self, handler: Callable[[int, FrameType | None], Any], number: int, frame: FrameType | None) -> None:
        try:
            handler(number, frame)
        except BaseException as error:
            self.raised = error
            raise


@dataclass(frozen=True)
class _Setting:
    """One part of the process state: ``read`` returns a comparable value, ``write`` restores it."""

    read: Callable[[], Any]
    write: Callable[[Any], object]


class _StateGuard:
    """Context manager that restores all ``SETTINGS`` and the warning filters on exit.

    Unchanged settings are not written, because the program continues in another thread while rewards run in the
    background. Contexts of several threads may overlap, as on a server: process-wide settings are then restored to
    their values before the first of them, so that no context saves the changes of another.
    """

    _lock: ClassVar = threading.Lock()
    _first: ClassVar[dict[str, Any]] = {}
    _threads: ClassVar[int] = 0
    _depth: ClassVar = threading.local()

    def __enter__(self) -> None:
        self._before = {name: setting.read() for name, setting in SETTINGS.items()}
        depth = self._depth.value = getattr(self._depth, "value", 0) + 1
        if depth == 1:
            with self._lock:
                if not _StateGuard._threads:
                    _StateGuard._first = self._before
                _StateGuard._threads += 1
                own = {name: self._before[name] for name in PER_THREAD}
                self._before = {**_StateGuard._first, **own}
        self._filters, self._content = warnings.filters, list(warnings.filters)
        self._streams = sys.stdout, sys.stderr

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._depth.value -= 1
        with self._lock:
            if not self._depth.value:
                _StateGuard._threads -= 1
            problems = [self._restore(name, setting) for name, setting in SETTINGS.items()]
        if self._filters != self._content:
            self._filters[:] = self._content  # type: ignore[index]  # typeshed declares a Sequence; it is a list
            with warnings.catch_warnings():  # invalidates the module's cache of filters
                pass
        # Only in the main thread: others may replace these concurrently, as catch_warnings and redirect_stdout do.
        if threading.current_thread() is threading.main_thread():
            warnings.filters = self._filters
            sys.stdout, sys.stderr = self._streams
        for problem in filter(None, problems):  # after the filters are restored: user code's may turn it into an error
            warnings.warn(problem, stacklevel=3)

    def _restore(self, name: str, setting: _Setting) -> str | None:
        """Restore one setting. Returns a message if that fails, so that the others are still restored."""
        try:
            if setting.read() != self._before[name]:
                setting.write(self._before[name])
        except Exception as error:
            return f"a reward changed the {name}, and it cannot be restored: {said(error)}"
        return None


def _state_of_generator() -> bytes:
    return torch.get_rng_state().numpy().tobytes()


def _set_generator(state: bytes) -> None:
    torch.set_rng_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))


def _accelerator() -> Any:
    """Return torch's module of the accelerator that this process uses; None before it is initialised."""
    device = torch.accelerator.current_accelerator()
    if device is None:
        return None
    module = torch.get_device_module(device)
    return module if getattr(module, "is_initialized", module.is_available)() else None


def _device_generators() -> tuple[bytes, ...]:
    module = _accelerator()
    if module is None:
        return ()
    states = module.get_rng_state_all() if hasattr(module, "get_rng_state_all") else [module.get_rng_state()]
    return tuple(state.numpy().tobytes() for state in states)


def _set_device_generators(states: tuple[bytes, ...]) -> None:
    restored = [torch.frombuffer(bytearray(state), dtype=torch.uint8) for state in states]
    module = _accelerator()
    if hasattr(module, "get_rng_state_all"):
        for device, state in enumerate(restored):
            module.set_rng_state(state, device)
    elif restored:  # mps has one device, and no index
        module.set_rng_state(restored[0])


def _numpy_generator() -> tuple[Any, ...]:
    generator = mtrand.get_bit_generator()  # the global bit generator can be replaced by another kind
    state: Any = np.random.get_state(legacy=False)
    return generator, _plain(dict(state))


def _plain(value: Any) -> Any:
    """Convert arrays in nested dicts to bytes, which makes them comparable."""
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    return (value.tobytes(), value.dtype.str) if isinstance(value, np.ndarray) else value


def _arrays(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _arrays(entry) for name, entry in value.items()}
    return np.frombuffer(value[0], dtype=value[1]) if isinstance(value, tuple) else value


def _set_numpy_generator(state: tuple[Any, ...]) -> None:
    mtrand.set_bit_generator(state[0])
    np.random.set_state(_arrays(state[1]))


def _working_directory() -> str | None:
    try:
        return os.getcwd()
    except OSError:
        return None


def _set_working_directory(path: str | None) -> None:
    if path is not None:
        try:
            os.chdir(path)
        except OSError as error:
            raise OSError(f"{path} cannot be entered again: {error}") from error


def _set_environment(before: Mapping[str, str]) -> None:
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


def _set_default_device(device: torch.device) -> None:
    torch.set_default_device(None if device.type == "cpu" else device)


def _set_deterministic(state: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(state[0], warn_only=state[1])


# Parents first: setting a parent also sets its children.
_PRECISIONS: tuple[Any, ...] = (
    torch.backends,
    torch.backends.cuda.matmul,
    torch.backends.cudnn,
    *(getattr(torch.backends.cudnn, part, None) for part in ("conv", "rnn")),
    torch.backends.mkldnn,
    *(getattr(torch.backends.mkldnn, part, None) for part in ("matmul", "conv", "rnn")),
)


def _matmul_precision() -> str | None:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # set per backend: there is no single name for it
        return None


def _precisions() -> tuple[str | None, ...]:
    return (_matmul_precision(), *(getattr(part, "fp32_precision", None) for part in _PRECISIONS))


def _set_precisions(state: tuple[str | None, ...]) -> None:
    matmul, *parts = state
    for _ in range(2):  # the global name sets several backends, and per-backend values make it unreadable
        for part, value in zip(_PRECISIONS, parts, strict=True):
            if value is not None and part.fp32_precision != value:
                part.fp32_precision = value
        if matmul is not None and _matmul_precision() != matmul:
            with contextlib.suppress(RuntimeError):
                torch.set_float32_matmul_precision(matmul)


_CUDNN = ("enabled", "benchmark", "benchmark_limit", "deterministic")


def _attributes(owner: Any, names: Sequence[str]) -> _Setting:
    def write(values: tuple[Any, ...]) -> None:
        for name, value in zip(names, values, strict=True):
            setattr(owner, name, value)

    return _Setting(lambda: tuple(getattr(owner, name) for name in names), write)


def _kernels() -> tuple[bool, ...]:
    return tuple(getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in _ATTENTION)


def _set_kernels(state: tuple[bool, ...]) -> None:
    for name, value in zip(_ATTENTION, state, strict=True):
        getattr(torch.backends.cuda, f"enable_{name}_sdp")(value)


_ATTENTION = ("flash", "mem_efficient", "math", "cudnn")


def _autocast(device: str) -> _Setting:
    def write(state: tuple[bool, torch.dtype]) -> None:
        torch.set_autocast_enabled(device, state[0])
        torch.set_autocast_dtype(device, state[1])

    return _Setting(lambda: (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)), write)


# Without one, CUDA's setting exists all the same.
ACCELERATOR = (torch.accelerator.current_accelerator() or torch.device("cuda")).type

SETTINGS: dict[str, _Setting] = {
    "default device": _Setting(torch.get_default_device, _set_default_device),  # first: other settings create tensors
    "default dtype": _Setting(torch.get_default_dtype, torch.set_default_dtype),
    "grad mode": _Setting(torch.is_grad_enabled, torch._C._set_grad_enabled),
    "threads": _Setting(torch.get_num_threads, torch.set_num_threads),
    "anomaly detection": _Setting(
        lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        lambda state: torch.autograd.set_detect_anomaly(*state),
    ),
    "deterministic algorithms": _Setting(
        lambda: (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        _set_deterministic,
    ),
    "fill of uninitialized memory": _attributes(torch.utils.deterministic, ("fill_uninitialized_memory",)),
    "cudnn": _attributes(torch.backends.cudnn, _CUDNN),
    "float32 precision": _Setting(_precisions, _set_precisions),
    "attention kernels": _Setting(_kernels, _set_kernels),
    "autocast": _autocast("cpu"),
    "autocast on the accelerator": _autocast(ACCELERATOR),
    "torch's generator": _Setting(_state_of_generator, _set_generator),
    "the accelerator's generators": _Setting(_device_generators, _set_device_generators),
    "numpy's generator": _Setting(_numpy_generator, _set_numpy_generator),
    "numpy's errors": _Setting(np.geterr, lambda state: np.seterr(**state)),
    "Python's generator": _Setting(random.getstate, random.setstate),
    "working directory": _Setting(_working_directory, _set_working_directory),
    "environment": _Setting(lambda: dict(os.environ), _set_environment),
    "garbage collector": _Setting(gc.isenabled, lambda on: gc.enable() if on else gc.disable()),
    "recursion limit": _Setting(sys.getrecursionlimit, sys.setrecursionlimit),
    "timers": _Setting(process_state.timers, process_state.set_timers),
    "umask": _Setting(process_state.umask, process_state.set_umask),
    "blocked signals": _Setting(
        process_state.blocked_signals, lambda mask: signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    ),
    "standard streams": _Setting(process_state.open_descriptors, process_state.open_again),
    "level of logging": _Setting(lambda: logging.root.manager.disable, logging.disable),
}
# Settings that are local to a thread.
PER_THREAD = (
    "default device",
    "grad mode",
    "threads",
    "autocast",
    "autocast on the accelerator",
    "numpy's errors",
    "blocked signals",
)
