"""Write the generated tables of the README files from the results on disk and the registries.

    python scripts/build/tables.py  # rewrite the tables of all DOCUMENTS in place

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``, where NAME is a key of ``TABLES``.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # a clone needs no installation

from diffalign.commands.score import reward_table
from diffalign.losses import tables as losses
from scripts import ROOT
from scripts.studies import compare_recipes, repeat_seeds
from scripts.studies.own_judge import BACKBONES

RESULTS = ROOT / "assets/results"
DOCUMENTS = (ROOT / "README.md", RESULTS / "README.md", ROOT / "diffalign/rewards/README.md", losses.README)
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
COMMON_REWARDS = ("pickscore", "hpsv2.1", "hpsv3", "image_reward", "aesthetic", "vqascore", "geneval", "ocr")
BENCHMARKS = {"Flow-GRPO": "flow_grpo", "Diffusion-DPO": "dpo", "ReFL (DRTune)": "refl", "NFT, one core": "forward_rl"}
TRIED = {
    "attacks": "attacks through configuration files and run folders that ran code, reached a server or left a trace",
    "requests": "requests answered by the reward server with 64 in flight, alone and beside 300 silent clients",
    "settings": "extreme numbers in settings that are refused by name, or train and can be read back from every file",
    "folders": "damaged, forged or foreign run folders that a run survives, or refuses and leaves unchanged",
}
UNITS = dict.fromkeys(BENCHMARKS, "images_per_second") | {"Diffusion-DPO": "pairs_per_second"}


@cache
def results(name: str) -> Mapping[str, Any]:
    """Read ``assets/results/NAME.json``."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Format rows as a Markdown table whose first column is text and whose others are numbers."""
    columns = list(header)
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows))


