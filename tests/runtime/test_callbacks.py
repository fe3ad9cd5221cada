"""Callbacks see every event once, in order, and their requests are carried out."""

import json

import pytest
import torch

from diffalign import TrainerCallback
from diffalign.runtime.callbacks import Callbacks, TrainerControl
from tests.reliability.null import NullTrainer, settings

EVENTS = ("on_train_begin", "on_step_end", "on_evaluate", "on_save", "on_train_end")


class Recorder(TrainerCallback):
    """Notes events; ``ask`` maps (event, step) to a request."""

    def __init__(self, **ask):
        self.seen, self.metrics, self.ask = [], [], ask


def _event(name):
    def record(self, args, state, control, **kwargs):
        self.seen.append((name, state.global_step))
        self.metrics.append(kwargs.get("metrics"))
        assert "model" in kwargs
        assert (state.is_world_process_zero, state.max_steps) == (True, args.max_train_steps)
        for request, place in self.ask.items():
            if place == (name, state.global_step):
                setattr(control, request, True)

    return record


for _name in EVENTS:
    setattr(Recorder, _name, _event(_name))


def train(folder, recorder, **changes):
    trainer = NullTrainer(settings(folder, **changes), callbacks=[recorder])
    trainer.loop.train()
    return trainer


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_events_in_order_with_the_rows_of_the_log(tmp_path):
    recorder = Recorder()
    train(tmp_path, recorder)
    steps = [("on_step_end", step) for step in range(1, 9)]
    first = [("on_train_begin", 0), ("on_evaluate", 0), *steps[:4], ("on_evaluate", 4), ("on_save", 4)]
    assert recorder.seen == [*first, *steps[4:], ("on_evaluate", 8), ("on_save", 8), ("on_train_end", 8)]
    logged = [row for row in rows(tmp_path) if "time/save" not in row]
    given = [metrics for metrics in recorder.metrics if metrics is not None]
    assert [{**metrics, "step": row["step"]} for metrics, row in zip(given, logged, strict=True)] == logged


@pytest.mark.parametrize("event", ["on_step_end", "on_evaluate", "on_save"])
def test_a_request_to_stop_ends_with_evaluation_and_exports(tmp_path, event):
    recorder = Recorder(should_training_stop=(event, 4))
    trainer = train(tmp_path, recorder)
    assert trainer.run.progress.step == 4
    assert recorder.seen[-1] == ("on_train_end", 4)
    assert recorder.seen.count(("on_evaluate", 4)) == 1
    assert (tmp_path / "done.txt").read_text() == "4"
    assert (tmp_path / "checkpoint-4").is_dir()


def test_a_run_that_a_callback_stopped_goes_on_when_resumed(tmp_path):
    train(tmp_path / "stopped", Recorder(should_training_stop=("on_step_end", 4)))
    resumed = train(tmp_path / "stopped", Recorder())
    whole = train(tmp_path / "whole", Recorder())
    assert resumed.run.progress.step == 8
    assert all(map(torch.equal, resumed.loop.state.parameters, whole.loop.state.parameters))


def test_a_run_that_had_ended_ends_again(tmp_path):
    """An upload that failed is made up for by the same command."""
    train(tmp_path, Recorder())
    recorder = Recorder()
    train(tmp_path, recorder, resume_from_checkpoint="latest")
    assert recorder.seen == [("on_train_end", 8)]


def test_requests_to_save_and_evaluate_are_carried_out_once_at_the_end_of_the_iteration(tmp_path):
    recorder = Recorder(should_save=("on_step_end", 2), should_evaluate=("on_step_end", 5))
    train(tmp_path, recorder)
    assert [at for name, at in recorder.seen if name == "on_save"] == [2, 4, 8]
    assert [at for name, at in recorder.seen if name == "on_evaluate"] == [0, 4, 6, 8]


def test_metrics_of_a_callback_are_a_copy(tmp_path):
    class Vandal(TrainerCallback):
        def on_step_end(self, args, state, control, metrics=None, **kwargs):
            metrics.clear()

    train(tmp_path, Vandal())
    assert all("loss" in row for row in rows(tmp_path) if not any("eval/" in key or key == "time/save" for key in row))


def test_an_error_of_a_callback_loses_no_step(tmp_path):
    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise RuntimeError("of the user")

    with pytest.raises(RuntimeError, match="of the user"):
        train(tmp_path, Fails())
    assert (tmp_path / "checkpoint-3").is_dir()


@pytest.mark.parametrize(("given", "message"), [(Recorder, r"pass an instance, Recorder\(\)"), (print, "derive its")])
def test_what_is_no_callback_is_refused(tmp_path, given, message):
    with pytest.raises(TypeError, match=message):
        NullTrainer(settings(tmp_path), callbacks=[given])


def test_with_several_processes_requests_wait_for_all(tmp_path):
    """Of two processes one asks: neither acts before both know."""
    run = NullTrainer(settings(tmp_path)).run
    several = type("Run", (), {"world": 2, "is_main": True, "config": run.config, "progress": run.progress, "model": 0})
    mine, other = (Callbacks(several, [Recorder(**ask)]) for ask in ({"should_save": ("on_step_end", 0)}, {}))
    for one in (mine, other):
        one("on_step_end", metrics={})
        assert one.take() == TrainerControl()
    reduced = [a or b for a, b in zip(mine.asked(), other.asked(), strict=True)]
    for one in (mine, other):
        one.agree(reduced)
        assert one.take() == TrainerControl(should_save=True)
        assert one.take() == TrainerControl()
