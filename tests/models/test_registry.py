"""Model families register themselves, are imported one at a time, and may come from a user's file or package."""

import ast

import pytest

from diffalign.models import DiffusionModel, family_names, get_family, load_model, register_family, registry
from diffalign.models.registry import load_family
from diffalign.models.sd3 import SD3Model
from diffalign.plugins import declaring_modules
from tests.conftest import ROOT
from tests.test_extension import FAMILY, foreign_pipeline

BUILT_IN = declaring_modules("models", "register_family")


@pytest.fixture(autouse=True)
def own_registry():
    yield
    for name in registry.FAMILIES.keys() - BUILT_IN.keys():
        del registry.FAMILIES[name]


@pytest.fixture
def foreign(tmp_path):
    return foreign_pipeline(tmp_path / "model")


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_family_is_found_by_its_pipeline_class(name):
    family = get_family(name)
    assert issubclass(family, DiffusionModel)
    assert family.__module__ == BUILT_IN[name]
    assert name in family_names()


@pytest.mark.parametrize("path", sorted(ROOT.glob("diffalign/**/*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_only_a_subclass_imports_the_file_of_a_family(path):
    tree = ast.parse(path.read_text())
    bases = {
        getattr(base, "id", "") for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for base in node.bases
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in BUILT_IN.values():
            assert {alias.name for alias in node.names} <= bases, f"{path.name} loads {node.module} for every model"


def test_a_pipeline_class_without_a_family_is_refused_with_those_that_have_one(foreign):
    with pytest.raises(ValueError, match="StableDiffusion3PAGPipeline are not supported") as error:
        load_model(foreign)
    assert all(name in str(error.value) for name in BUILT_IN)
    assert str(foreign) in str(error.value)
    assert len(str(error.value)) < 2000


def test_an_installed_package_brings_a_family_by_entry_point(foreign, tmp_path, monkeypatch):
    place = tmp_path / "site"
    (place / "own_family-1.0.dist-info").mkdir(parents=True)
    (place / "own_family_module.py").write_text(FAMILY)
    (place / "own_family-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: own-family\nVersion: 1.0\n")
    (place / "own_family-1.0.dist-info/entry_points.txt").write_text(
        "[diffalign.families]\nStableDiffusion3PAGPipeline = own_family_module:OwnModel\n"
    )
    monkeypatch.syspath_prepend(place)
    assert "StableDiffusion3PAGPipeline" in family_names()
    assert type(load_model(foreign, max_sequence_length=16)).__name__ == "OwnModel"


BROKEN = {
    "absent": ("x = 1", "no class of that name has @register_family"),
    "undecorated": (FAMILY.replace('@register_family("StableDiffusion3PAGPipeline")', ""), "no class of that name has"),
    "raises": ("raise RuntimeError('no licence')", "RuntimeError: no licence"),
    "abstract": (FAMILY.replace("SD3Model", "DiffusionModel").replace("models.sd3", "models"), "must define encode"),
    "other": (
        'from diffalign.models import register_family\n@register_family("X")\nclass OwnModel: ...',
        "no subclass",
    ),
    "taken": (FAMILY.replace("3PAGPipeline", "3Pipeline"), "have a family already"),
    "taken, not imported": (FAMILY.replace("StableDiffusion3PAG", "Sana"), "have a family already"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_code_that_is_no_family_is_refused(name, tmp_path, monkeypatch):
    code, message = BROKEN[name]
    if "not imported" in name:
        monkeypatch.delitem(registry.FAMILIES, "SanaPipeline", raising=False)
    (tmp_path / "own.py").write_text(code)
    with pytest.raises(ValueError, match=message) as error:
        load_family(f"{tmp_path}/own.py:OwnModel", allow_code=True)
    assert "write module:Class or file.py:Class" in str(error.value).replace("function", "Class")


def test_code_of_a_family_is_not_run_without_consent(tmp_path):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match="is code: set allow_reward_code"):
        load_family(f"{tmp_path}/evil.py:OwnModel")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match="are found by the model's pipeline"):
        load_family("OwnModel", allow_code=True)


def test_a_class_is_registered_where_it_is_defined():
    @register_family("KandinskyPipeline")
    class Own(SD3Model): ...

    assert get_family("KandinskyPipeline") is Own
