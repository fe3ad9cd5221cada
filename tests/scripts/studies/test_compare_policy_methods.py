"""The comparison of policy methods: every method is valid, rows are enough to go on, and failures are passed over."""

import importlib
from dataclasses import replace

import pytest

from diffalign.cli import main as diffalign
from diffalign.config import parse
from diffalign.trainers.cost import Share
from diffalign.trainers.forward_rl.presets import PRESETS
from diffalign.trainers.registry import config_class, find_algorithm
from tests.conftest import PROMPTS, ROOT

SMALL = {
    "num_groups": 2, "group_size": 2, "rollout_batch_size": 4, "train_batch_size": 4, "plan.num_steps": 2,
    "lora.rank": 2, "lora.targets": "[attn.to_q]", "rewards": "{jpeg_compressibility: 1.0}",
}  # fmt: skip


@pytest.fixture
def module(monkeypatch):
    monkeypatch.chdir(ROOT)
    return importlib.import_module("scripts.studies.compare_policy_methods")


def test_every_method_is_valid_under_every_budget(module, tmp_path):
    seen, digests = set(), set()
    for name, method in module.METHODS.items():
        for budget in module.BUDGETS:
            run = module.Run(module.Study(tmp_path), name, budget, method.rates[0], 0, 2, 1.0, 1.0)
            config = parse(config_class(method.trainer), run.command(tmp_path)[2:])
            config.validate()
            assert config.eval_prompts is None
            assert config.learning_rate == method.rates[0]
            assert method.images_per_iteration(budget) == 256
            work = find_algorithm(method.trainer).cost.iteration(config, Share(), 0, config.updates_per_rollout)
            assert work.generated == 256
            assert ("long" in str(config.train_prompts)) == (budget == "35min")
        seen.add(getattr(config, "preset", method.trainer))
        digests |= {method.digest(budget) for budget in module.BUDGETS}
    assert seen >= {*PRESETS, "flow_grpo", "diffusion_dpo"}
    assert len(digests) == 2 * len(module.METHODS)  # the longest budget has other prompts


def test_equal_evaluations_are_equal_to_within_one_iteration(module, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "cost", lambda *_: 1.0)
    wanted = module.BUDGETS["evaluations"].evaluations
    for name, method in module.METHODS.items():
        run = module.planned(module.Study(tmp_path), name, "evaluations")(method.rates[0], 0)
        assert abs(run.evaluations() - wanted) <= wanted / run.iterations, name


def test_a_digest_is_of_settings_not_of_names(module):
    method = module.METHODS["nft"]
    assert method.digest("6144") == method.digest("38400") != method.digest("35min")
    assert method.digest("6144") != replace(method, changes={**method.changes, "num_times": 3}).digest("6144")
    assert method.digest("6144") == replace(method, changes={**method.changes, "seed": 3}).digest("6144")


@pytest.fixture
def small(module, monkeypatch, tmp_path):
    """A study of two methods with tiny rollouts that trains in this process; ``calls`` lists the trainings."""
    monkeypatch.setattr(module, "BEYOND", 0)
    lines = (PROMPTS / "shapes_train.jsonl").read_text().splitlines()
    (tmp_path / "two.jsonl").write_text("\n".join(lines[::210]) + "\n")
    few = {**SMALL, "train_prompts": tmp_path / "two.jsonl"}
    forward = {"plan.preset": "ode", "num_times": 1, "time_fraction": 1.0}
    for name, more in (("flow_grpo", {"plan.window_size": 1, "plan.window_range": "[0, 1]"}), ("nft", forward)):
        method = module.METHODS[name]
        small = replace(method, changes={**method.changes, **few, **more}, rates=(1e-3,))
        monkeypatch.setitem(module.METHODS, name, small)
    monkeypatch.setattr(module.trials, "_train", train)
    calls.clear()
    # 6,144 images are 1,536 iterations of four
    return module.Study(tmp_path / "runs", tmp_path / "rows.csv", 1, scale=2 / 1536, limit=6)


calls: list[str] = []


def train(trial, root, cores, log, threads=None):
    command = trial.command(root)
    calls.append(trial.folder(root).name)
    trainer = command[1].rpartition("train_")[2].removesuffix(".py")
    if trial.folder(root).name.endswith(BROKEN):
        return 3
    code = diffalign(["train", trainer, *command[2:]])
    (trial.folder(root) / "cost.json").write_text('{"core_seconds": 1.0, "peak_memory_gib": 1.0}')
    return code or 0


BROKEN = "-0.001-1"  # the second seed of one rate


