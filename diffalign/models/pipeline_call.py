"""Write the diffusers call that reproduces an evaluation's images, as Python source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diffalign.diffusion.schedule import ddim_spacing
from diffalign.models.base import DiffusionModel


@dataclass(frozen=True)
class PipelineCall:
    """The call of a pipeline as source code.

    Attributes:
        arguments: Keyword arguments of ``pipe(prompt, ...)``.
        setup: Statements on ``pipe`` between loading and calling.
        imports: Names of diffusers that ``setup`` needs.
    """

    arguments: Mapping[str, str]
    setup: tuple[str, ...] = ()
    imports: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The arguments as source text after the prompt."""
        return "".join(f", {name}={value}" for name, value in self.arguments.items())


@dataclass(frozen=True)
class Sampled:
    """Sampling settings. guidance: the trainers' ``guidance_scale``; None or a scale that does not guide is off."""

    num_steps: int
    schedule: str = "pipeline"
    guidance: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


def pipeline_call(model: DiffusionModel, sampled: Sampled) -> PipelineCall:
    """Return the call of the model's pipeline that samples with these settings.

    Steps, guidance and prompt length are always given, because the defaults differ between versions of diffusers.
    """
    setup, imports, steps = _schedule(model, sampled)
    arguments = {**steps, **model.guidance_arguments(sampled.guidance)}
    if (length := getattr(model, "max_sequence_length", None)) is not None:
        arguments["max_sequence_length"] = str(length)
    arguments |= _size(model)
    return PipelineCall(arguments, (*setup, *_source(model)), tuple(imports))


def _source(model: DiffusionModel) -> list[str]:
    """Return the statements that load a source image as the model saw it; none for models that do not edit."""
    if not getattr(model, "edits", False):
        return []
    height, width = model.source_size(model.default_resolution)
    return [
        "from diffusers.utils import load_image",
        "from PIL import Image, ImageOps",
        f'source = ImageOps.fit(load_image("source.png"), ({width}, {height}), Image.Resampling.LANCZOS)',
    ]


def _schedule(model: DiffusionModel, sampled: Sampled) -> tuple[list[str], list[str], dict[str, str]]:
    """Return setup statements, imports, and the arguments that select the timesteps."""
    count = sampled.num_steps
    steps = {"num_inference_steps": str(count)}
    config = model.pipeline.scheduler.config
    if model.parameterization != "flow":
        # Evaluations use DDIM, whatever the pipeline's scheduler is.
        spacing = "".join(f', {name}="{value}"' for name, value in ddim_spacing(config, sampled.schedule).items())
        change = f"pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False{spacing})"
        return [change], ["DDIMScheduler"], steps
    uniform = {"sigmas": f"[1 - i / {count} for i in range({count})]"}
    if config.get("use_flow_sigmas") and sampled.schedule == "uniform":
        change = "pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=pipe.scheduler.config.flow_shift)"
        return [change], ["FlowMatchEulerDiscreteScheduler"], {**steps, **uniform}
    if config.get("use_flow_sigmas"):
        # First-order DPM-Solver++ is the ODE step of an evaluation.
        change = "pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, solver_order=1)"
        return [change], [], steps
    if sampled.schedule == "uniform" and not getattr(model, "uniform_grid", True):
        return [], [], {**steps, **uniform}
    return [], [], steps


def _size(model: DiffusionModel) -> dict[str, str]:
    """Return height and width if the run sets them or the model would take those of the source."""
    if model.resolution is None and not getattr(model, "edits", False):
        return {}
    height, width = model.default_resolution
    return {"height": str(height), "width": str(width), **model.size_arguments}
