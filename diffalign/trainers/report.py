"""What a run leaves for a person: pictures on the way; the LoRA, curves, a comparison and a card at the end."""

from __future__ import annotations

import json
import os
import shlex
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.config import to_dict, to_yaml
from diffalign.data.prompts import load_prompts
from diffalign.evaluation.collapse import ruined
from diffalign.evaluation.curves import plot_curves
from diffalign.evaluation.grids import compare_grid, image_grid
from diffalign.evaluation.model_card import ModelCard, literal, write_model_card
from diffalign.evaluation.results import figures, to_markdown
from diffalign.models import DiffusionModel
from diffalign.models.lora import learned_nothing
from diffalign.models.negative import NEGATIVE_NAME
from diffalign.models.weights import POLICY
from diffalign.rewards.consent import needs_consent
from diffalign.rewards.record import passed_from_python
from diffalign.runtime.tracking import MetricsLog
from diffalign.sharding import plain_class
from diffalign.structures import Prompt
from diffalign.trainers.evaluation import Shown
from diffalign.trainers.settings import TrainerConfig

SNIPPET = """
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({model})
pipe.load_lora_weights({folder})
image = pipe({prompt}).images[0]
"""
FULL_SNIPPET = """
from diffusers import {denoiser}, DiffusionPipeline

denoiser = {denoiser}.from_pretrained({weights})
pipe = DiffusionPipeline.from_pretrained({model}, {component}=denoiser)
image = pipe({prompt}).images[0]
"""
NEGATIVE_SNIPPET = """
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

pipe = DiffusionPipeline.from_pretrained({model})
negative = load_file({negative})
"""


