"""The direction of imports: which package may import which."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "diffalign"

# Room -> the rooms that it may import besides itself.
FOUNDATION = {
    "device",
    "embedded",
    "files",
    "remote",
    "atomic",
    "media",
    "structures",
    "config",
    "fsdp",
    "rng",
    "tokens",
}
FOUNDATION |= {"lora_source"}
ALLOWED = {
    "device": set(),
    "embedded": set(),
    "files": {"remote"},
    "remote": {"tokens", "atomic"},
    "atomic": set(),
    "media": {"files"},
    "structures": {"files"},
    "tokens": set(),
    "lora_source": set(),
    "plugins": set(),
    "user_code": set(),
    "lazy": set(),
    "messages": set(),
    "config": {"embedded", "files", "atomic", "remote", "tokens"},
    "preflight": {"config", "lora_source", "remote", "messages", "models", "plugins", "rewards", "data"},
    "console": {"models"},
    "log": set(),
    "fsdp": set(),
    "rng": set(),
    "diffusion": {"device", "structures"},
    "losses": {"device", "structures", "diffusion", "plugins", "user_code"},
    "shapes": {"structures"},
    "rewards": FOUNDATION | {"plugins", "shapes", "user_code"},
    "data": FOUNDATION - {"config", "fsdp", "rng", "tokens", "lora_source"},
    "models": FOUNDATION | {"diffusion", "plugins", "user_code"},
    "runtime": FOUNDATION | {"models", "log"},
    "rollout": FOUNDATION | {"log", "diffusion", "models", "rewards", "data", "runtime"},
    "evaluation": FOUNDATION | {"log", "models", "rewards", "data", "rollout", "runtime"},
}
ALLOWED["benchmarks"] = FOUNDATION | {"data", "rewards", "plugins"}
ALLOWED["report"] = ALLOWED["evaluation"] | {"evaluation", "benchmarks"}
ALLOWED["trainers"] = (set(ALLOWED) - {"preflight", "console"}) | {"trainers"}
ALLOWED["forecast"] = set(ALLOWED)
ALLOWED["commands"] = set(ALLOWED)
ALLOWED["cli"] = set(ALLOWED)
ALLOWED["__init__"] = set(ALLOWED)
ALLOWED["__main__"] = {"cli"}

# Library -> the rooms that may touch it.
PRIVATE = {
    "diffusers": {"models", "rewards"},  # rewards: dina_lrm is a diffusion transformer
    "peft": {"models"},
    "accelerate": {"log", "runtime", "evaluation", "commands", "trainers"},
    "yaml": {"config", "report"},
}


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names if node.module == "diffalign"}
    return names


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def graph(root: Path) -> dict[str, set[str]]:
    """Module -> modules that it imports, at its top, in functions or for types."""
    modules = {module_name(path): path for path in root.rglob("*.py")}
    found: dict[str, set[str]] = {}
    for name, path in modules.items():
        known = found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                known |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                full = {f"{node.module}.{alias.name}" for alias in node.names}
                known |= {one if one in modules else str(node.module) for one in full}
        found[name] = (known & set(modules)) - {name}
    return found


def a_circle(imported: dict[str, set[str]]) -> list[str]:
    """Return the modules of a circle, or none."""
    done: set[str] = set()

    def follow(name: str, above: list[str]) -> list[str]:
        if name in above:
            return [*above[above.index(name) :], name]
        if name in done:
            return []
        for other in sorted(imported[name]):
            if circle := follow(other, [*above, name]):
                return circle
        done.add(name)
        return []

    return next((circle for name in sorted(imported) if (circle := follow(name, []))), [])


FILES = [pytest.param(path, id=str(path.relative_to(PACKAGE))) for path in sorted(PACKAGE.rglob("*.py"))]


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES)
def test_rooms_import_downwards_only(path):
    known = {name.split(".")[1] for name in imports(path) if name.startswith("diffalign.")}
    # The configuration of a room declares its fields with those of ``config``.
    declares = {"config"} if path.stem == "config" or path.stem.endswith("_config") else set()
    assert known <= ALLOWED[room(path)] | {room(path)} | declares


@pytest.mark.parametrize("path", FILES)
def test_libraries_stay_in_their_rooms(path):
    for library, rooms in PRIVATE.items():
        if room(path) not in rooms:
            assert not {name for name in imports(path) if name.split(".")[0] == library}, library


def test_the_maths_sees_tensors_only():
    for name in ("diffusion", "losses"):
        for path in (PACKAGE / name).rglob("*.py"):
            tops = {imported.split(".")[0] for imported in imports(path)}
            standard = {
                "__future__",
                "collections",
                "dataclasses",
                "hashlib",
                "inspect",
                "math",
                "pathlib",
                "re",
                "typing",
            }
            assert tops <= standard | {"torch", "diffalign"}, path


def test_no_modules_import_each_other_in_a_circle():
    assert a_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    imported = graph(PACKAGE)
    assert len(imported) > 100
    assert not a_circle(imported)


@pytest.mark.parametrize("below", ["runtime", "rollout"])
def test_what_trainers_use_knows_no_trainer(below):
    found = {name for path in (PACKAGE / below).rglob("*.py") for name in imports(path)}
    assert found
    assert not {name for name in found if name.startswith("diffalign.trainers")}
