"""Compare all preference losses on the embedded world: accuracy, win rate against the base, diversity and minutes.

    python scripts/studies/compare_losses.py                    # all of them; hours, goes on where it stopped
    python scripts/studies/compare_losses.py --only dpo ipo     # some of them
    python scripts/studies/compare_losses.py --factors 0.3 1 3  # learning rates tuned for each, at three times the cost
    python scripts/studies/compare_losses.py --draw             # tables and picture of what is finished

A variant is a config of ``configs/diffusion_dpo`` and what it changes: ``VARIANTS`` is the table of hyper-parameters.
All take as many steps, and offline variants see as many images per step as Diffusion-DPO. With several ``--factors``
of the learning rate the best on the first seed runs with the other seeds too. Base and tuned weights draw the held-out
prompts from the same noise; the win rate is that of the verifier's graded score, ties a half, with a 95 % interval from
a bootstrap over prompts. Writes ``assets/results/losses.csv`` (a line per run), ``losses.md`` (the README's table) and
``assets/pictures/losses.png``.
"""

from __future__ import annotations

import argparse
import io
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from PIL import Image, ImageFilter
from safetensors.torch import load_file
from torchvision.transforms.functional import pil_to_tensor

sys.path.insert(0, str(Path(__file__).parents[2]))  # a clone needs no installation

from diffalign.evaluation.win_rate import WinRate, win_rate
from diffalign.runtime.tracking import MetricsLog
from diffalign.shapes.verifier import nearest_colors
from scripts import ROOT
from scripts.studies import trials
from scripts.studies.repeat_seeds import evaluations, spread

PAIRS = ROOT / "assets/preferences/shapes.parquet"
AROUND = 4  # pixels
CSV = ROOT / "assets/results/losses.csv"
TABLE = ROOT / "assets/results/losses.md"
PICTURE = ROOT / "assets/pictures/losses.png"
STEPS = 100
LEARNING_RATE = 1e-3  # twice that of the configs, for half their steps
JUDGE = "score/shapes"  # graded: exact verdicts tie too often to tell two models apart
LAST = 20  # optimizer steps over which the winners' errors are averaged
FIGURES = ("base", "accuracy", "gain", "win_rate", "win_low", "win_high", "diversity", "winner_gain", "minutes")
COLUMNS = ("variant", "factor", "learning_rate", "seed", "steps", *FIGURES)
PLAIN = "dpo"  # what the others are compared with


@dataclass(frozen=True)
class Variant:
    """config: its name in ``configs/diffusion_dpo``. changes: fields that differ from it."""

    config: str = "shapes"
    changes: dict[str, object] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return ROOT / f"configs/diffusion_dpo/{self.config}.yaml"


def pairs(loss: str, **changes: object) -> Variant:
    return Variant("shapes", {"loss": loss, **changes})


def singles(loss: str, **changes: object) -> Variant:
    """Take both images of as many pairs."""
    return pairs(loss, num_pairs=128, train_batch_size=128, **changes)


# What is a function of the margin has a fortieth of the beta published for SD 1.5, as Diffusion-DPO has here (in trial
# runs 500 ends at a third of the gain of 50), or has its target at the margin 0.05 that Diffusion-DPO arrives at. What
# has neither reference nor bound takes smaller steps, and terms that learn the winner less weight than published.
VARIANTS: dict[str, Variant] = {
    "dpo": pairs("dpo", beta=50.0),
    "ipo": pairs("ipo", beta=3.0),
    "hinge": pairs("hinge", beta=20.0),
    "dmpo": pairs("dmpo", beta=150.0),
    "dspo": pairs("dspo", beta=0.001),
    "linear_dpo": pairs("linear_dpo", beta=50.0, reference_decay=0.99),
    "mapo": pairs("mapo", beta=40.0, loss_options="{weight: 0.25}"),
    "cpo": pairs("cpo", beta=10.0, learning_rate=5e-4),
    "orpo": pairs("orpo", beta=1.0),
    "dro": pairs("dro", beta="null", learning_rate=5e-5),
    "kto": singles("kto", beta=25.0),
    "bco": singles("bco", beta=25.0),
    "dro_unpaired": singles("dro_unpaired", beta="null", learning_rate=5e-5),
    "sft": pairs("sft", beta="null", learning_rate=2e-4),  # liked images alone, as many as there are pairs
    "dpo, smoothed labels": pairs("dpo", beta=50.0, loss_options="{smoothing: 0.1}"),
    "dpo, winner preserved": pairs("dpo", beta=30.0, winner_mu=0.9),
    "dpo, winner term": pairs("dpo", beta=50.0, winner_weight=0.1),
    "dpo, margin bound": pairs("dpo", beta=50.0, max_margin=0.1),
    "dpo, anchored": pairs("dpo", beta=50.0, anchor_weight=1.0),
    "dpo, auto beta": pairs("dpo", auto_beta=0.2),
    "dpo, masked": pairs("dpo", beta=50.0, **{"data.mask": "mask"}),
    "dpo, all weights": pairs("dpo", beta=50.0, learning_rate=1e-4, **{"lora.rank": 0, "lora.targets": "null"}),
    "dpo, epsilon": Variant("shapes_sd"),
    "dpo, epsilon, all weights": Variant("shapes_sd", {"learning_rate": 5e-5, "lora.rank": 0, "lora.targets": "null"}),
    "spin": Variant("shapes_spin", {"reference_steps": 34}),  # three iterations
    "online dpo": Variant("shapes_online"),
    "online kto": Variant("shapes_online", {"loss": "kto", "beta": 25.0, "train_batch_size": 128}),
    "raft": Variant("shapes_raft", {"learning_rate": 5e-5}),
}


