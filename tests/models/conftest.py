"""The small random pipelines, written once."""

import pytest
from diffusers import DDIMScheduler, DiffusionPipeline

from tests.conftest import PIPELINE
from tests.models import tiny_unet_pipelines as tiny
from tests.models.families import FAMILIES


@pytest.fixture(scope="session")
def family_pipelines(tmp_path_factory):
    """Family -> folder, the same at every call; no test may write there."""
    root = tmp_path_factory.mktemp("pipelines")
    folders = {name: PIPELINE if family.build is None else root / name for name, family in FAMILIES.items()}
    for name, family in FAMILIES.items():
        if family.build is not None:
            tiny.write(family.build, folders[name])
    return folders


@pytest.fixture(scope="session")
def tiny_pipelines(family_pipelines):
    """Those of Stable Diffusion 1, 2 and XL."""
    return {name: family_pipelines[name] for name in tiny.FAMILIES}


@pytest.fixture(scope="session")
def plain(family_pipelines):
    """A family's pipeline as plain diffusers loads it; UNets are sampled by DDIM."""

    def load(name):
        pipe = DiffusionPipeline.from_pretrained(family_pipelines[name])
        if "unet" in pipe.components:
            pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return load
