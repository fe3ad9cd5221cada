"""What a run leaves for a person: pictures on the way; the LoRA, curves, a comparison and a card at the end."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file

from diffalign.config import to_yaml
from diffalign.evaluation.curves import plot_curves
from diffalign.evaluation.grids import compare_grid, image_grid
from diffalign.evaluation.model_card import ModelCard, write_model_card
from diffalign.models import DiffusionModel
from diffalign.models.lora import learned_nothing
from diffalign.models.weights import POLICY
from diffalign.runtime.settings import TrainingConfig
from diffalign.runtime.tracking import MetricsLog
from diffalign.trainers.evaluation import Shown

SNIPPET = """
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{model}")
pipe.load_lora_weights("{folder}")
image = pipe("{prompt}").images[0]
"""
FULL_SNIPPET = """
from diffusers import {denoiser}, DiffusionPipeline

denoiser = {denoiser}.from_pretrained("{folder}/transformer")
pipe = DiffusionPipeline.from_pretrained("{model}", transformer=denoiser)
image = pipe("{prompt}").images[0]
"""


class Report:
    """Writes into ``args.output_dir``; used by the main process only."""

    def __init__(self, model: DiffusionModel, args: TrainingConfig, trainer: str, weight_set: str) -> None:
        self.model, self.args, self.trainer, self.weight_set = model, args, trainer, weight_set
        self.folder = Path(args.output_dir)
        self.shown: Shown | None = None

    def picture(self, step: int, shown: Shown) -> None:
        """A grid of an evaluation's images; that of step 0 is kept for the comparison."""
        samples = self.folder / "samples"
        samples.mkdir(parents=True, exist_ok=True)
        image_grid(shown.images, columns=4, labels=shown.prompts, scale=4).save(samples / f"step-{step:06d}.png")
        if step == 0:
            save_file({"images": shown.images.contiguous(), "scores": shown.scores}, samples / "base.safetensors")
        self.shown = shown

    def finish(self) -> None:
        """The weights (averaged ones first, the raw ones in ``raw/``), curves, comparison and model card."""
        self.export()
        rows = MetricsLog.read(self.folder / "metrics.jsonl")
        pictures = [name for name, made in (("compare.png", self._compare()), ("curves.png", True)) if made]
        plot_curves(rows, self.folder / "curves.png")
        write_model_card(self.folder, self._card(rows, pictures))

    def export(self) -> None:
        """Writes the weights so that plain diffusers loads them."""
        with self.model.using(self.weight_set):
            path = self.model.save(self.folder)
        if self.model.has_adapter:
            learned_nothing(path)
        if self.weight_set != POLICY:
            self.model.save(self.folder / "raw")

    def _compare(self) -> bool:
        base = self.folder / "samples" / "base.safetensors"
        if self.shown is None or not base.is_file():
            return False
        before = load_file(base)
        columns = {"base": before["images"], "tuned": self.shown.images}
        scores = {"base": before["scores"], "tuned": self.shown.scores}
        compare_grid(columns, self.shown.prompts, scores, self.folder / "compare.png")
        return True

    def _card(self, rows: list[dict], pictures: list[str]) -> ModelCard:
        evaluations = [row for row in rows if any(name.startswith("eval/") for name in row)]
        named = {"base": evaluations[0], "tuned": evaluations[-1]} if evaluations else {}
        metrics = {
            label: {k.removeprefix("eval/"): v for k, v in row.items() if k.startswith("eval/")}
            for label, row in named.items()
        }
        prompt = self.shown.prompts[-1] if self.shown else "..."
        snippet = (SNIPPET if self.model.has_adapter else FULL_SNIPPET).format(
            model=self.args.model,
            folder=self.folder,
            prompt=prompt,
            denoiser=type(self.model.raw_denoiser).__name__,
        )
        return ModelCard(
            title=self.folder.name,
            base_model=str(self.args.model),
            trainer=self.trainer,
            command=f"accelerate launch scripts/train_{self.trainer}.py --config {self.folder}/config.yaml",
            config_yaml=to_yaml(self.args),
            load_snippet=snippet,
            metrics=metrics,
            pictures=pictures,
        )