class Report:
    """Writes into ``args.output_dir``; used by the main process only."""

    def __init__(self, model: DiffusionModel, args: TrainerConfig, trainer: str, weight_set: str) -> None:
        self.model, self.args, self.trainer, self.weight_set = model, args, trainer, weight_set
        self.folder = Path(args.output_dir)
        self.shown: Shown | None = None

    def picture(self, step: int, shown: Shown) -> None:
        """A grid of an evaluation's images; that of step 0 is kept for the comparison."""
        samples = self.folder / "samples"
        samples.mkdir(parents=True, exist_ok=True)
        image_grid(shown.images, columns=4, labels=shown.texts, scale=4).save(samples / f"step-{step:06d}.png")
        if step == 0:
            self._keep("base", shown)
        self.shown = shown

    def _keep(self, name: str, shown: Shown) -> None:
        """The evaluation as ``samples/NAME.safetensors``: what it showed, and every image's prompt and scores."""
        tensors = {"images": shown.images.contiguous(), "prompt": shown.prompt}
        tensors |= {f"mark/{reward}": values for reward, values in shown.marks.items()}
        tensors |= {f"score/{reward}": values for reward, values in shown.scores.items()}
        tensors |= {} if shown.diversity is None else {"diversity": torch.tensor(shown.diversity)}
        save_file(tensors, self.folder / "samples" / f"{name}.safetensors")

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
        plot_curves(MetricsLog.read(self.folder / "metrics.jsonl"), self.folder / "curves.png")
        base = self.folder / "samples" / "base.safetensors"
        before = load_file(base) if self.shown is not None and base.is_file() else None
        if before is not None:
            self._compare(before)
            for fault in ruined(before["images"], self.shown.images):
                warnings.warn(f"{self.folder}: {fault}; look at compare.png, and train less far", stacklevel=2)
        pictures = [name for name in ("compare.png", "curves.png") if (self.folder / name).is_file()]
        write_model_card(self.folder, self._card(self._results(before), pictures))

    def finished(self, since: float) -> bool:
        """Whether the card, which is written last, is newer than ``since``, in seconds since the epoch."""
        card = self.folder / "README.md"
        return card.is_file() and card.stat().st_mtime >= since

    def _compare(self, before: dict[str, Tensor]) -> None:
        columns = {"base": before["images"], "tuned": self.shown.images}
        marks = {"base": _named(before, "mark/"), "tuned": self.shown.marks}
        # The first reward, whose mean is the accuracy: a tick under an image says more than a row of numbers.
        first = next(iter(self.shown.marks))
        scores = {name: {first: own[first]} for name, own in marks.items()}
        compare_grid(columns, self.shown.texts, scores, self.folder / "compare.png")

    def _results(self, before: dict[str, Tensor] | None) -> str:
        """The table of base and tuned model over every held-out image; empty where the base was not evaluated."""
        if before is None:
            return ""
        shown, base = self.shown, _named(before, "score/")
        spread = {"base": before.get("diversity"), "tuned": shown.diversity}
        pixels = {name: {} if value is None else {"pixels": float(value)} for name, value in spread.items()}
        return to_markdown(
            {
                "base": figures(shown.prompt, base, shown.tags, None, pixels["base"]),
                "tuned": figures(shown.prompt, shown.scores, shown.tags, base, pixels["tuned"]),
            }
        )

    @property
    def _snippet(self) -> str:
        if self.model.negative is not None:
            return f"{NEGATIVE_SNIPPET}{self.model.negative_call}\n"
        return SNIPPET if self.model.has_adapter else FULL_SNIPPET

    def _card(self, results: str, pictures: list[str]) -> ModelCard:
        prompt = self.shown.texts[-1] if self.shown else "..."
        component = self.model.denoiser_name
        snippet = self._snippet.format(
            model=", revision=".join(literal(name) for name in (self.args.model, self.args.revision) if name),
            folder=literal(self.folder),
            weights=literal(self.folder / component),
            negative=literal(self.folder / NEGATIVE_NAME),
            prompt=literal(prompt),
            denoiser=plain_class(self.model.raw_denoiser).__name__,
            component=component,
            scale=self.args.guidance_scale,
            length=getattr(self.model, "max_sequence_length", None),
        )
        config = shlex.quote(str(self.folder / "config.yaml"))
        return ModelCard(
            title=self.folder.name,
            base_model=str(self.args.model),
            trainer=self.trainer,
            command=_said(self.args) + f"accelerate launch scripts/train_{self.trainer}.py --config {config}"
            f"{consent_option(self.args)}",
            config_yaml=to_yaml(self.args),
            load_snippet=snippet,
            results=results,
            pictures=pictures,
            lora=self.model.has_adapter,
        )


def consent_option(args: TrainerConfig) -> str:
    """What a command must type on top of the configuration: consent, where rewards are code or servers."""
    tables = [getattr(args, name, {}) for name in ("rewards", "held_out", "eval_rewards")]
    return " --allow_reward_code" if any(needs_consent(to_dict({"": table})[""]) for table in tables) else ""


def _said(args: TrainerConfig) -> str:
    """Comment lines of the command: what was passed from Python, and has to be passed again."""
    passed = [f"reward {name}" for name in passed_from_python(getattr(args, "rewards", {}))]
    sources = ("train_prompts", "train_data", "train_rollouts", "train_images")
    passed += [] if any(getattr(args, name, None) for name in sources) else ["train_dataset"]
    return f"# passed from Python, to be passed again: {', '.join(passed)}\n" if passed else ""


def keep_prompts(path: Path, prompts: Sequence[Prompt]) -> None:
    """Keep the held-out prompts of a run in its folder, so that it can be evaluated anywhere.

    Nothing is written where a prompt cannot be read back as it is, e.g. with metadata that JSON does not hold.
    """
    staged = path.with_name(f".tmp-{path.name}")
    try:
        lines = [json.dumps({"prompt": p.text, **p.metadata}, ensure_ascii=False, allow_nan=False) for p in prompts]
        staged.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
        if load_prompts(staged) == list(prompts):
            os.replace(staged, path)
    except (TypeError, ValueError, OSError):
        pass
    finally:
        with suppress(OSError):
            staged.unlink(missing_ok=True)


def _named(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
