"""Python that loads a run's weights with plain diffusers and draws as the run's evaluations did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffalign.fsdp import plain_class
from diffalign.models import DiffusionModel
from diffalign.models.negative_prompt import NEGATIVE_NAME
from diffalign.models.pipeline_call import PipelineCall, Sampled, pipeline_call
from diffalign.report.model_card import literal
from diffalign.runtime.trainer_config import TrainerConfig


def _left_out(model: DiffusionModel) -> str:
    """Return arguments for parts that this pipeline lacks and its class requires, such as the T5 of SD3."""
    pipeline = model.pipeline
    missing = [name for name, part in pipeline.components.items() if part is None]
    return "".join(f", {name}=None" for name in missing if name not in pipeline._optional_components)


def load_snippet(model: DiffusionModel, args: TrainerConfig, prompt: str) -> str:
    """Return the lines: imports, the pipeline, its scheduler where evaluations use another, the weights, the call.

    Args:
        model: What was trained: a LoRA, the denoiser, or a negative prompt.
        args: The run's configuration.
        prompt: What to draw.
    """
    call = evaluation_call(model, args)
    source = ", revision=".join(literal(name) for name in (args.model, args.revision) if name)
    folder, part = Path(args.output_dir), model.denoiser_name
    imports, component, load, between = [], "", [], []
    if model.negative is not None:
        between = [f"negative = load_file({literal(folder / NEGATIVE_NAME)})"]
    elif model.has_adapter:
        between = [f"pipe.load_lora_weights({literal(folder)})"]
    else:
        name = plain_class(model.raw_denoiser).__name__
        imports, component = [name], f", {part}=denoiser"
        load = [f"denoiser = {name}.from_pretrained({literal(folder / part)})"]
    return "\n".join(
        [
            f"from diffusers import {', '.join(sorted({*imports, *call.imports, 'DiffusionPipeline'}))}",
            *(["from safetensors.torch import load_file"] if model.negative is not None else []),
            "",
            *load,
            f"pipe = DiffusionPipeline.from_pretrained({source}{component}{_left_out(model)})",
            *call.setup,
            *between,
            *_shared_steps(args),
            _draw(model, args, call, prompt),
            "",
        ]
    )


def evaluation_call(model: DiffusionModel, args: Any) -> PipelineCall:
    """Return how the model's pipeline is called to draw as evaluations of this configuration do."""
    if not isinstance(model, DiffusionModel):
        return PipelineCall({})
    sampling: Any = getattr(args, "plan", None) or getattr(args, "recipe", None)
    steps = args.eval_num_steps or sampling.num_steps
    return pipeline_call(model, Sampled(steps, args.schedule, args.guidance_scale))


def _shared_steps(args: Any) -> list[str]:
    share = getattr(args, "base_share", 0.0)
    return [f"# In evaluations the base made the first {share:.0%} of the steps."] if share else []


def _draw(model: DiffusionModel, args: TrainerConfig, call: PipelineCall, prompt: str) -> str:
    if model.negative is None:
        source = ["source"] if getattr(model, "edits", False) else []
        text = f"prompt={literal(prompt)}"
        lines = [*source, text, *(f"{name}={value}" for name, value in call.arguments.items())]
        return "image = pipe(\n" + "".join(f"    {line},\n" for line in lines) + ").images[0]"
    text = model.negative_call
    more = {name: value for name, value in call.arguments.items() if f"{name}=" not in text}
    more.pop("negative_prompt", None)
    arguments = "".join(f", {name}={value}" for name, value in more.items())
    return (
        text.format(prompt="\0", scale=args.guidance_scale, length=getattr(model, "max_sequence_length", None))
        .replace("**negative", f"**negative{arguments}", 1)
        .replace("\0", literal(prompt))
    )
