"""Call user code so that it changes nothing for others: own inputs, and the state of the process as it was."""

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

from diffalign.rewards.support import process_state

T = TypeVar("T")


class RewardExit(RuntimeError):
    """User code that raised what ends a program, such as ``SystemExit``, as an error like any other."""


def isolated(call: Callable[[], T]) -> T:
    """Return ``call()``, with the state of the process and its signal handlers put back as they were.

    What ``call`` raises comes out, but for what would end the program (``SystemExit``, ``KeyboardInterrupt``,
    ``GeneratorExit`` ...), which comes out as a ``RewardExit``. A real Ctrl-C, or whatever else a signal handler of the
    program raises while ``call`` runs, comes out as it is, even where ``call`` swallows it.
    """
    with _StateGuard(), _SignalGuard() as stops:
        try:
            result = call()
        except BaseException as error:
            if stops.raised is not None:
                raise stops.raised from None
            if isinstance(error, Exception):
                raise
            raise RewardExit(f"it raised {type(error).__name__} {error.args!r}"[:200]) from error
        if stops.raised is not None:
            raise stops.raised
        return result


def said(error: BaseException | None, length: int = 500) -> str:
    """Return an error's type and message in at most about ``length`` characters, also where it cannot be printed."""
    try:
        text = f"{type(error).__name__}: {error}"
    except BaseException:  # __str__ is user code too
        text = f"{type(error).__name__}, whose message cannot be printed"
    return text if len(text) <= length else text[:length] + " ..."


def named(texts: Iterable[str], most: int = 8, length: int = 80) -> str:
    """Return different texts in quotes, shortened, and how many more there are."""
    found = list(dict.fromkeys(texts))
    short = [repr(text if len(text) <= length else text[:length] + "...") for text in found[:most]]
    return ", ".join(short) + (f" and {len(found) - most} more" if len(found) > most else "")


def copy_metadata(value: Any) -> Any:
    """Return a deep copy of metadata; what cannot be copied, such as an open file, is passed on as it is."""
    try:
        return copy.deepcopy(value)
    except Exception:  # copying runs the code of the object's class
        return {key: copy_metadata(item) for key, item in value.items()} if isinstance(value, Mapping) else value


class _SignalGuard:
    """Passes signals on to the program's Python handlers, and keeps what these raise: that is not the callee's own.

    Handlers that the callee replaces are put back. Only the main thread receives signals; elsewhere this does nothing.
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
                    signal.signal(number, partial(self._pass_on, handler))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._handlers.items():
            if handler is not None and signal.getsignal(number) is not handler:  # None: set outside of Python
                signal.signal(number, handler)

    def _pass_on(self, handler: Callable[[int, FrameType | None], Any], number: int, frame: FrameType | None) -> None:
        try:
            handler(number, frame)
        except BaseException as error:
            self.raised = error
            raise


@dataclass(frozen=True)
class _Setting:
    """One part of the process's state: how to read it, as something that compares, and how to put it back."""

    read: Callable[[], Any]
    write: Callable[[Any], object]


class _StateGuard:
    """A context at whose end every one of ``SETTINGS``, and the filters of warnings, are as at its beginning.

    What has not changed is not written: while rewards run in a thread of their own, the program goes on in another.
    Contexts of several threads may overlap, as those of a server's rewards do. What is the process's is then put back
    to what it was before the first of them: none takes another's changes for the state to restore.
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
            self._filters[:] = self._content
            with warnings.catch_warnings():  # tells the module that its filters have changed
                pass
        # Another thread may have replaced these by itself, such as ``catch_warnings`` and ``redirect_stdout`` do.
        if threading.current_thread() is threading.main_thread():
            warnings.filters = self._filters
            sys.stdout, sys.stderr = self._streams
        for problem in filter(None, problems):  # not before the filters are as they were: they may make it an error
            warnings.warn(problem, stacklevel=3)

    def _restore(self, name: str, setting: _Setting) -> str | None:
        """Put one setting back; one that cannot be must not keep the others from it. Returns what went wrong."""
        try:
            if setting.read() != self._before[name]:
                setting.write(self._before[name])
        except Exception as error:
            return f"a reward changed the {name}, and it cannot be put back: {said(error)}"
        return None


def _state_of_generator() -> bytes:
    return torch.get_rng_state().numpy().tobytes()


def _set_generator(state: bytes) -> None:
    torch.set_rng_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))


def _cuda_generators() -> tuple[bytes, ...]:
    if not torch.cuda.is_initialized():
        return ()
    return tuple(state.numpy().tobytes() for state in torch.cuda.get_rng_state_all())


def _set_cuda_generators(states: tuple[bytes, ...]) -> None:
    for device, state in enumerate(states):
        torch.cuda.set_rng_state(torch.frombuffer(bytearray(state), dtype=torch.uint8), device)


def _numpy_generator() -> tuple[Any, ...]:
    generator = np.random.get_bit_generator()  # which can be replaced, by one of another kind too
    state: Any = np.random.get_state(legacy=False)
    return generator, _plain(dict(state))


def _plain(value: Any) -> Any:
    """Return nested dicts with arrays as bytes, so that they compare."""
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    return (value.tobytes(), value.dtype.str) if isinstance(value, np.ndarray) else value


def _arrays(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _arrays(entry) for name, entry in value.items()}
    return np.frombuffer(value[0], dtype=value[1]) if isinstance(value, tuple) else value


def _set_numpy_generator(state: tuple[Any, ...]) -> None:
    np.random.set_bit_generator(state[0])
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


def _set_deterministic(state: tuple[bool, bool, bool]) -> None:
    torch.use_deterministic_algorithms(state[0], warn_only=state[1])
    torch.utils.deterministic.fill_uninitialized_memory = state[2]


# Parents before their parts, which follow them.
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
    except RuntimeError:  # it was set by parts, and no one name says how
        return None


def _precisions() -> tuple[str | None, ...]:
    return (_matmul_precision(), *(getattr(part, "fp32_precision", None) for part in _PRECISIONS))


def _set_precisions(state: tuple[str | None, ...]) -> None:
    matmul, *parts = state
    for _ in range(2):  # one name sets several parts, and parts may make the name unreadable
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


SETTINGS: dict[str, _Setting] = {
    "default device": _Setting(torch.get_default_device, _set_default_device),  # first: others make tensors
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
            torch.utils.deterministic.fill_uninitialized_memory,
        ),
        _set_deterministic,
    ),
    "cudnn": _attributes(torch.backends.cudnn, _CUDNN),
    "float32 precision": _Setting(_precisions, _set_precisions),
    "attention kernels": _Setting(_kernels, _set_kernels),
    "autocast": _autocast("cpu"),
    "autocast on CUDA": _autocast("cuda"),
    "torch's generator": _Setting(_state_of_generator, _set_generator),
    "CUDA's generators": _Setting(_cuda_generators, _set_cuda_generators),
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
# Those that each thread has for itself.
PER_THREAD = (
    "default device",
    "grad mode",
    "threads",
    "autocast",
    "autocast on CUDA",
    "numpy's errors",
    "blocked signals",
)