@dataclass(frozen=True)
class Run:
    """One training of one variant."""

    name: str
    factor: float
    seed: int
    steps: int = STEPS

    @property
    def variant(self) -> Variant:
        return VARIANTS[self.name]

    @property
    def learning_rate(self) -> float:
        return float(self.variant.changes.get("learning_rate", LEARNING_RATE)) * self.factor

    def folder(self, root: Path) -> Path:
        return root / f"{self.name}-{self.factor:g}-{self.seed}".replace(", ", "-").replace(" ", "_")

    def command(self, root: Path) -> list[str]:
        changes = {
            **self.variant.changes,
            "learning_rate": self.learning_rate,
            "seed": self.seed,
            "output_dir": self.folder(root),
            "cache_dir": root / "cache",
            "eval_steps": 0,
            "checkpointing_steps": 0,
            "max_train_steps": self.steps,
        }
        if "data.mask" in changes:
            changes["train_data"] = f"[{masked_pairs(root)}]"
        return trials.train_command("diffusion_dpo", self.variant.path, changes)

    def row(self, root: Path) -> trials.Row:
        base, *_, tuned = evaluations(self.folder(root))
        wins = against_base([self.folder(root)])
        values = (base["accuracy"], tuned["accuracy"], tuned["accuracy"] - base["accuracy"])
        values += (wins.rate.mean, wins.rate.low, wins.rate.high, tuned["diversity"])
        values += (self.winner_gain(root), tuned["training_seconds"] / 60)
        rate = float(f"{self.learning_rate:.3g}")
        return dict(zip(COLUMNS, (self.name, self.factor, rate, self.seed, tuned["step"], *values), strict=True))

    def winner_gain(self, root: Path) -> float:
        """What preferred images' errors fell by, against the reference's, at the end; NaN where there is none."""
        rows = [row for row in MetricsLog.read(self.folder(root) / "metrics.jsonl") if "time/update" in row]
        return statistics.mean(row.get("winner_gain", math.nan) for row in rows[-LAST:])


def masked_pairs(root: Path) -> Path:
    """The embedded pairs with masks: white where one of the images, or both, shows an object, and ``AROUND`` it."""
    file = root / "masked.parquet"
    if not file.is_file():
        pairs = Dataset.from_parquet(str(PAIRS))
        masks = [mask(row["jpg_0"], row["jpg_1"]) for row in pairs.select_columns(["jpg_0", "jpg_1"])]
        pairs.add_column("mask", masks).to_parquet(file.with_suffix(".part"))
        file.with_suffix(".part").replace(file)
    return file


def mask(*pictures: bytes) -> bytes:
    images = torch.stack([pil_to_tensor(Image.open(io.BytesIO(p)).convert("RGB")) for p in pictures])
    drawn = (nearest_colors(images.float() / 255) > 0).any(0)
    wide = Image.fromarray(drawn.astype("uint8") * 255).filter(ImageFilter.MaxFilter(2 * AROUND + 1))
    wide.save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def against_base(folders: Sequence[Path]) -> WinRate:
    """Compute the win rate against the base over several runs of a variant; the bootstrap resamples prompts."""
    before, after = (
        [load_file(folder / f"samples/{name}.safetensors") for folder in folders] for name in ("base", "tuned")
    )
    scores = (torch.cat([found[JUDGE] for found in side]) for side in (after, before))
    return win_rate(*scores, torch.cat([found["prompt"] for found in after]))


