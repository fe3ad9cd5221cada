"""What a run leaves for a person: pictures on the way; the LoRA, curves, a comparison and a card at the end."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shlex
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from diffalign.atomic import replacing
from diffalign.config import to_dict, to_yaml
from diffalign.config.reward_consent import needs_consent
from diffalign.data.prompt_source import HUB, parse_source
from diffalign.data.prompts import load_prompts
from diffalign.evaluation.heldout import Shown
from diffalign.evaluation.image_quality import ruined
from diffalign.models import DiffusionModel
from diffalign.models.lora import learned_nothing
from diffalign.models.weights import POLICY
from diffalign.report.curves import Known, plot_curves, score_axis
from diffalign.report.grids import OverallMeans, compare_grid, image_grid
from diffalign.report.load_snippet import load_snippet
from diffalign.report.markdown import inert
from diffalign.report.model_card import EDIT, TASK, ModelCard, eval_results, write_model_card
from diffalign.report.results import ModelResults, figures, set_line, to_markdown
from diffalign.rewards.support.record import passed_from_python
from diffalign.runtime.config import HUB_ID
from diffalign.runtime.products import portable
from diffalign.runtime.tracking import MetricsLog
from diffalign.runtime.trainer_config import TrainerConfig
from diffalign.structures import Prompt

EXAMPLES = 4  # pictures of the widget of a model card


class Report:
    """Writes into ``args.output_dir``; used by the main process only."""

    def __init__(
        self, model: DiffusionModel, args: TrainerConfig, trainer: str, launch_command: str, weight_set: str = POLICY
    ) -> None:
        self.model, self.args, self.trainer, self.weight_set = model, args, trainer, weight_set
        self.launch_command = launch_command
        self.folder = Path(args.output_dir)
        self.shown: Shown | None = None
        self.step = 0  # of the evaluation that is shown
        self.before: dict[str, Tensor] | None = None
        self.paths: list[Path] = []  # of the weights, once they are written
        self.alarm = ""  # message of a collapse

    def picture(self, step: int, shown: Shown) -> None:
        """A grid of an evaluation's images; that of step 0 is kept for the comparison."""
        samples = self.folder / "samples"
        samples.mkdir(parents=True, exist_ok=True)
        with replacing(samples / f"step-{step:06d}.png") as staged:
            image_grid(shown.images, columns=4, labels=shown.texts, scale=4).save(staged)
        if step == 0:
            self._keep("base", shown)
        self.shown, self.step = shown, step

    def _keep(self, name: str, shown: Shown) -> Path:
        """The evaluation as ``samples/NAME.safetensors``: what it showed, and every image's prompt and scores."""
        tensors = {"images": shown.images.contiguous(), "prompt": shown.prompt}
        tensors |= {f"mark/{reward}": values for reward, values in shown.marks.items()}
        tensors |= {f"score/{reward}": values for reward, values in shown.scores.items()}
        tensors |= {} if shown.diversity is None else {"diversity": torch.tensor(shown.diversity)}
        path = self.folder / "samples" / f"{name}.safetensors"
        with replacing(path) as staged:
            save_file(tensors, staged, {"about": shown.about})
        return path

    @property
    def exports(self) -> dict[str, str]:
        """Subfolder -> the weight set that goes there: averaged ones first, the raw ones in ``raw/``."""
        return {".": self.weight_set} | ({} if self.weight_set == POLICY else {"raw": POLICY})

    def finish(self, savers: Mapping[str, Callable[[Path], Path]]) -> list[Path]:
        """Write the weights, curves, comparison and model card; return their paths.

        savers: what writes each of ``exports``.
        """
        weights = [save(self.folder / subfolder) for subfolder, save in savers.items()]
        if self.model.has_adapter:
            learned_nothing(weights[0])
        written = [*weights] if self.shown is None else [*weights, self._keep("tuned", self.shown)]
        log = MetricsLog.read(self.folder / "metrics.jsonl")
        plot_curves(log, self.folder / "curves.png", self._known)
        before, shown = self._before(), self.shown
        if before is not None and shown is not None:
            self._compare(before, shown)
            for fault in ruined(before["images"], shown.images):
                warnings.warn(f"{self.folder}: {fault}; look at compare.png, and train less far", stacklevel=2)
        drawn = ["curves.png"] if before is None else ["compare.png", "curves.png"]
        pictures = [name for name in drawn if (self.folder / name).is_file()]  # the card has no curves_all.png
        source = self.args.eval_prompts or "held-out prompts"
        results = self._results(before) + (f"\n\n**Alarm.** {inert(self.alarm)}" if self.alarm else "")
        about = self._card(results, pictures)
        if self.shown is not None:
            found = eval_results(self.figures(before)["tuned"], source, about.task)
            about = dataclasses.replace(about, evaluation=found)
        card = write_model_card(self.folder, about)
        self.before, self.paths = before, weights
        return [*written, *(self.folder / name for name in pictures), card]

    def _before(self) -> dict[str, Tensor] | None:
        """The base's evaluation, if it was of the same prompts, settings and rewards as the last one."""
        file = self.folder / "samples" / "base.safetensors"
        if self.shown is None or not file.is_file():
            return None
        try:
            with safe_open(file, "pt") as opened:
                about = (opened.metadata() or {}).get("about", self.shown.about)
            before = load_file(file)
        except (OSError, SafetensorError) as error:
            warnings.warn(f"{file} is damaged ({error}): the card has no results of the base model", stacklevel=2)
            return None
        if about != self.shown.about or not self.shown.scores.keys() <= _named(before, "score/").keys():
            warnings.warn(
                f"{file} is of other prompts, settings or rewards than the last evaluation: the card shows no base; "
                f"compare with: {self.compare_command}",
                stacklevel=2,
            )
            return None
        return before

    def _compare(self, before: dict[str, Tensor], shown: Shown) -> None:
        columns = {"base": before["images"], "tuned": shown.images}
        marks = {"base": _named(before, "mark/"), "tuned": shown.marks}
        # The first reward, whose mean is the accuracy: a tick under an image says more than a row of numbers.
        first = next(iter(shown.marks))
        scores = {name: {first: own[first]} for name, own in marks.items()}
        found = {name: own.rewards[first] for name, own in self.figures(before).items()}
        means = {name: math.nan if mean is None else mean.mean for name, mean in found.items()}
        count = len(shown.prompt)
        totals = OverallMeans(count, {first: means}, count / len(shown.prompt.unique()))
        compare_grid(columns, shown.texts, scores, self.folder / "compare.png", totals, shown.sources)

    def figures(self, before: dict[str, Tensor] | None) -> dict[str, ModelResults]:
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
    def _known(self) -> Known:
        """What this run knows of its metrics: the rewards that are summed, and the ranges of held-out scores."""
        weights = {name: getattr(entry, "weight", entry) for name, entry in getattr(self.args, "rewards", {}).items()}
        summed = " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in weights.items())
        meanings = {"reward/mean": f"mean of {summed} over the images of a step"} if summed else {}
        axes = {}
        if self.shown is not None:
            scores, prompts = self.shown.scores, len(self.shown.prompt.unique())
            first, images = next(iter(scores)), len(self.shown.prompt)
            over = f"over {images} held-out images, {images / prompts:g} per prompt"
            meanings |= {"eval/accuracy": f"mean of {first} {over}"}
            meanings |= {f"eval/{name}": f"mean {over}" for name in scores}
            axes = {f"{kind}/{name}": score_axis(own) for name, own in scores.items() for kind in ("eval", "reward")}
            axes |= dict.fromkeys(("eval/accuracy", *self._tasks), axes[f"eval/{first}"])
        return Known(meanings, axes)

    @property
    def _tasks(self) -> list[str]:
        return [] if self.shown is None else [f"eval/accuracy/{tag}" for tag in dict.fromkeys(self.shown.tags)]

    @property
    def compare_command(self) -> str:
        """What compares this run with its base, in pictures."""
        return f"diffalign compare {shlex.quote(str(self.folder))}"

    def _card(self, results: str, pictures: list[str]) -> ModelCard:
        shown_args = portable(self.args)
        folder = shown_args.output_dir
        prompt = self.shown.texts[-1] if self.shown else "..."
        snippet = load_snippet(self.model, shown_args, prompt)
        config = shlex.quote(str(folder / "config.yaml"))
        return ModelCard(
            title=self.folder.name,
            base_model=str(self.args.model),
            trainer=self.trainer,
            command=_said(self.args) + f"{self.launch_command} --config {config}{consent_option(self.args)}",
            config_yaml=to_yaml(shown_args),
            load_snippet=snippet,
            results=results,
            pictures=pictures,
            lora=self.model.has_adapter,
            init=self.args.lora.init or "" if self.model.negative is None else "",
            sample_prompt=prompt if self.shown else "",
            examples=self._examples(),
            datasets=hub_datasets(self.args),
            task=EDIT if getattr(self.model, "edits", False) else TASK,
        )

    def _examples(self) -> list[tuple[str, str]]:
        """Write the first images of the last evaluation, for the widget of the card; return (prompt, name) of each."""
        found = []
        if self.shown is not None:
            (self.folder / "samples").mkdir(parents=True, exist_ok=True)
            for number, (text, image) in enumerate(zip(self.shown.texts[:EXAMPLES], self.shown.images, strict=False)):
                name = f"samples/example-{number}.png"
                with replacing(self.folder / name) as staged:
                    to_pil_image(image).save(staged, "PNG")
                found.append((text, name))
        return found


def hub_datasets(args: TrainerConfig) -> list[str]:
    """List the hub ids among the data and prompts of a configuration."""
    data = [str(name) for field in ("train_data", "train_images") for name in getattr(args, field, None) or ()]
    found = [name for name in data if HUB_ID.fullmatch(name) and not Path(name).exists()]
    if (prompts := getattr(args, "train_prompts", None)) and not Path(prompts).exists():
        with suppress(ValueError):
            source = parse_source(prompts)
            found += [source.name] if source.kind == HUB else []
    return list(dict.fromkeys(found))


def consent_option(args: TrainerConfig) -> str:
    """What a command must type on top of the configuration: consent, where it names code or servers."""
    tables = [getattr(args, name, {}) for name in ("rewards", "held_out", "eval_rewards")]
    code = [args.family or "", str(getattr(args, "loss", ""))]
    needed = any(":" in spec for spec in code) or any(needs_consent(to_dict({"": table})[""]) for table in tables)
    return " --allow_reward_code" if needed else ""


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
