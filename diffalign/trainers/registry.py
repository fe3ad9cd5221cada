"""Registry of algorithms: name -> configuration, algorithm, trainer, cost and trial.

An algorithm registers itself in its own file. Those of this package live in ``trainers/NAME/``, with the configuration
in ``config.py``, which needs no torch, and the algorithm in ``algorithm.py``. Installed packages add algorithms by the
entry point ``diffalign.algorithms``; code is named on the command line as ``file.py:name`` or ``module:name``.
"""

from __future__ import annotations

import difflib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, is_dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from diffalign.lazy import load
from diffalign.plugins import entry_points
from diffalign.user_code import consented, load_code

if TYPE_CHECKING:
    from diffalign.trainers.cost import Cost

GROUP = "diffalign.algorithms"
PACKAGE = __name__.rpartition(".")[0]
JUDGES = ("reward",)  # trainers of a reward, which have no diffusion model
A = TypeVar("A", bound=type[Any])


@dataclass(frozen=True)
class Entry:
    """A registered algorithm.

    Attributes:
        name: Name on the command line.
        algorithm: The class.
        config: Its configuration class.
        cost: What a run costs, for dry runs; None: not estimated.
        trial: Configuration of the two steps that ``diffalign doctor`` trains on the embedded world, besides its own
            defaults; "{assets}" stands for the folder of the embedded world.
        trainer_class: Import path of a trainer of its own; empty for the one of diffusion models.
        plan: Import path of a function of a configuration and a ``Place`` that prints what a run does and needs; empty:
            the forecast of diffusion models.
    """

    name: str
    algorithm: type[Any]
    config: type[Any]
    cost: Cost | None = None
    trial: Mapping[str, Any] = field(default_factory=dict)
    trainer_class: str = ""
    plan: str = ""

    @property
    def trainer(self) -> type[Any]:
        """A trainer class of the algorithm."""
        if self.trainer_class:
            found: type[Any] = load(self.trainer_class)
            return found
        from diffalign.trainers.base import Trainer

        title = "".join(part.capitalize() for part in self.name.split("_"))
        return type(
            f"{title}Trainer", (Trainer,), {"algorithm_class": self.algorithm, "__doc__": self.algorithm.__doc__}
        )


_ENTRIES: dict[str, Entry] = {}


def register_algorithm(
    name: str,
    *,
    config: type[Any],
    cost: Cost | None = None,
    trial: Mapping[str, Any] | None = None,
    trainer_class: str = "",
    plan: str = "",
) -> Callable[[A], A]:
    """Register an algorithm under a name. For the arguments see ``Entry``.

    Raises:
        ValueError: Another algorithm has the name.
    """

    def register(algorithm: A) -> A:
        known = _ENTRIES.get(name)
        if known is not None and known.algorithm.__module__ != algorithm.__module__:
            raise ValueError(f"algorithm {name!r} is registered by {known.algorithm.__module__}: choose another name")
        algorithm.name, algorithm.config_class = name, config
        _set_command(algorithm, name)
        _ENTRIES[name] = Entry(name, algorithm, config, cost, trial or {}, trainer_class, plan)
        return algorithm

    return register


def _set_command(algorithm: type[Any], command: str) -> None:
    script = f"scripts/train_{command}.py" if command in _built_in() else f"-m diffalign train {command}"
    algorithm.command, algorithm.launch_command = command, f"accelerate launch {script}"


def algorithm_names() -> list[str]:
    """List the names of all algorithms for diffusion models, importing none of this package."""
    return sorted({*_built_in(), *_ENTRIES, *entry_points(GROUP).names} - {*JUDGES})


def trainer_names() -> list[str]:
    """List the names that ``diffalign train`` takes: those of all algorithms, and of the trainers of a reward."""
    return sorted({*algorithm_names(), *JUDGES})


def find_algorithm(name: str, allow_code: bool = False) -> Entry:
    """Import and return a registered algorithm.

    Args:
        name: A registered name, or ``file.py:name`` or ``module:name`` of code that registers it.
        allow_code: Consent to import code, given by typing its name.

    Raises:
        ValueError: There is no such algorithm, or code that is missing, fails or registers no such name.
    """
    if ":" in name:
        with consented(allow_code):
            _, own = load_code(name, "algorithm")
        if own not in _ENTRIES:
            raise ValueError(f"{name!r} registers no algorithm {own!r}: decorate it with @register_algorithm({own!r})")
        _set_command(_ENTRIES[own].algorithm, name)
        return _ENTRIES[own]
    if name not in _ENTRIES:
        if name in _built_in():
            import_module(f"{PACKAGE}.{name}.algorithm")
        for point in entry_points(GROUP).select(name=name):
            point.load()
    if name not in _ENTRIES:
        raise ValueError(unknown(name))
    return _ENTRIES[name]


def config_class(name: str, allow_code: bool = False) -> type[Any]:
    """Return the configuration class of an algorithm; one of this package needs no torch for it."""
    if name in _ENTRIES or name not in _built_in():
        return find_algorithm(name, allow_code).config
    module = import_module(f"{PACKAGE}.{name}.config")
    (found,) = (one for one in vars(module).values() if is_dataclass(one) and one.__module__ == module.__name__)
    assert isinstance(found, type)
    return found


def unknown(name: str | None = None) -> str:
    """Return the message for a name that no algorithm has."""
    known = trainer_names()
    if name is None:
        return f"name a trainer: {', '.join(known)}"
    close = difflib.get_close_matches(name, known, n=1)
    return f"name a trainer: {', '.join(known)}, not {name!r}" + (f"; did you mean {close[0]}?" if close else "")


def _built_in() -> list[str]:
    """List the folders of ``trainers/``, each of which is an algorithm."""
    return [module.name for module in pkgutil.iter_modules(import_module(PACKAGE).__path__) if module.ispkg]
