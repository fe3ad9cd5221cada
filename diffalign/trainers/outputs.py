"""Outputs of a run: evaluations, exported weights, the model card, and the provenance of checkpoints."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Callable, Mapping
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torchvision.transforms.functional import to_pil_image

from diffalign.config.unread import accepts
from diffalign.evaluation.collapse import COLLAPSE, WATCHED, CollapseMonitor
from diffalign.evaluation.hacking import ALARM, PREFIX, panel_alarm, plot_hacking
from diffalign.evaluation.heldout import Evaluation
from diffalign.evaluation.runs import HELD_OUT
from diffalign.models.single_file import layout
from diffalign.report.run_report import Report, consent_option, keep_prompts
from diffalign.rewards.support.weights import repositories
from diffalign.rollout.config import ScoredSamplesConfig
from diffalign.runtime.ema import EMA
from diffalign.runtime.interfaces import Metrics
from diffalign.runtime.oom import batch_name
from diffalign.runtime.products import portable
from diffalign.runtime.provenance import WITH_PATHS, commit, origin
from diffalign.runtime.run import Run
from diffalign.runtime.tracking import MetricsLog, Pictures
from diffalign.trainers.algorithm import Algorithm, Evaluated
from diffalign.trainers.contents import contents, source_contents
from diffalign.trainers.inputs import Inputs

EMA_SET = "ema"
PLOT = "hacking.png"


class Outputs:
    """Evaluate a run, and write its results.

    Args:
        run: The training.
        inputs: Rewards and held-out prompts of evaluations.
        algorithm: Gives the plan of evaluations, and may add metrics and plots.
        ema: Averaged weights, which are evaluated and exported; None: the policy's.
        even: Whether all processes must sample equally many images, as sharded weights need.
    """

    def __init__(
        self, run: Run[Any], inputs: Inputs[Any], algorithm: Algorithm[Any, Any], ema: EMA | None, even: bool
    ) -> None:
        self.run, self.inputs, self.algorithm = run, inputs, algorithm
        if ema is not None:
            run.model.weights.add(EMA_SET, ema.shadow)
        weight_set = {} if ema is None else {"weight_set": EMA_SET}
        self.report = Report(run.model, run.config, algorithm.name, algorithm.launch_command, **weight_set)
        self.first: Metrics = {}
        trained = inputs.rewards.keys()
        self.evaluation = Evaluation(run, inputs.eval_prompts, inputs.eval_rewards, trained=trained, even=even)

    # Where it comes from --------------------------------------------------------------------------------------------

    @property
    def resume_command(self) -> str:
        """Shell command that resumes this run."""
        several = self.run.world > 1
        program = self.algorithm.launch_command if several else f"diffalign train {self.algorithm.command}"
        config = shlex.quote(str(portable(self.run.config).output_dir / "config.yaml"))
        return f"{program} --config {config}{consent_option(self.run.config)} --resume_from_checkpoint latest"

    @property
    def commits(self) -> dict[str, str]:
        """Commit of each hub repository that model, data and rewards were loaded from."""
        config = self.run.config
        sources = (name for field in ("train_data", "train_images") for name in getattr(config, field, ()))
        named = [(name, config.data.revision, "dataset") for name in sources]
        if config.lora.init:
            named.append(("/".join(config.lora.init.split("/")[:2]), None, "model"))  # a hub id may name a file
        named.append((str(layout(config.model)), config.revision, "model"))
        named += [(*found, "model") for found in repositories()]
        known = {name: commit(name, revision, kind) for name, revision, kind in named}
        return {name: found for name, found in known.items() if found is not None}

    @cached_property
    def contents(self) -> Mapping[str, Mapping[str, str]]:
        """Fingerprints of the local files and data that this run depends on, taken at its start."""
        rewards = {**self.inputs.eval_rewards, **self.inputs.rewards}
        data = self.inputs.data
        prompts = data if self.run.model.edits and isinstance(data, list | tuple) else ()
        return {**contents(self.run.config, rewards), **source_contents(prompts), **self.algorithm.data_contents}

    def origin(self) -> dict[str, Any]:
        """Describe the configuration, data and machine of the run, for its checkpoints."""
        run, algorithm, device = self.run, self.algorithm, self.run.accelerator.device.type
        found = origin(run.config, algorithm.data_digest, run.world, device, self.commits, self.contents)
        return {**found, f"data_{WITH_PATHS}": algorithm.digest_with_paths}

    def about(self) -> dict[str, str]:
        """Return metadata for the header of the LoRA file: how it was trained."""
        config, made, model = self.run.config, self.origin(), self.run.model
        rank, alpha = (model.adapter_rank, model.adapter_alpha) if model.has_adapter else (0, 0)
        values = {
            "version": version("diffalign"),
            "trainer": self.algorithm.name,
            "base_model": config.model,
            "base_revision": config.revision or "",
            "rank": str(rank),
            "alpha": str(rank),  # of the file, whose B has alpha / rank in it
            "trained_alpha": str(alpha),
            **({"init": config.lora.init} if config.lora.init else {}),
            "seed": str(config.seed),
            "config_sha256": made["config_sha256"],
            "data_sha256": made["data_sha256"],
        }
        # A header is UTF-8; a path on disk may not be.
        return {f"diffalign.{name}": value.encode("utf-8", "replace").decode() for name, value in values.items()}

    # What it writes -------------------------------------------------------------------------------------------------

    def evaluate(self, step: int) -> Metrics:
        """Sample the held-out prompts with the ODE at fixed seeds, and score them; EMA weights if there are any."""
        prompts, weight_set = self.inputs.eval_prompts, self.report.weight_set
        if not prompts:
            return {}
        config = self.run.config
        self.evaluation.batch_size = getattr(config, batch_name(config, "evaluate"))  # auto_batch may have halved it
        with self.run.model.using(weight_set):
            figures, shown = self.evaluation.run(self.algorithm.eval_plan())
        if self.run.is_main:
            keep_prompts(config.output_dir / HELD_OUT, prompts)
            self.report.picture(step, shown)
        added = self.algorithm.on_evaluation(Evaluated(step, figures, shown, prompts, weight_set))
        return {**figures, **self._alarm(step, figures), **added}

    def pictures(self) -> Pictures:
        """Return the images of the last evaluation, captioned by prompt and rewards; empty without evaluations."""
        if (shown := self.report.shown) is None:
            return {}
        marks = [
            " ".join(f"{name} {own[row]:.3f}" for name, own in shown.marks.items()) for row in range(len(shown.texts))
        ]
        pairs = zip(shown.images, shown.texts, marks, strict=True)
        return {"eval/images": [(to_pil_image(image), f"{text} ({mark})") for image, text, mark in pairs]}

    def _alarm(self, step: int, figures: Metrics) -> Metrics:
        """Return whether the held-out judges tell of reward hacking; nothing without such judges."""
        if not self.inputs.held_out:
            return {}
        self.first = self.first or self._first_evaluation() or figures
        cause = panel_alarm(self.first, figures, list(self.inputs.rewards), self.inputs.held_out)
        if cause and self.run.is_main:
            warnings.warn(f"step {step}: {cause}: the reward may be hacked", stacklevel=3)
        return {ALARM: float(bool(cause))}

    def _first_evaluation(self) -> Metrics:
        """Read the first evaluation of a run that resumes."""
        rows = MetricsLog.read(self.run.config.output_dir / "metrics.jsonl")
        evaluations = (row for row in rows if any(key.startswith(PREFIX) for key in row))
        return {key.removeprefix(PREFIX): value for key, value in next(evaluations, {}).items()}

    def watch(self, step: int, row: Mapping[str, Any]) -> Metrics:
        """Return an alarm to add to a row of metrics, if the training collapses; say it once, in words."""
        if self.collapse is None:
            return {}
        if message := self.collapse(step, row):
            self.report.alarm = message
            warnings.warn(message, stacklevel=2)
        return {COLLAPSE: 1.0} if self.collapse.active and any(name in row for name in WATCHED) else {}

    @cached_property
    def collapse(self) -> CollapseMonitor | None:
        """The alarm of online training, with the rows that a resumed run has; None for other training."""
        config, file = self.run.config, self.run.config.output_dir / "metrics.jsonl"
        if not isinstance(config, ScoredSamplesConfig) or not accepts(config, "collapse"):
            return None
        rows = MetricsLog.read(file) if file.is_file() else []
        monitor = CollapseMonitor(config.collapse, self.algorithm.collapse_remedy, rows)
        self.report.alarm = monitor.message
        return monitor

    def exporter(self) -> Callable[[Path], object] | None:
        """Return a function that writes the LoRA (of the EMA if there is one); None for full weights."""
        model = self.run.model
        if not (model.has_adapter or model.negative is not None):
            return None
        return model.saver(self.report.weight_set, self.run.is_main)

    def finish(self) -> list[Path]:
        """Export the weights and write the card, the curves and the comparison; return what was written."""
        if (best := self.algorithm.best_weights()) is not None:
            step, self.report.weight_set = best
            self._picture_again(step)
        savers = {folder: self.run.model.saver(name, self.run.is_main) for folder, name in self.report.exports.items()}
        if not self.run.is_main:
            return []
        written, folder = self.report.finish(savers), self.run.config.output_dir
        if not self.inputs.eval_prompts:
            return written
        plots = self.algorithm.plot(folder)
        if self.inputs.held_out and folder / PLOT not in plots:
            rows = MetricsLog.read(folder / "metrics.jsonl")
            plot_hacking(rows, folder / PLOT, list(self.inputs.rewards), self.inputs.held_out)
            plots.append(folder / PLOT)
        return [*written, *plots]

    def _picture_again(self, step: int) -> None:
        """Sample images with the exported weights, so that the model card shows these."""
        with self.run.model.using(self.report.weight_set):
            _, shown = self.evaluation.run(self.algorithm.eval_plan())
        if self.run.is_main:
            self.report.picture(step, shown)
