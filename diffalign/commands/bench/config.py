"""Configuration of ``diffalign bench``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from diffalign.benchmarks.names import benchmark_names, unknown_benchmark
from diffalign.commands.models_config import ModelsConfig
from diffalign.config import option
from diffalign.config.reward_consent import guard_rewards
from diffalign.config.sections import RewardConfig
from diffalign.evaluation.checkpoints import parse_checkpoint


@dataclass(kw_only=True)
class BenchConfig(ModelsConfig):
    """Configuration of ``diffalign bench``. None stands for the value of the run, then of the benchmark."""

    usage: ClassVar[str] = "diffalign bench NAME MODEL ... [--field VALUE ...]"
    examples: ClassVar[tuple[str, ...]] = (
        "diffalign bench geneval stabilityai/stable-diffusion-3.5-medium runs/a --num_steps 40",
        "diffalign bench drawbench runs/a runs/b --limit 50 --dry_run true",
    )
    essential: ClassVar[tuple[str, ...]] = (
        "benchmark", "models", "model", "prompts", "output_dir", "limit", "guidance", "guidance_scale", "num_steps",
        "batch_size", "judges", "official_layout", "dry_run",
    )  # fmt: skip

    benchmark: str = option("", f"the first argument: {', '.join(benchmark_names())}", section="data")
    prompts: str | None = option(
        None, "prompts of the benchmark: file, folder, hub id or named set; default: its own", section="data"
    )
    guidance: Literal["both", "on", "off"] = option(
        "both", "sample with classifier-free guidance, without, or both side by side", section="sampling"
    )
    judges: dict[str, float | RewardConfig] = option(
        {},
        "other judges or options, by name: '{vqa: {reward: vlm_checklist, options: {url: ..., model: ...}}}'",
        section="rewards",
        guard=guard_rewards,
        infinite=False,
    )
    base: bool = option(True, "also run the base model of runs and LoRAs", section="model")
    official_layout: bool = option(
        False, "also write the images in the layout that the authors' own scripts read", section="output"
    )
    dry_run: bool = option(False, "print numbers of images and evaluations, without weights", section="run")

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with the name of the benchmark, and with each of ``models``."""
        from diffalign.preflight import model_problem

        if self.benchmark not in benchmark_names():
            yield unknown_benchmark(self.benchmark)
        for text in self.models:
            if (pipeline := as_pipeline(text)) is not None:
                yield from model_problem("models", pipeline[1], self)
                continue
            try:
                parse_checkpoint(text)
            except (ValueError, FileNotFoundError) as error:
                yield str(error)


def as_pipeline(text: str) -> tuple[str, str] | None:
    """Return (name, path or hub id) of a whole pipeline; None for a run, checkpoint or LoRA."""
    from diffalign.preflight import HUB_ID

    name, _, path = text.rpartition("=")
    local = Path(path)
    whole = (local / "model_index.json").is_file() and not (local / "config.yaml").is_file()
    on_hub = HUB_ID.fullmatch(path) is not None and not local.exists() and not local.parent.is_dir()
    return (name or local.name, path) if whole or on_hub else None