def evaluations(name: str) -> list[list[dict[str, float]]]:
    """Read ``assets/results/NAME_seeds.csv`` as a list of evaluations per seed."""
    runs: dict[str, list[dict[str, float]]] = {}
    with (RESULTS / f"{name}_seeds.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            runs.setdefault(row["seed"], []).append({key: float(value) for key, value in row.items()})
    return list(runs.values())


def gain(name: str) -> str:
    """Format the gain in held-out accuracy, in points, as mean and sample deviation over seeds."""
    return repeat_seeds.spread([run[-1]["accuracy"] - run[0]["accuracy"] for run in evaluations(name)], 100)


def seeds(name: str) -> str:
    """Tabulate base and tuned figures of a recipe over its seeds."""
    return repeat_seeds.table(evaluations(name)).partition("\n\n")[0]


def tests(name: str) -> list[dict[str, Any]]:
    """Read ``assets/results/NAME_test.csv``: a row for base and tuned weights of each seed."""
    with (RESULTS / f"{name}_test.csv").open(newline="") as file:
        return [{k: v if k == "weights" else float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def tested(name: str) -> str:
    """Tabulate base and tuned figures of a recipe on the test prompts, over its seeds."""
    rows = tests(name)
    return repeat_seeds.table([rows[i : i + 2] for i in range(0, len(rows), 2)]).partition("\n\n")[0]


def recipes() -> str:
    """Tabulate each variant of the quickstart at its tuned learning rate, most gained first."""
    with (RESULTS / "recipes.csv").open(newline="") as file:
        rows = compare_recipes.tuned(list(csv.DictReader(file)))
    variants: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        variants.setdefault(f"{row['axis']}: {row['variant']}" if row["axis"] else row["variant"], []).append(row)

    def cells(name: str, runs: list[Mapping[str, Any]]) -> list[str]:
        column = {key: [float(run[key]) for run in runs] for key in ("accuracy", "gain", "diversity")}
        spreads = [repeat_seeds.spread(column[key], 100) for key in ("accuracy", "gain")]
        rate = f"{float(runs[0]['learning_rate']):g}"
        return [name, *spreads, f"{mean(column['diversity']):.3f}", rate, str(len(runs))]

    ordered = sorted(variants.items(), key=lambda item: -mean(float(run["gain"]) for run in item[1]))
    header = ("variant", "accuracy, %", "gain, points", "diversity", "learning rate", "seeds")
    return markdown(header, (cells(name, runs) for name, runs in ordered))


def reliability(rows: int | None = None) -> str:
    """Tabulate what the reliability tests counted; the first ``rows`` of it, or all."""
    found = results("trust")
    counts = [
        ("processes killed at random that left no torn or lost checkpoint", "kills_survived", "kills"),
        ("stop points from which a run resumed bit for bit", "resume_points_exact", "resume_points"),
        ("damaged checkpoints accepted", "damaged_checkpoints_accepted", "checkpoints_damaged"),
        ("planted pickles executed", "canary_pickles_executed", "canaries_planted"),
        ("kinds of failure whose tests pass", "green", "rows"),
    ]
    table = [(text, f"{found[part]:,} of {found[whole]:,}") for text, part, whole in counts]
    share = f"{found['checkpoint_share_of_quickstart']:.2%}"
    table.append(("share of the quickstart's time spent on checkpoints", share))
    for name, text in TRIED.items():
        tried, right = found["tried"][name]["tried"], found["tried"][name]["right"]
        table.append((text, f"{tried - right if name == 'attacks' else right:,} of {tried:,}"))
    return markdown(("", "result"), table[:rows])


def speed() -> str:
    """Tabulate throughput and the ratio to the bare computation, per trainer."""
    rows = []
    for trainer, name in BENCHMARKS.items():
        found = results(f"bench_{name}")
        timed = found["steps"]["own"] if "steps" in found else found
        rate = f"{timed[UNITS[trainer]]:.0f} {UNITS[trainer].split('_')[0]} / s"
        low, high = timed["ratio_range"]
        rows.append((trainer, rate, f"{timed['ratio']:.2f}", f"{low:.2f} to {high:.2f}", str(found["repeats"])))
    return markdown(("trainer", "throughput", "time / bare time", "range", "repeats"), rows)


def reward_speed() -> str:
    """Tabulate the throughput of rewards and the ratio to bare calls of their networks."""
    rows = []
    for name, timed in {**results("bench_rewards")["rewards"], **results("bench_judges")["rewards"]}.items():
        low, high = timed["ratio_range"]
        rates = (f"{timed[key]:.2f}" for key in ("images_per_second", "direct_images_per_second"))
        rows.append((f"`{name}`", *rates, f"{timed['ratio']:.2f}", f"{low:.2f} to {high:.2f}"))
    return markdown(("reward", "images / s", "bare images / s", "time / bare time", "range"), rows)


def memory() -> str:
    """Tabulate the memory that a ReFL step adds under each saving."""
    found = results("bench_refl")["memory"]["own"]
    return markdown(("saving", "GiB added by a step"), ((f"`{k}`", f"{v['step_gib']:.2f}") for k, v in found.items()))


def judges() -> str:
    """Tabulate how often each embedded judge prefers the image that shows its caption, by task."""
    found = results("judges")
    names = [name for name in found if isinstance(found[name], dict)]
    tasks = [key for key in found[names[0]] if key.startswith("pairs")]
    rows = ((task.removeprefix("pairs/"), *(f"{found[n][task]:.1%}" for n in names)) for task in tasks)
    return markdown(("pairs ranked as the verifier ranks them", *(f"`{name}`" for name in names)), rows)


def own_judge() -> str:
    """Tabulate how often judges that learned from few labels agree with the verifier, by backbone and seed."""
    found = results("own_judge")
    rows = [
        (f"`{BACKBONES[name]}`, seed {row['seed']}", str(row["pairs"]), f"{row['before']:.1%}", f"{row['after']:.1%}",
         f"{row['low']:.1%} to {row['high']:.1%}", f"{row['before/ece']:.3f}", f"{row['ece']:.3f}")
        for name in BACKBONES if name in found for row in found[name]
    ]  # fmt: skip
    heads = ("backbone", "held-out pairs", "before", "after", "95 % interval", "calibration error before", "after")
    return markdown(heads, rows)


def common_rewards() -> str:
    """Take the header and the rows of ``COMMON_REWARDS`` from the table of all registered rewards."""
    header, rule, *lines = reward_table().splitlines()
    rows = {line.split("`")[1]: line for line in lines}
    return "\n".join([header, rule, *(rows[name] for name in COMMON_REWARDS)])


def study(name: str) -> str:
    """Read the table that a study wrote to ``assets/results/NAME.md``."""
    return (RESULTS / f"{name}.md").read_text(encoding="utf-8").rstrip("\n")


TABLES: Mapping[str, Callable[[], str]] = {
    **{name: partial(seeds, name) for name in ("flow_grpo_shapes", "flow_grpo_shapes_long", "refl_shapes_draft_k")},
    **{
        f"{name}_test": partial(tested, name)
        for name in ("forward_rl_shapes", "forward_rl_shapes_long", "forward_rl_shapes_sd", "forward_rl_shapes_edit")
    },
    "recipes": recipes,
    "losses": partial(study, "losses"),
    "refl": partial(study, "refl"),
    "policy_methods": partial(study, "policy_methods"),
    "reliability": reliability,
    "reliability_short": partial(reliability, 4),
    "speed": speed,
    "reward_speed": reward_speed,
    "memory": memory,
    "judges": judges,
    "own_judge": own_judge,
    "rewards": common_rewards,
    "all_rewards": reward_table,
    **losses.TABLES,
}


def render(text: str) -> str:
    """Replace every marked table in a Markdown text. KeyError: a marker names no table."""
    return MARKED.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    for path in DOCUMENTS:
        path.write_text(render(path.read_text(encoding="utf-8")), encoding="utf-8")
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
