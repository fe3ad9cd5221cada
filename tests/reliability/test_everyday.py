"""R39 to R41: memory that runs out, trackers that are down, runs that last."""

import os

import psutil
import pytest
import torch
from accelerate.tracking import GeneralTracker

from diffalign.runtime.errors import OutOfMemory
from diffalign.runtime.oom import advice
from diffalign.runtime.tracking import SAVE, MetricsLog
from tests.reliability.compare import rows
from tests.reliability.null import NullTrainer, run, settings
from tests.reliability.trainers import TRAINERS, short

CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def runs_out(trainer, limit, gradient, error=CUDA):
    """Batches of more than ``limit`` do not fit, with or without a gradient; returns the sizes that were tried."""
    predict, tried = trainer.model.predict, []

    def small(x, *args, **kwargs):
        if torch.is_grad_enabled() == gradient and x.requires_grad is False:
            tried.append(len(x))
            if len(x) > limit:
                raise error
        return predict(x, *args, **kwargs)

    trainer.model.predict = small
    return tried


PHASES = [("flow_grpo", "sample", "rollout_batch_size"), *((name, "update", "train_batch_size") for name in TRAINERS)]


@pytest.mark.parametrize(("name", "phase", "batch"), PHASES)
def test_r39_the_message_names_three_settings_with_numbers(tmp_path, name, phase, batch):
    pairs = {"num_pairs": 4} if "num_pairs" in TRAINERS[name].settings else {"rollout_batch_size": 4, "num_groups": 4}
    args = short(name, tmp_path, train_batch_size=4, **pairs)
    trainer = TRAINERS[name].make(args)
    runs_out(trainer, 1, gradient=phase == "update")
    with pytest.raises(OutOfMemory, match=rf"\({phase}\): try {batch}: 2 \(now 4\); .*auto_batch: true") as caught:
        trainer.train()
    assert str(caught.value).count("(now") == 3


CPU = [RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), MemoryError()]


@pytest.mark.parametrize("error", CPU, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("auto_batch", [False, True])
def test_r39_memory_of_a_cpu_is_memory_too(tmp_path, error, auto_batch):
    args = short("flow_grpo", tmp_path, train_batch_size=4, max_train_steps=1, auto_batch=auto_batch)
    trainer = TRAINERS["flow_grpo"].make(args)
    runs_out(trainer, 1, True, error)
    if auto_batch:
        trainer.train()
        assert trainer.args.train_batch_size == 1
    else:
        with pytest.raises(OutOfMemory, match=r"\(update\): try train_batch_size: 2 \(now 4\)"):
            trainer.train()


def test_r39_what_is_at_its_least_is_not_advised(tmp_path):
    settings = {"train_batch_size": 1, "gradient_checkpointing": True, "resolution": 512}
    advised = advice(short("flow_grpo", tmp_path, **settings), "update")
    assert advised.startswith("offload: [text_encoders, vae] (now []); lora.rank: 1 (now 2)")
    least = short("flow_grpo", tmp_path, **settings, offload=("vae",))
    assert advice(least, "update") == "lora.rank: 1 (now 2); mixed_precision: bf16 (now no); resolution: 384 (now 512)"


@pytest.mark.parametrize("gradient", [True, False])
def test_r39_auto_batch_halves_until_it_fits_and_gradients_are_the_same(tmp_path, gradient):
    found = []
    for limit in (4, 1):
        args = short("flow_grpo", tmp_path / str(limit), train_batch_size=4, rollout_batch_size=4, auto_batch=True,
                     max_train_steps=1, updates_per_rollout=1, max_grad_norm=1e9)  # fmt: skip
        trainer = TRAINERS["flow_grpo"].make(args)
        tried = runs_out(trainer, limit, gradient)
        kept = []

        trainer.loop.state.optimizer.optimizer.register_step_pre_hook(
            lambda *_, trainer=trainer, kept=kept: kept.append(
                torch.cat([p.grad.flatten() for p in trainer.loop.state.parameters]).double()
            )
        )
        trainer.train()
        found.append(kept[0])
        if limit == 1:
            assert {4, 2, 1} <= set(tried)
            assert getattr(trainer.args, "train_batch_size" if gradient else "rollout_batch_size") == 1
    assert found[0].norm() > 0
    assert (found[0] - found[1]).norm() <= 1e-5 * found[0].norm()


def test_r39_a_step_that_was_taken_is_not_repeated(tmp_path, monkeypatch):
    trainer = TRAINERS["flow_grpo"].make(short("flow_grpo", tmp_path, train_batch_size=4, auto_batch=True))

    def full(batch, metrics):
        raise CUDA

    monkeypatch.setattr(trainer.algorithm, "on_step", full)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()
    assert trainer.args.train_batch_size == 4
    assert trainer.run.progress.step == 1
    assert [row["step"] for row in rows(tmp_path) if "loss" in row] == [1]


def test_r39_auto_batch_ends_where_nothing_is_left_to_halve(tmp_path):
    trainer = TRAINERS["flow_grpo"].make(short("flow_grpo", tmp_path, auto_batch=True))
    runs_out(trainer, 0, gradient=True)
    with pytest.raises(OutOfMemory, match="try gradient_checkpointing: true"):
        trainer.train()


class Down(GeneralTracker):
    """A tracker whose server has gone."""

    name, requires_logging_directory = "down", False

    def __init__(self, when):
        super().__init__()
        self.when = when

    tracker = None

    def store_init_configuration(self, values):
        self._maybe("start")

    def log(self, values, step=None, **kwargs):
        self._maybe("log")

    def finish(self):
        self._maybe("finish")

    def _maybe(self, what):
        if what == self.when:
            raise ConnectionError("the tracker is down")


@pytest.mark.parametrize("when", ["start", "log", "finish"])
def test_r40_a_tracker_that_is_down_changes_nothing(tmp_path, when):
    run(tmp_path / "without")
    task = NullTrainer(settings(tmp_path / "with"))
    task.loop.run.accelerator.log_with = [Down(when)]
    with pytest.warns(UserWarning, match="tracker down failed and is switched off"):
        task.loop.train()
    assert rows(tmp_path / "with") == rows(tmp_path / "without")


def test_a_run_says_how_long_its_checkpoints_took(tmp_path):
    run(tmp_path)
    found = MetricsLog.read(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in found if SAVE in row] == [4, 8]
    assert all(0 < row[SAVE] < 60 and len(row) == 2 for row in found if SAVE in row)


@pytest.mark.slow
def test_r41_ten_thousand_steps_leave_memory_files_and_logs_as_they_should_be(tmp_path):
    process, seen = psutil.Process(), {}

    def hook(phase, task):
        if phase == "sample" and task.loop.progress.step in (2000, 9998):
            seen[task.loop.progress.step] = (process.memory_info().rss, process.num_fds())

    run(tmp_path, hook, max_train_steps=10_000, checkpointing_steps=1000, eval_steps=1000)
    (early, opened), (late, still) = seen[2000], seen[9998]
    assert late <= 1.01 * early
    assert still == opened
    assert os.path.getsize(tmp_path / "metrics.jsonl") < 400 * 10_100
    assert len(MetricsLog.read(tmp_path / "metrics.jsonl")) == 10_000 + 11 + 10
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2
