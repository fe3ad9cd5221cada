"""Every family of the registry is in the tests of trainers and formats, and in the README's table of models."""

import re
from typing import get_args, get_type_hints

from diffusers import DiffusionPipeline

from diffalign.commands.export_config import Format
from diffalign.models import family_names
from diffalign.trainers.registry import algorithm_names
from tests.commands import test_export
from tests.conftest import ROOT
from tests.models import test_editing, test_families
from tests.models.families import FAMILIES
from tests.models.tiny_edit_pipelines import FAMILIES as EDITS

BUILDERS = {**{name: family.build for name, family in FAMILIES.items()}, **EDITS}


def pipeline_of(name):
    """The pipeline class of a family's tiny pipeline; the one without a builder is an asset."""
    build = BUILDERS[name]
    return "StableDiffusion3Pipeline" if build is None else get_type_hints(build)["return"].__name__


def cases(test):
    """The parameters of a test, each as a tuple of values, whatever their marks."""
    found = set()
    for mark in test.pytestmark:
        if mark.name == "parametrize":
            for case in mark.args[1]:
                values = getattr(case, "values", case)
                found.add(values if isinstance(values, tuple) else (values,))
    return found


def test_every_family_has_a_tiny_pipeline_and_a_row_in_the_readme():
    tested = {pipeline_of(name) for name in BUILDERS}
    assert all(issubclass(getattr(__import__("diffusers"), name), DiffusionPipeline) for name in tested)
    assert tested == set(family_names())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.split("| pipeline | models |")[1].split("\n\n")[0]
    assert set(re.findall(r"`(\w+Pipeline)`", table)) == set(family_names())


def test_every_trainer_trains_every_family():
    trainers = set(algorithm_names())
    trained = cases(test_families.test_exported_weights_sample_the_trainers_images_in_a_fresh_process)
    assert trained == {(name, trainer) for name in FAMILIES for trainer in trainers}
    edited = cases(test_editing.test_every_trainer_trains_and_diffusers_loads_the_lora)
    assert edited == {(trainer, name) for name in EDITS for trainer in trainers}


def test_every_format_of_every_family_is_read_back():
    with_lora = {name for name, family in FAMILIES.items() if family.lora}
    assert cases(test_export.test_every_format_gives_the_trainers_images) == {(name,) for name in with_lora}
    assert cases(test_export.test_full_weights_are_written_as_a_pipeline) >= {
        (name,) for name in FAMILIES.keys() - with_lora
    }
    assert cases(test_export.test_editing_models_are_exported) == {(name,) for name in EDITS}
    assert set(test_export.FORMATS) == set(get_args(Format))
