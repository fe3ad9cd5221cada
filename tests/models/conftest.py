"""The small random pipelines, as plain diffusers loads them."""

import pytest
from diffusers import DDIMScheduler, DiffusionPipeline

from tests.models import tiny_unet_pipelines as tiny


def ddim_options(pipe) -> dict:
    """Return what sampling with DDIM changes in a scheduler's configuration."""
    linspace = pipe.scheduler.config.get("timestep_spacing") == "linspace"  # DDIM cannot step over it
    return {"clip_sample": False, **({"timestep_spacing": "leading"} if linspace else {})}


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
