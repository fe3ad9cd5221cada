"""The small random pipelines, written once."""

import pytest
from diffusers import DDIMScheduler, DiffusionPipeline

from tests.conftest import PIPELINE
from tests.models import tiny_unet_pipelines as tiny
from tests.models.families import FAMILIES


def ddim_options(pipe) -> dict:
    """Return what sampling with DDIM changes in a scheduler's configuration."""
    linspace = pipe.scheduler.config.get("timestep_spacing") == "linspace"  # DDIM cannot step over it
    return {"clip_sample": False, **({"timestep_spacing": "leading"} if linspace else {})}


class Lazy(dict):
    """A dictionary that makes a missing value from its key."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def __missing__(self, key):
        self[key] = self.make(key)
        return self[key]


@pytest.fixture(scope="session")
def family_pipelines(tmp_path_factory):
    """Family -> folder, written when first asked for and the same at every call; no test may write there."""
    root = tmp_path_factory.mktemp("pipelines")

    def written(name):
        if (build := FAMILIES[name].build) is None:
            return PIPELINE
        tiny.write(build, root / name)
        return root / name

    return Lazy(written)


@pytest.fixture(scope="session")
def tiny_pipelines(family_pipelines):
    """Those of Stable Diffusion 1, 2 and XL."""
    return {name: family_pipelines[name] for name in tiny.FAMILIES}


@pytest.fixture(scope="session")
def plain(family_pipelines):
    """A family's pipeline as plain diffusers loads it; UNets are sampled by DDIM."""

    def load(name):
        pipe = DiffusionPipeline.from_pretrained(family_pipelines[name])
        if "unet" in pipe.components or type(pipe).__name__ == "PixArtSigmaPipeline":
            pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **ddim_options(pipe))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return load
