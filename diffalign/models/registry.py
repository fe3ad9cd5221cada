"""Model families by the pipeline class that they drive.

A family registers itself in its own file, which is imported when a model of it is loaded:

    @register_family("PixArtSigmaPipeline")
    class PixArtModel(DiffusionModel):
        ...

A user's family is named as ``file.py:PixArtModel`` or ``module:PixArtModel`` (``family`` of a configuration), or is an
entry point of the group ``diffalign.families`` whose name is the pipeline class.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import TypeVar

from diffalign.models.base import DiffusionModel
from diffalign.plugins import declaring_modules, entry_points
from diffalign.user_code import HOW, consented, load_code

F = TypeVar("F", bound=type[DiffusionModel])
GROUP = "diffalign.families"  # of entry points
KIND = "model family"
DECLARATION = ("models", "register_family")
# Families whose files are imported; ``family_names`` lists all.
FAMILIES: dict[str, type[DiffusionModel]] = {}


def register_family(pipeline: str) -> Callable[[F], F]:
    """Register a subclass of ``DiffusionModel`` as the model of a pipeline class of diffusers.

    Args:
        pipeline: Name of the class, as ``model_index.json`` has it.

    Raises:
        ValueError: The pipeline class has a family already.
        TypeError: The class is no ``DiffusionModel``, or leaves out a method of it.
    """

    def add(family: F) -> F:
        if not (isinstance(family, type) and issubclass(family, DiffusionModel)):
            raise TypeError(f"{getattr(family, '__name__', family)} is no subclass of diffalign.models.DiffusionModel")
        if inspect.isabstract(family):
            missing = ", ".join(sorted(family.__abstractmethods__))
            raise TypeError(f"{family.__name__} must define {missing}: see diffalign.models.DiffusionModel")
        # A file of this package owns its pipeline class, imported or not.
        owner = declaring_modules(*DECLARATION).get(pipeline, family.__module__)
        if pipeline in FAMILIES or owner != family.__module__:
            raise ValueError(f"pipelines of class {pipeline} have a family already: register one of another class")
        FAMILIES[pipeline] = family
        return family

    return add


def family_names() -> list[str]:
    """List the pipeline classes that have a family, importing none of them."""
    built_in = declaring_modules(*DECLARATION)
    return sorted({*built_in, *FAMILIES, *entry_points(group=GROUP).names})


def get_family(pipeline: str) -> type[DiffusionModel]:
    """Return the model class of a pipeline class, importing its file alone.

    ValueError: no family has this pipeline class; the message names those that there are.
    """
    if pipeline not in FAMILIES:
        if module := declaring_modules(*DECLARATION).get(pipeline):
            import_module(module)
        elif pipeline in (plugins := entry_points(group=GROUP)).names:
            family = plugins[pipeline].load()
            if pipeline not in FAMILIES:  # loading the plug-in may have registered it
                register_family(pipeline)(family)
    if pipeline not in FAMILIES:
        raise ValueError(
            f"pipelines of class {pipeline} are not supported; supported: {', '.join(family_names())}; for another, "
            "write a family of your own and give it as family: file.py:Class"
        )
    return FAMILIES[pipeline]


def load_family(spec: str, allow_code: bool = False) -> type[DiffusionModel]:
    """Import a user's family, which registers itself: ``load_family("my_family.py:MyModel", allow_code=True)``.

    Args:
        spec: ``file.py:Class`` or ``module:Class``, with ``@register_family(...)`` above the class.
        allow_code: Consent to import it.

    Raises:
        ValueError: Code that is missing, faulty, not allowed, or no registered family.
    """
    how = HOW.replace("function", "Class")
    if ":" not in spec:
        raise ValueError(f"{KIND} {spec!r}: families of this package are found by the model's pipeline; {how}")
    with consented(allow_code):
        module, name = load_code(spec, KIND)
    found = vars(module).get(name)
    family = next((family for family in FAMILIES.values() if family is found), None)
    if family is None:
        raise ValueError(
            f'{KIND} {spec!r} cannot be loaded: no class of that name has @register_family("...Pipeline") above it; '
            f"{how}"
        )
    return family
