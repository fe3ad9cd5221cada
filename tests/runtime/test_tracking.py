import json
import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from diffalign.runtime.tracking import SAVE, MetricsLog, Trackers, tracker_names


def rows_of(log, steps):
    for step in steps:
        log.write(step, {"loss": 1 / (step + 3), "eval/accuracy": step})


@pytest.mark.parametrize("torn", [b"", b'{"step": 9, "lo', b'{"step": 9}', b"\xff\xfe"])
def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path, torn):
    rows_of(MetricsLog(tmp_path / "straight.jsonl"), range(8))
    path = tmp_path / "run" / "metrics.jsonl"
    rows_of(MetricsLog(path), range(6))
    path.write_bytes(path.read_bytes() + torn)
    rows_of(MetricsLog(path, rows=4), range(4, 8))
    assert path.read_bytes() == (tmp_path / "straight.jsonl").read_bytes()
    assert [file.name for file in path.parent.iterdir()] == ["metrics.jsonl"]


LAST = b'{"step": 2, "loss": 0.123456}'


@pytest.mark.parametrize("cut", range(1, len(LAST) + 1))
def test_any_cut_of_the_last_line_is_dropped(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write(1, {"a": 1})
    path.write_bytes(path.read_bytes() + LAST[:cut])
    whole = cut == len(LAST)  # Only the line break is missing.
    assert MetricsLog.read(path) == [{"step": 1, "a": 1}] + [{"step": 2, "loss": 0.123456}] * whole
    MetricsLog(path, rows=1 + whole).write(3, {})
    assert [row["step"] for row in MetricsLog.read(path)] == [1, 2, 3] if whole else [1, 3]


def test_what_checkpoints_took_is_kept_and_counted_by_none_of_them(tmp_path):
    """A run that goes on from the checkpoint of step 2, or from that of step 1."""
    for rows, kept in ((2, [(1, "a"), (1, SAVE), (2, "a"), (2, SAVE)]), (1, [(1, "a"), (1, SAVE)])):
        path = tmp_path / f"{rows}.jsonl"
        log = MetricsLog(path)
        for step in (1, 2, 3):
            log.write(step, {"a": 0})
            assert log.rows == step
            log.write(step, {SAVE: 0.1})
        again = MetricsLog(path, rows=rows)
        assert [(row["step"], list(row)[1]) for row in MetricsLog.read(path)] == kept
        assert again.rows == rows


def test_every_line_is_strict_json(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl")
    log.write(0, {"a": math.nan, "b": math.inf, "c": [-math.inf, 0.1 + 0.2], "d": torch.tensor(2.5)})
    log.write(1, {"e": np.float32(0.5), "f": {"g": torch.tensor([1, 2])}, "h": "text\nü", "i": None, "j": True})

    def refuse(name):
        raise AssertionError(name)

    lines = (tmp_path / "m.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=refuse) for line in lines] == [
        {"step": 0, "a": None, "b": "inf", "c": ["-inf", 0.1 + 0.2], "d": 2.5},
        {"step": 1, "e": 0.5, "f": {"g": [1, 2]}, "h": "text\nü", "i": None, "j": True},
    ]


BROKEN = ("{", "5", '{"loss": 1}', '{"step": 1e999}', "[" * 10_000, "\x00\x00", '{"step": "x"}')


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_line_inside_is_left_out_and_named(tmp_path, broken):
    path = tmp_path / "m.jsonl"
    path.write_text(f'{{"step": 1}}\n{broken}\n{{"step": 2}}\n')
    with pytest.warns(UserWarning, match=r"m\.jsonl: 1 lines are no rows of metrics and are left out: line 2"):
        assert MetricsLog.read(path) == [{"step": 1}, {"step": 2}]


def written(path):
    log = MetricsLog(path)
    log.write(0, {"eval/a": 0})
    for step in (1, 2, 3, 4):
        log.write(step, {"loss": step})
        if step % 2 == 0:
            log.write(step, {"eval/a": step})
            log.write(step, {SAVE: 0.1})
    return path.read_text().splitlines(keepends=True)


DAMAGE = {
    "repeated": lambda lines: [*lines[:3], lines[2], *lines[3:]],
    "swapped": lambda lines: [lines[0], lines[2], lines[1], *lines[3:]],
    "garbage between": lambda lines: [*lines[:4], "garbage\n", *lines[4:]],
    "rows of later steps": lambda lines: [*lines, '{"step": 5, "loss": 5}\n', '{"step": 6, "loss": 6}\n'],
    "all of it twice": lambda lines: [*lines, *lines],
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.filterwarnings("ignore:.*are no rows")
def test_a_resumed_log_is_repaired_by_step(tmp_path, damage):
    """The checkpoint of step 4, written after its evaluation, has seen seven rows that count."""
    path = tmp_path / "m.jsonl"
    lines = written(path)
    path.write_text("".join(DAMAGE[damage](lines)))
    MetricsLog(path, 7, 4, True)
    assert path.read_text().splitlines(keepends=True) == lines


@pytest.mark.filterwarnings("ignore:.*are no rows")
def test_a_garbled_row_costs_itself_and_no_row_of_another_step(tmp_path):
    path = tmp_path / "m.jsonl"
    lines = written(path)
    path.write_text("".join([*lines[:2], "#" * 20 + "\n", *lines[3:], '{"step": 5, "loss": 5}\n']))
    MetricsLog(path, 7, 4, True)
    assert path.read_text().splitlines(keepends=True) == [*lines[:2], *lines[3:]]


def test_an_evaluation_after_the_checkpoint_is_dropped(tmp_path):
    path = tmp_path / "m.jsonl"
    lines = written(path)
    MetricsLog(path, 6, 4, False)
    assert path.read_text().splitlines(keepends=True) == [line for line in lines if line != lines[-2]]


def test_a_fresh_start_keeps_the_former_file_aside(tmp_path):
    path = tmp_path / "m.jsonl"
    rows_of(MetricsLog(path), [1])
    rows_of(MetricsLog(path), [2])
    assert [row["step"] for row in MetricsLog.read(path)] == [2]
    assert [row["step"] for row in MetricsLog.read(tmp_path / "m.jsonl.old")] == [1]
    rows_of(MetricsLog(path), [3])
    assert [row["step"] for row in MetricsLog.read(tmp_path / "m.jsonl.old")] == [1]
    assert [row["step"] for row in MetricsLog.read(tmp_path / "m.jsonl.old-2")] == [2]
    assert MetricsLog.read(tmp_path / "missing.jsonl") == []


class Recorder(GeneralTracker):
    requires_logging_directory = False

    def __init__(self, name, fails=()):
        self.name, self.fails, self.calls = name, fails, []
        super().__init__()

    @property
    def tracker(self):
        return self

    def _do(self, what, *values):
        if what in self.fails:
            raise OSError("down")
        self.calls.append((what, *values))

    def store_init_configuration(self, values):
        self._do("start", values)

    def log(self, values, step=None, **kwargs):
        self._do("log", values, step)

    def finish(self):
        self._do("finish")


def test_a_failing_tracker_is_switched_off_once_and_the_others_go_on(recwarn):
    good, dies = Recorder("good"), Recorder("dies", ["log"])
    late, never = Recorder("late", ["finish"]), Recorder("never", ["start"])
    accelerator = Accelerator(cpu=True, log_with=[never, dies, good, late])
    trackers = Trackers(accelerator)
    trackers.start("project", {"a": 1, "plan": {"steps": [1, 2], "none": None}})
    for step in (1, 2):
        trackers.log({"loss": 0.5, "note": "text"}, step)
    trackers.finish()
    started = ("start", {"a": 1, "plan.steps": "[1, 2]", "plan.none": "None"})
    logged = [started, ("log", {"loss": 0.5}, 1), ("log", {"loss": 0.5}, 2)]
    assert good.calls == [*logged, ("finish",)]
    assert late.calls == logged
    assert (dies.calls, never.calls) == ([started], [])
    warned = [str(w.message).split(" failed")[0] for w in recwarn if "switched off" in str(w.message)]
    assert warned == ["tracker never", "tracker dies", "tracker late"]


def test_names(monkeypatch):
    monkeypatch.setattr("diffalign.runtime.tracking.find_spec", lambda name: None if name == "wandb" else object())
    assert tracker_names("none") == []
    assert tracker_names("tensorboard, trackio,tensorboard") == ["tensorboard", "trackio"]
    with pytest.raises(ValueError, match="'wandb' is not installed: pip install wandb"):
        tracker_names("wandb")
    with pytest.raises(ValueError, match="'mlflow' is unknown; use none, all, or any of tensorboard"):
        tracker_names("tensorboard,mlflow")