def best_factor(root: Path, name: str, seed: int, factors: Sequence[float]) -> float:
    tried = {factor: Run(name, factor, seed) for factor in factors}
    return max(tried, key=lambda factor: tried[factor].row(root)["gain"])


def groups(rows: Sequence[trials.Row]) -> dict[str, list[trials.Row]]:
    """Group runs at the tuned learning rate by variant, for variants with several seeds."""
    found: dict[str, list[trials.Row]] = {}
    for row in trials.tuned(rows, ("variant",)):
        found.setdefault(str(row["variant"]), []).append(row)
    return found


def pooled(root: Path, runs: Sequence[trials.Row]) -> WinRate:
    return against_base([Run(str(r["variant"]), float(r["factor"]), int(r["seed"])).folder(root) for r in runs])


def markdown(found: dict[str, list[trials.Row]], wins: dict[str, WinRate]) -> str:
    """Tabulate each variant: means over seeds with their deviation, and the hyper-parameters.

    "winners": what the error of preferred images fell by, against the reference's. "step size": the learning rate.
    """
    lines = [
        "| | accuracy, % | gain, points | win rate, % [95 %] | diversity | winners | minutes | step size | settings |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for name, runs in found.items():
        column = {figure: [float(run[figure]) for run in runs] for figure in FIGURES}
        rate = wins[name].rate
        variant = VARIANTS[name]
        hidden = ("learning_rate", "train_batch_size")
        settings = [f"{key}: {value}" for key, value in variant.changes.items() if key not in hidden]
        cells = [
            name,
            spread(column["accuracy"], 100),
            spread(column["gain"], 100),
            f"{100 * rate.mean:.1f} [{100 * rate.low:.1f}, {100 * rate.high:.1f}]",
            f"{statistics.mean(column['diversity']):.3f}",
            "" if math.isnan(winners := statistics.mean(column["winner_gain"])) else f"{winners:+.3f}",
            f"{statistics.mean(column['minutes']):.1f}",
            f"{runs[0]['learning_rate']:g}",
            f"`{variant.config}.yaml`" + "".join(f", `{setting}`" for setting in settings),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(found: dict[str, list[trials.Row]], wins: dict[str, WinRate]) -> None:
    """Plot gains with a dot per seed, and win rates with their intervals."""
    figure, (left, right) = trials.canvas(len(found), panels=2)
    gains = {name: [float(run["gain"]) for run in runs] for name, runs in found.items()}
    trials.gain_bars(left, gains, PLAIN, "points of held-out accuracy gained; dots are seeds")
    for place, name in enumerate(found):
        rate = wins[name].rate
        right.plot([100 * rate.low, 100 * rate.high], [place, place], color="#1f5fa8", linewidth=1.6)
        right.plot(100 * rate.mean, place, "o", color="#1f5fa8", markersize=4)
    right.axvline(50, color="#404040", linewidth=0.8)
    right.set_xlabel("images that beat the base's, %, with 95 % interval", fontsize=8)
    trials.save(figure, PICTURE)


def write(root: Path, runs: Sequence[Run]) -> None:
    rows = trials.finished(runs, root)
    trials.write_csv(CSV, COLUMNS, rows)
    if found := groups(rows):
        wins = {name: pooled(root, own) for name, own in found.items()}
        TABLE.write_text(markdown(found, wins))
        draw(found, wins)
        print(TABLE.read_text(), end="")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, help="default: all", default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--factors", type=float, nargs="+", default=[1.0], help="of the learning rate")
    parser.add_argument("--steps", type=int, default=STEPS, help="fewer are a try; give it a folder of its own")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/losses"))
    parser.add_argument("--draw", action="store_true", help="train nothing")
    args = parser.parse_args()
    root, first = args.output_dir, args.seeds[0]
    every = [Run(name, f, seed, args.steps) for name in VARIANTS for f in args.factors for seed in args.seeds]
    if not args.draw:
        trials.work([run for run in every if run.name in args.only and run.seed == first], root, args.jobs)
        best = {name: best_factor(root, name, first, args.factors) for name in args.only}
        chosen = [run for run in every if run.factor == best.get(run.name)]
        trials.work(chosen, root, args.jobs)
    write(root, every)


if __name__ == "__main__":
    main()
