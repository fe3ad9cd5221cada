"""Python that loads a run's weights with plain diffusers and draws as the run's evaluations did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from diffalign.fsdp import plain_class
from diffalign.models import DiffusionModel
from diffalign.models.negative_prompt import NEGATIVE_NAME
from diffalign.models.pipeline_call import PipelineCall, Sampled, pipeline_call
from diffalign.models.single_file import held_parts, layout, single_file
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
    more, pipeline = _pipeline(model, args, component)
    return "\n".join(
        [
            f"from diffusers import {', '.join(sorted({*imports, *call.imports, *more}))}",
            *(["from safetensors.torch import load_file"] if model.negative is not None else []),
            "",
            *load,
            *pipeline,
            *call.setup,
            *between,
            *_shared_steps(args),
            _draw(model, args, call, prompt),
            "",
        ]
    )


def _pipeline(model: DiffusionModel, args: TrainerConfig, component: str) -> tuple[list[str], list[str]]:
    """Return what to import from diffusers, and the lines that make ``pipe``."""
    file, revision = single_file(args.model), f", revision={literal(args.revision)}" if args.revision else ""
    base = literal(str(layout(args.model)))
    if file is None:
        source = f"{base}{revision}{component}{_left_out(model)}"
        return ["DiffusionPipeline"], [f"pipe = DiffusionPipeline.from_pretrained({source})"]
    kind, part, name = type(model.pipeline), model.denoiser_name, literal(file.name)
    held = held_parts(file, kind.__name__, part)
    if held == {part}:
        network, arguments = plain_class(model.raw_denoiser).__name__, component or f", {part}={part}"
        own = f"{part} = {network}.from_single_file({name}, config={base}, subfolder={literal(part)})"
        source = f"{base}{revision}{arguments}{_left_out(model)}"
        lines = ([] if component else [own]) + [f"pipe = DiffusionPipeline.from_pretrained({source})"]
        return ["DiffusionPipeline", *([] if component else [network])], lines
    parts = {key: value for key, value in model.pipeline.components.items() if isinstance(value, nn.Module)}
    others = ", ".join(f"{key}=None" for key in parts if key not in held)
    source = f"{base}{revision}" + (f", {', '.join(f'{key}=None' for key in sorted(held))}" if others else "")
    rest = [f"rest = DiffusionPipeline.from_pretrained({source})"] if others else []
    given = "".join(f", {key}=rest.{key}" for key in parts if key not in held)
    arguments = f"{name}, config={base}{given}{component}{_left_out(model)}"
    lines = [*rest, f"pipe = {kind.__name__}.from_single_file({arguments})"]
    return [kind.__name__, *(["DiffusionPipeline"] if rest else [])], lines


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
