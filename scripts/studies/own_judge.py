"""Teach a judge with few labels, and train on it: does it agree with the verifier, and does Flow-GRPO gain?

    python scripts/studies/own_judge.py                 # three judges of 300 labels, seconds each
    python scripts/studies/own_judge.py --iterations 50 # and Flow-GRPO on each judge of the first backbone

The labels are the verifier's, on the pipeline's own pictures (``assets/preferences/shapes.parquet``). Each seed draws
300 pairs to learn from, and the pairs of 400 other prompts to be judged by. Flow-GRPO on a judge never sees the
verifier, which then scores images of the test prompts. Writes ``assets/results/own_judge.json``.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

sys.path.insert(0, str(Path(__file__).parents[2]))  # a clone needs no installation

from diffalign import RewardTrainer, RewardTrainerConfig
from diffalign.cli import use_all_cores
from diffalign.runtime.tracking import MetricsLog
from scripts import ROOT

PAIRS, GRPO = ROOT / "assets/preferences/shapes.parquet", ROOT / "configs/flow_grpo/shapes.yaml"
BACKBONES = {"clip": "assets/shapes-clip", "pickscore": "assets/judges/pickscore"}
TEST = ROOT / "assets/prompts/shapes_test.jsonl"
LABELS, PROMPTS = 300, 400
KEPT = ("eval/accuracy", "eval/shapes", "eval/diversity")


def split(seed: int, folder: Path) -> tuple[str, str]:
    """Write the pairs to learn from and those of other prompts; return both files."""
    rows = [row for row in parquet.read_table(PAIRS).to_pylist() if row["label_0"] != 0.5]
    rng = random.Random(seed)
    texts = sorted({row["caption"] for row in rows})
    apart = set(rng.sample(texts, PROMPTS))
    parts = {
        "labels": rng.sample([row for row in rows if row["caption"] not in apart], LABELS),
        "held_out": [row for row in rows if row["caption"] in apart],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, own in parts.items():
        parquet.write_table(pyarrow.Table.from_pylist(own), folder / f"{name}.parquet")
    return str(folder / "labels.parquet"), str(folder / "held_out.parquet")


def judge(backbone: str, seed: int, root: Path) -> dict[str, Any]:
    """Train a judge; return its figures on held-out pairs, before and after."""
    folder = root / f"{backbone}-{seed}"
    labels, held_out = split(seed, folder)
    config = RewardTrainerConfig.from_yaml(
        ROOT / "configs/reward/shapes.yaml",
        backbone=str(ROOT / BACKBONES[backbone]),
        train_data=(labels,),
        eval_data=(held_out,),
        judges={},
        label_next=0,
        output_dir=folder / "judge",
        seed=seed,
    )
    result = RewardTrainer(args=config).train()
    figures = json.loads((folder / "judge/report.json").read_text(encoding="utf-8"))
    before = result.base
    return {
        "seed": seed,
        "pairs": figures["pairs"],
        "before": before["eval/accuracy"],
        "before/ece": before["eval/ece"],
        **{name: figures["accuracy"][key] for name, key in (("after", "rate"), ("low", "low"), ("high", "high"))},
        "ece": figures["ece"],
    }


def train_on(folder: Path, iterations: int, seed: int) -> dict[str, Any]:
    """Train Flow-GRPO on a judge; return the verifier's figures on test prompts, before and after."""
    out = folder.parent / "grpo"
    command = [sys.executable, "-m", "diffalign", "train", "flow_grpo", "--config", str(GRPO), "--output_dir", str(out)]
    command += ["--rewards", f"{{mine: {{path: {folder}}}}}", "--max_train_steps", str(iterations)]
    command += ["--eval_prompts", str(TEST), "--eval_steps", str(iterations), "--seed", str(seed)]
    command += ["--resume_from_checkpoint", "latest"]
    command += ["--num_groups", "16", "--rollout_batch_size", "128", "--train_batch_size", "128"]  # half of its images
    subprocess.run(command, check=True, cwd=ROOT)
    rows = [row for row in MetricsLog.read(out / "metrics.jsonl") if "eval/accuracy" in row]
    figures = {name: {key: row[key] for key in KEPT} for name, row in (("before", rows[0]), ("after", rows[-1]))}
    return {"seed": seed, "iterations": iterations, **figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=Path("runs/own_judge"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=list(BACKBONES))
    parser.add_argument("--iterations", type=int, default=0, help="of Flow-GRPO on each judge; 0: none")
    args = parser.parse_args()
    use_all_cores()
    root = args.work_dir.absolute()

    path = ROOT / "assets/results/own_judge.json"
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for backbone in args.backbones:
        known[backbone] = [judge(backbone, seed, root) for seed in args.seeds]
    if args.iterations:
        first = args.backbones[0]
        known["flow_grpo"] = [train_on(root / f"{first}-{seed}/judge", args.iterations, seed) for seed in args.seeds]
    path.write_text(json.dumps({"labels": LABELS, **known}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(known, indent=1))


if __name__ == "__main__":
    main()
