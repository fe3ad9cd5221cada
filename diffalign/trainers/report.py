"""What a run leaves for a person: pictures on the way; the LoRA, curves, a comparison and a card at the end."""

from __future__ import annotations

import math
import shlex
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.config import to_yaml
from diffalign.evaluation.collapse import ruined
from diffalign.evaluation.curves import plot_curves
from diffalign.evaluation.grids import Totals, compare_grid, image_grid
from diffalign.evaluation.model_card import ModelCard, write_model_card
from diffalign.evaluation.results import Figures, figures, set_line, to_markdown
from diffalign.models import DiffusionModel
from diffalign.models.lora import learned_nothing
from diffalign.models.weights import POLICY
from diffalign.runtime.tracking import MetricsLog
from diffalign.trainers.evaluation import Shown
from diffalign.trainers.load_snippet import load_snippet
from diffalign.trainers.settings import TrainerConfig


class Report:
    """Writes into ``args.output_dir``; used by the main process only."""

    def __init__(self, model: DiffusionModel, args: TrainerConfig, trainer: str, weight_set: str) -> None:
        self.model, self.args, self.trainer, self.weight_set = model, args, trainer, weight_set
        self.folder = Path(args.output_dir)
        self.shown: Shown | None = None
        self.step = 0  # of the evaluation that is shown
        self.before: dict[str, Tensor] | None = None
        self.paths: list[Path] = []  # of the weights, once they are written

    def picture(self, step: int, shown: Shown) -> None:
        """A grid of an evaluation's images; that of step 0 is kept for the comparison."""
        samples = self.folder / "samples"
        samples.mkdir(parents=True, exist_ok=True)
        image_grid(shown.images, columns=4, labels=shown.texts, scale=4).save(samples / f"step-{step:06d}.png")
        if step == 0:
            self._keep("base", shown)
        self.shown, self.step = shown, step

    def _keep(self, name: str, shown: Shown) -> None:
        """The evaluation as ``samples/NAME.safetensors``: what it showed, and every image's prompt and scores."""
        tensors = {"images": shown.images.contiguous(), "prompt": shown.prompt}
        tensors |= {f"mark/{reward}": values for reward, values in shown.marks.items()}
        tensors |= {f"score/{reward}": values for reward, values in shown.scores.items()}
        tensors |= {} if shown.diversity is None else {"diversity": torch.tensor(shown.diversity)}
        save_file(tensors, self.folder / "samples" / f"{name}.safetensors", {"about": shown.about})

    @property
    def exports(self) -> dict[str, str]:
        """Subfolder -> the weight set that goes there: averaged ones first, the raw ones in ``raw/``."""
        return {".": self.weight_set} | ({} if self.weight_set == POLICY else {"raw": POLICY})

    def finish(self, savers: Mapping[str, Callable[[Path], Path]]) -> None:
        """The weights, curves, comparison and model card. savers: what writes each of ``exports``."""
        paths = [save(self.folder / subfolder) for subfolder, save in savers.items()]
        if self.model.has_adapter:
            learned_nothing(paths[0])
        if self.shown is not None:
            self._keep("tuned", self.shown)
        log = MetricsLog.read(self.folder / "metrics.jsonl")
        plot_curves(log, self.folder / "curves.png", meanings=self._meanings)
        before = self._before()
        if before is not None:
            self._compare(before)
            for fault in ruined(before["images"], self.shown.images):
                warnings.warn(f"{self.folder}: {fault}; look at compare.png, and train less far", stacklevel=2)
        pictures = [name for name in ("compare.png", "curves.png") if (self.folder / name).is_file()]
        write_model_card(self.folder, self._card(self._results(before), pictures))
        self.before, self.paths = before, paths

    def finished(self, since: float) -> bool:
        """Whether the card, which is written last, is newer than ``since``, in seconds since the epoch."""
        card = self.folder / "README.md"
        return card.is_file() and card.stat().st_mtime >= since

    def _before(self) -> dict[str, Tensor] | None:
        """The base's evaluation, if it was of the same prompts, settings and rewards as the last one."""
        file = self.folder / "samples" / "base.safetensors"
        if self.shown is None or not file.is_file():
            return None
        with safe_open(file, "pt") as opened:
            about = (opened.metadata() or {}).get("about", self.shown.about)
        before = load_file(file)
        if about != self.shown.about or not self.shown.scores.keys() <= _named(before, "score/").keys():
            warnings.warn(
                f"{file} is of other prompts, settings or rewards than the last evaluation: the card shows no base; "
                f"compare with: {self.compare_command}",
                stacklevel=2,
            )
            return None
        return before

    def _compare(self, before: dict[str, Tensor]) -> None:
        columns = {"base": before["images"], "tuned": self.shown.images}
        marks = {"base": _named(before, "mark/"), "tuned": self.shown.marks}
        # The first reward, whose mean is the accuracy: a tick under an image says more than a row of numbers.
        first = next(iter(self.shown.marks))
        scores = {name: {first: own[first]} for name, own in marks.items()}
        found = self.figures(before)
        means = {name: own.rewards[first].mean if own.rewards[first] else math.nan for name, own in found.items()}
        totals = Totals(len(self.shown.prompt), {first: means})
        compare_grid(columns, self.shown.texts, scores, self.folder / "compare.png", totals)

    def figures(self, before: dict[str, Tensor] | None) -> dict[str, Figures]:
        """Figures over every held-out image, of base and tuned model, or of the tuned one alone."""
        shown = self.shown
        assert shown is not None
        spread = {} if shown.diversity is None else {"pixels": shown.diversity}
        if before is None:
            return {"tuned": figures(shown.prompt, shown.scores, shown.tags, None, spread)}
        known = _named(before, "score/")
        # A file keeps names in alphabetical order; the first reward is the one that tasks are about.
        base = {name: known[name] for name in shown.scores}
        own = {"pixels": float(before["diversity"])} if "diversity" in before else {}
        return {
            "base": figures(shown.prompt, base, shown.tags, None, own),
            "tuned": figures(shown.prompt, shown.scores, shown.tags, base, spread),
        }

    def _results(self, before: dict[str, Tensor] | None) -> str:
        """The table of base and tuned model over every held-out image; empty where nothing was evaluated."""
        if self.shown is None:
            return ""
        found = self.figures(before)
        prompts = len(self.shown.prompt.unique())
        lines = [set_line(found["tuned"], prompts, self.args.eval_prompts or "")]
        lines.append(f"Tuned: after {self.step} optimizer steps{self._averaged}.")
        if before is not None:
            count = len(self.shown.texts)
            lines.append(f"Base and tuned are drawn from the same noise; `compare.png` shows {count} of the prompts.")
        return f"{' '.join(lines)}\n\n{to_markdown(found)}"

    @property
    def _averaged(self) -> str:
        decay = self.args.ema_decay
        return f", weights averaged over steps (ema_decay {decay:g}; the last ones are in `raw/`)" if decay else ""

    @property
    def _meanings(self) -> dict[str, str]:
        """What curves of a name that does not say it are of."""
        weights = {name: getattr(entry, "weight", entry) for name, entry in getattr(self.args, "rewards", {}).items()}
        summed = " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in weights.items())
        found = {"reward/mean": summed, "reward/std": summed} if len(weights) > 1 else {}
        if self.shown is not None:
            found["eval/accuracy"] = f"mean of {next(iter(self.shown.scores))}"
        return found

    @property
    def compare_command(self) -> str:
        """What compares this run with its base, in pictures."""
        return f"diffalign compare {shlex.quote(str(self.folder))}"

    def _card(self, results: str, pictures: list[str]) -> ModelCard:
        prompt = self.shown.texts[-1] if self.shown else "..."
        snippet = load_snippet(self.model, self.args, prompt)
        config = shlex.quote(str(self.folder / "config.yaml"))
        return ModelCard(
            title=self.folder.name,
            base_model=str(self.args.model),
            trainer=self.trainer,
            command=f"accelerate launch scripts/train_{self.trainer}.py --config {config}",
            config_yaml=to_yaml(self.args),
            load_snippet=snippet,
            results=results,
            pictures=pictures,
            lora=self.model.has_adapter,
        )


def _named(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