@pytest.mark.slow
def test_a_study_goes_on_from_its_rows_and_passes_over_failures(module, small, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "planned", fixed(module, small))
    monkeypatch.setattr(module, "best_rate", lambda *_: 1e-3)
    module.compare(small, ["flow_grpo", "nft"], ["6144"], [0, 1, 2], only_rates=False)
    rows = module.results.read(small.rows)
    found = [(row["method"], row["learning_rate"], row["seed"], row["split"]) for row in rows]
    expected = [("0.001", "0"), ("0.001", "2")]
    splits = ("validation", "test")
    assert found == [(m, rate, seed, s) for m in ("flow_grpo", "nft") for rate, seed in expected for s in splits]
    assert all(row["iterations"] == "2" and row["images"] == "8" for row in rows)
    assert all(0 <= float(row["low"]) <= float(row["accuracy"]) <= float(row["high"]) <= 1 for row in rows)
    assert len((small.root / "failures.log").read_text().splitlines()) == 2
    assert len(calls) == 6
    assert small.rows.with_suffix(".png").stat().st_size > 5000
    table = small.rows.with_suffix(".md").read_text()
    assert "| flow_grpo | " in table
    assert table.count(" | 0.001 | 2 |") == 2

    # Another machine has the rows, not the folders.
    again = replace(small, root=tmp_path / "elsewhere")
    calls.clear()
    module.compare(again, ["flow_grpo", "nft"], ["6144"], [0, 2], only_rates=False)
    assert calls == []
    module.finish(again, [fixed(module, again)(again, "nft", "38400")(1e-3, 0)])  # the same training by another name
    assert calls == []
    assert module.results.read(small.rows)[-1]["budget"] == "38400"


def fixed(module, study):
    return lambda s, name, budget: lambda rate, seed: module.Run(study, name, budget, rate, seed, 2, 1.0, 1.0)


def test_equal_minutes_are_equal_core_seconds(module, tmp_path, monkeypatch):
    study = module.Study(tmp_path, tmp_path / "rows.csv")
    costs = {"flow_grpo": 2.0, "nft": 3.0}
    monkeypatch.setattr(module, "cost", lambda study, name, budget: costs[name])
    run = module.planned(study, "nft", "6min")(1e-3, 0)
    assert run.iterations == 100
    assert run.minutes == pytest.approx(5.6)
    assert module.planned(study, "nft", "35min")(1e-3, 0).iterations == 620
    assert module.planned(study, "nft", "6144")(1e-3, 0).iterations == 24
    assert module.planned(study, "flow_grpo", "6min")(1e-3, 0).minutes == pytest.approx(5.6)


def test_a_cost_is_measured_once(module, tmp_path, monkeypatch):
    seconds = {module.SHORT: 10.0, module.LONGER: 10.0 + 1.5 * (module.LONGER - module.SHORT)}
    trained = []

    def work(pair, root, jobs, threads):
        for timing in pair:
            trained.append(timing.iterations)
            timing.folder(root).mkdir(parents=True)
            (timing.folder(root) / "cost.json").write_text(f'{{"core_seconds": {seconds[timing.iterations]}}}')

    monkeypatch.setattr(module.trials, "work", work)
    study = module.Study(tmp_path, tmp_path / "rows.csv")
    assert [module.cost(study, "nft", "6144") for _ in range(2)] == [1.5, 1.5]
    assert module.cost(study, "nft", "38400") == 1.5  # the same settings
    assert trained == [module.SHORT, module.LONGER]


def test_rates_are_tried_until_the_best_lies_between_others(module, tmp_path, monkeypatch):
    values = {3.5e-4: 0.3, 7e-4: 0.4, 1.4e-3: 0.5, 2.8e-3: 0.6, 5.6e-3: 0.55}
    done = {}
    monkeypatch.setattr(module, "accuracies", lambda *_: dict(done))
    monkeypatch.setattr(module, "finish", lambda study, runs: done.update({r: values[r] for r in runs}))
    module.tune(module.Study(tmp_path), "nft", "38400", lambda rate, seed: rate)
    assert done == values
    assert module.best_rate(None, "nft", "38400") == 2.8e-3


def test_a_stopped_training_is_resumed_and_one_that_cannot_be_starts_afresh(module, tmp_path):
    run = module.Run(module.Study(tmp_path), "nft", "6144", 7e-4, 0, 2, 1.0, 1.0)
    folder = run.folder(tmp_path)
    (folder / "checkpoint-100").mkdir(parents=True)
    assert run.command(tmp_path)[-1] == "latest"
    (folder / "checkpoint-200").mkdir()
    assert run.command(tmp_path)[-1] == "latest"
    assert run.command(tmp_path) == run.fresh_command(tmp_path)  # no step since
    assert not folder.exists()
    (folder / "checkpoint-100").mkdir(parents=True)
    assert run.command(tmp_path)[-1] == "latest"


def test_a_line_cut_by_a_crash_is_dropped_and_rows_of_another_study_are_refused(module, tmp_path):
    results, path = module.results, tmp_path / "rows.csv"
    row = dict.fromkeys(results.COLUMNS, "1") | {"learning_rate": 7e-4}
    results.append(path, [row, row])
    path.write_bytes(path.read_bytes()[:-4])
    assert len(results.read(path)) == 1
    results.append(path, [row])
    assert [r["learning_rate"] for r in results.read(path)] == ["0.0007", "0.0007"]
    path.write_text("method,seed\nnft,0\n")
    with pytest.raises(ValueError, match="other columns"):
        results.read(path)


def test_an_interval_covers_seeds_and_prompts(module):
    rows = [{"accuracy": a, "low": a - 0.03, "high": a + 0.03} for a in (0.5, 0.52, 0.54)]
    mean, half = module.results.interval(rows, "accuracy", "low", "high")
    assert mean == pytest.approx(0.52)
    assert half == pytest.approx((0.03**2 + (4.30 * 0.02 / 3**0.5) ** 2) ** 0.5)
