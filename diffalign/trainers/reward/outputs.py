"""Evaluate a judge on held-out pairs, and write the judge, its report and the pairs to label next."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.atomic import write_text
from diffalign.config import to_dict
from diffalign.config.reward_consent import needs_consent
from diffalign.log import get_logger
from diffalign.report.curves import plot_curves
from diffalign.rewards.base import Reward
from diffalign.rewards.support.judge_files import About, save_judge
from diffalign.runtime.ema import EMA
from diffalign.runtime.fingerprint import MODEL_FILES, fingerprint
from diffalign.runtime.interfaces import Metrics
from diffalign.runtime.products import CARD, portable
from diffalign.runtime.provenance import commit, origin
from diffalign.runtime.tracking import MetricsLog, Pictures
from diffalign.trainers.reward.algorithm import JudgeRun, RewardModelling
from diffalign.trainers.reward.figures import Figures, Judged
from diffalign.trainers.reward.judging import score_pairs
from diffalign.trainers.reward.label_next import Candidate, choose, probabilities, read_candidates, write_table
from diffalign.trainers.reward.report import card

logger = get_logger(__name__)
REPORT, LABEL_NEXT = "report.json", "label_next.parquet"


class JudgeOutputs:
    """Evaluations and products of the training of a judge.

    Args:
        run: The training.
        algorithm: Scores pairs.
        judges: Rewards to compare with, by name.
        ema: Averaged weights, which are evaluated and written; None: the last ones.
    """

    def __init__(
        self, run: JudgeRun, algorithm: RewardModelling, judges: Mapping[str, Reward], ema: EMA | None
    ) -> None:
        self.run, self.algorithm, self.judges, self.ema = run, algorithm, judges, ema

    @property
    def resume_command(self) -> str:
        """Shell command that resumes the run."""
        program = self.algorithm.launch_command if self.run.world > 1 else "diffalign train reward"
        config = shlex.quote(str(portable(self.run.config).output_dir / "config.yaml"))
        return f"{program} --config {config}{self._consent} --resume_from_checkpoint latest"

    @property
    def _consent(self) -> str:
        named = to_dict(self.run.config)["judges"]
        return " --allow_reward_code" if needs_consent(named) else ""

    @cached_property
    def contents(self) -> dict[str, dict[str, str]]:
        """Fingerprints of the local files that the run depends on, taken at its start."""
        config = self.run.config
        files = {f"backbone {config.backbone}": fingerprint(config.backbone, MODEL_FILES)}
        for name in ("train_data", "eval_data"):
            files |= {f"{name} {source}": fingerprint(source) for source in getattr(config, name)}
        return {name: found for name, found in files.items() if found is not None}

    def origin(self) -> dict[str, Any]:
        """Describe the configuration, data and machine of the run, for its checkpoints."""
        run, config = self.run, self.run.config
        known = {config.backbone: commit(config.backbone, config.revision)}
        known |= {name: commit(name, config.data.revision, "dataset") for name in config.train_data}
        commits = {name: found for name, found in known.items() if found is not None}
        return origin(config, run.data.digest, run.world, run.device.type, commits, self.contents)

    # Evaluations ----------------------------------------------------------------------------------------------------

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averaged weights, if there are any, in place of the trained ones."""
        if self.ema is None:
            yield
            return
        kept = [parameter.detach().clone() for parameter in self.ema.parameters]
        try:
            with torch.no_grad():
                for parameter, average in zip(self.ema.parameters, self.ema.shadow, strict=True):
                    parameter.copy_(average)
            yield
        finally:
            with torch.no_grad():
                for parameter, own in zip(self.ema.parameters, kept, strict=True):
                    parameter.copy_(own)

    @torch.no_grad()
    def judged(self, positions: Sequence[int]) -> Judged:
        """Score pairs as the mean rater, and as the rater of each; processes share the work."""
        run, size = self.run, self.run.config.eval_batch_size
        blocks = [positions[i : i + size] for i in range(0, len(positions), size)]
        rows: list[tuple[int, float, float]] = []
        for block in blocks[run.rank :: run.world]:
            run.heartbeat()
            found, arguments = run.inputs(block, run.device)
            own = run.model(**arguments)
            mean = own if arguments["rater"] is None else run.model(**{**arguments, "rater": None})
            margins = [(s[:, 0] - s[:, 1]).double().cpu().tolist() for s in (mean, own)]
            rows += zip(found, *margins, strict=True)
        rows = sorted(set(run.gather_objects(rows)))
        examples = [run.data.examples[position] for position, _, _ in rows]
        means, owns = (torch.tensor([row[k] for row in rows], dtype=torch.float64) for k in (1, 2))
        return Judged(examples, means, owns, run.config.tie_model, run.model.tie.detach().double().cpu())

    def evaluate(self, step: int) -> Metrics:
        """Return accuracy, loss and calibration on the held-out pairs."""
        with self.averaged():
            return self.judged(self.run.data.held_out).short()

    def pictures(self) -> Pictures:
        """Return no images."""
        return {}

    def watch(self, step: int, row: Mapping[str, Any]) -> Metrics:
        """Return no alarm."""
        return {}

    def exporter(self) -> Callable[[Path], object] | None:
        """Return None: a checkpoint holds no judge, which is as large as the backbone."""
        return None

    # Products -------------------------------------------------------------------------------------------------------

    def finish(self) -> list[Path]:
        """Write the judge, its figures and card, the curves and the pairs to label next; return the files."""
        run, config = self.run, self.run.config
        with self.averaged():
            judged = self.judged(run.data.held_out)
            others = self._others() if run.is_main else {}
            if not run.is_main:
                return []
            figures = judged.figures(others)
            about = About(
                config.backbone,
                tuple(run.data.raters),
                config.tie_model,
                run.model.tie.item(),
                _short(figures),
                run.model.name,
            )
            written = save_judge(run.model, run.tokenizer, config.output_dir, about)
            chosen = choose(self._candidates(), config.label_next) if config.label_next else []
        table = write_table(config.output_dir / LABEL_NEXT, chosen)
        return [
            *written,
            *self._report(about, figures, table),
        ]  # without the table: exports may be published, data may not

    def _others(self) -> dict[str, Tensor]:
        positions = sorted(self.run.data.held_out)
        return score_pairs(self.judges, self.run.data, positions, self.run.config.eval_batch_size, self.run.device)

    def _candidates(self) -> list[Candidate]:
        """Judge the pairs of ``label_data``; by default those of the training, which are read already."""
        run, config = self.run, self.run.config
        if config.label_data:
            return read_candidates(config.label_data, config.data, run.model, run.tokenizer, config.eval_batch_size)
        found, everything = [], sorted({*run.data.train, *run.data.held_out})
        for i in range(0, len(everything), config.eval_batch_size):
            run.heartbeat()
            positions, arguments = run.inputs(everything[i : i + config.eval_batch_size], run.device)
            rows = probabilities(run.model, arguments)
            found += [Candidate(run.data.pair(p), True, row) for p, row in zip(positions, rows, strict=True)]
        return found

    def _report(self, about: About, figures: Figures, table: Path | None) -> list[Path]:
        config, folder = self.run.config, self.run.config.output_dir
        write_text(folder / REPORT, json.dumps(figures, indent=1) + "\n")
        plot_curves(MetricsLog.read(folder / "metrics.jsonl"), folder / "curves.png")
        name = str(portable(config).output_dir)
        label = "" if table is None else f"diffalign label {shlex.quote(f'{name}/{LABEL_NEXT}')} --order given"
        write_text(folder / CARD, card(folder.name, about, name, figures, self.run.data.raters, label))
        rate = figures["accuracy"]
        logger.info(
            f"judge       {folder}: right about {100 * rate['rate']:.1f} % of {rate['pairs']} held-out pairs "
            f"({100 * rate['low']:.1f} to {100 * rate['high']:.1f}); use it as rewards: {{mine: {{path: {name}}}}}"
        )
        if label:
            logger.info(f"label next  {label}")
        return [folder / file for file in (REPORT, "curves.png", CARD)]


def _short(figures: Figures) -> Figures:
    return {name: figures[name] for name in ("pairs", "prompts", "accuracy", "ece")}
