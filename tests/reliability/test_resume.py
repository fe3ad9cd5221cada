"""R8 to R14: what was interrupted ends as if it had not been."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from diffalign.cli import main
from diffalign.config import free_fields, save_yaml
from diffalign.config.unread import plain
from diffalign.diffusion.plan import make_plan
from diffalign.runtime import checkpoint
from diffalign.runtime.lock import FolderBusy, claimed, refuse_busy
from diffalign.runtime.provenance import check_origin, origin
from diffalign.runtime.run import Heartbeat
from tests.conftest import ROOT
from tests.reliability import faults
from tests.reliability.compare import same_run, tree
from tests.reliability.forks import Child
from tests.reliability.null import NullTrainer, run, settings
from tests.reliability.stops import (
    ACCUMULATION,
    BEFORE_REWARD,
    BEFORE_UPDATES,
    BETWEEN_UPDATES,
    ROLLOUT,
    Killed,
    kill_at,
    stop_at,
    watched,
)
from tests.reliability.trainers import QUICK, TRAINERS, default, held_out, short


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run without interruption for each trainer, made once: its configuration, and where it could be stopped."""
    made = {}

    def of(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            evaluated = {"eval_prompts": held_out(folder), "eval_rewards": ("brightness",), "eval_steps": 2}
            args = short(name, folder / "straight", eval_images_per_prompt=1, **evaluated)
            trainer = TRAINERS[name].make(args)
            places = watched(trainer, lambda number: None)
            trainer.train()
            made[name] = args, places
        return made[name]

    return of


def chosen(places, every):
    """All places, or the first and the last, and each kind of place once, where a checkpoint is behind it."""
    half = max(place.step for place in places) / 2
    late = {place.phase: place.number for place in reversed(places) if place.step >= half}
    steps = [place.number for place in places if place.phase in (BEFORE_UPDATES, BETWEEN_UPDATES, ACCUMULATION)]
    ends = {0, steps[0], steps[-1], places[-1].number}
    return [place.number for place in places] if every else sorted({*late.values(), *ends})


def goes_on(name, args, folder, number, interrupt):
    broken = dataclasses.replace(args, output_dir=folder)
    interrupt(TRAINERS[name].make(broken), number)
    torch.rand(3)  # what else a process draws must not matter
    TRAINERS[name].make(broken, resume_from_checkpoint="latest").train()
    same_run(args.output_dir, folder)


DATA = {"between iterations", BEFORE_UPDATES, ACCUMULATION, "evaluation"}
KINDS = {
    "diffusion_dpo": DATA,
    "refl": DATA | {ROLLOUT},
    "flow_grpo": DATA | {ROLLOUT, BEFORE_REWARD, BETWEEN_UPDATES},
    "forward_rl": DATA | {ROLLOUT, BEFORE_REWARD, BETWEEN_UPDATES},
    "online_dpo": (DATA | {ROLLOUT, BEFORE_REWARD, BETWEEN_UPDATES}) - {ACCUMULATION},  # a pair per update
}


@pytest.mark.parametrize("name", default("flow_grpo"))
def test_r8_a_run_stopped_anywhere_goes_on_bit_for_bit(name, straight, tmp_path, record_property):
    args, places = straight(name)
    assert {place.phase for place in places} == KINDS[name]
    points = chosen(places, every=bool(os.environ.get("EVERY_POINT")))
    for number in points:
        goes_on(name, args, tmp_path / f"stopped-{number}", number, stop_at)
    record_property("points", len(points))
    assert len(points) >= 7


@pytest.mark.parametrize("name", QUICK)
def test_r8_a_run_killed_without_a_word_goes_on_bit_for_bit(name, straight, tmp_path, record_property):
    args, places = straight(name)
    late = [place.number for place in places if place.step >= 3][:1]
    for number in late:
        goes_on(name, args, tmp_path / f"killed-{number}", number, kill_at)
    record_property("points", len(late))


def test_r8_every_micro_step_of_a_null_run_can_be_its_last(tmp_path, record_property):
    run(tmp_path / "straight", max_train_steps=5, checkpointing_steps=3)
    for number in range(200):
        folder, count = tmp_path / str(number), 0

        def act(heartbeat, number=number):
            nonlocal count
            count += 1
            if count == number + 1:
                heartbeat.signals.received = signal.SIGTERM

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Heartbeat, "__call__", heartbeat_that(act))
            with contextlib.suppress(SystemExit):
                run(folder, max_train_steps=5, checkpointing_steps=3)
                break
        run(folder, max_train_steps=5, checkpointing_steps=3)
        same_run(tmp_path / "straight", folder)
    assert number > 25
    record_property("null_points", number)


def heartbeat_that(act):
    original = Heartbeat.__call__

    def call(heartbeat, collective=False):
        act(heartbeat)
        original(heartbeat, collective)

    return call


@pytest.mark.parametrize("name", TRAINERS)
def test_r9_a_finished_run_is_left_alone(name, straight, capsys):
    args, _ = straight(name)
    before = tree(args.output_dir)
    for _ in range(2):
        TRAINERS[name].make(args, resume_from_checkpoint="latest").train()
        assert "nothing to do" in capsys.readouterr().out
    assert tree(args.output_dir) == before


def test_r9_a_run_killed_after_its_last_checkpoint_still_gets_its_products(tmp_path):
    def die(phase, task):
        if phase == "finish":
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path, die)
    run(tmp_path)
    assert (tmp_path / "done.txt").read_text() == "8"


def test_r9_a_fresh_start_puts_the_checkpoints_of_a_former_run_aside(tmp_path):
    run(tmp_path)
    run(tmp_path, resume_from_checkpoint=None, max_train_steps=2, checkpointing_steps=2)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2"]
    assert sorted(path.name for path in (tmp_path / "earlier").iterdir()) == ["checkpoint-4", "checkpoint-8"]


def test_r10_a_checkpoint_that_is_missing_is_an_error_that_lists_what_exists(straight, tmp_path, capsys):
    args, _ = straight("flow_grpo")
    save_yaml(args, tmp_path / "config.yaml")
    before = tree(args.output_dir)
    command = ["train", "flow_grpo", "--config", str(tmp_path / "config.yaml")]
    assert main([*command, "--resume_from_checkpoint", "checkpoint-99"]) == 2
    said = capsys.readouterr().err
    assert "checkpoint-99 does not exist" in said
    assert "checkpoint-4, checkpoint-2" in said
    assert tree(args.output_dir) == before


@pytest.mark.parametrize("name", TRAINERS)
def test_r11_each_setting_may_change_or_is_refused_by_name(name, tmp_path):
    args = short(name, tmp_path, lr_scheduler="constant")
    now = origin(args, "data", 1, "cpu")
    changed = 0
    for key, value in now["config"].items():
        then = json.loads(json.dumps(now))
        then["config"][key] = "another" if value != "another" else "one"
        if key in free_fields(type(args)) | {"max_train_steps"}:
            check_origin(then, now, args)
            continue
        with pytest.raises(ValueError, match=f"another configuration:\n  {key}.*then.*now"):
            check_origin(then, now, args)
        changed += 1
    assert changed > 20
    for key in now["config"]:  # a checkpoint from before there was this field, which has its default
        if now["config"][key] == json.loads(json.dumps(plain(type(args)()))).get(key):
            check_origin({**now, "config": {k: v for k, v in now["config"].items() if k != key}}, now, args)
    check_origin({**now, "config": {k: v for k, v in now["config"].items() if k != "hang_timeout"}}, now, args)
    with pytest.raises(ValueError, match="the training data have changed"):
        check_origin({**now, "data_sha256": "other"}, now, args)
    cosine = dataclasses.replace(args, lr_scheduler="cosine")
    fewer = origin(dataclasses.replace(cosine, max_train_steps=3), "data", 1, "cpu")
    with pytest.raises(ValueError, match="max_train_steps"):
        check_origin(fewer, origin(cosine, "data", 1, "cpu"), cosine)


def test_r11_another_machine_is_a_warning(tmp_path, capsys):
    run(tmp_path, max_train_steps=4, lr_scheduler="constant")
    torch.set_num_threads(torch.get_num_threads() + 1)
    try:
        run(tmp_path, max_train_steps=6, lr_scheduler="constant")
    finally:
        torch.set_num_threads(torch.get_num_threads() - 1)
    assert "warning: last bits may differ from an uninterrupted run: threads:" in capsys.readouterr().err


def test_r11_a_changed_setting_stops_a_run_before_it_writes_anything(tmp_path):
    run(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=r"learning_rate: 0\.01 then, 0\.02 now"):
        run(tmp_path, learning_rate=0.02)
    assert tree(tmp_path) == before


GOLDEN = ROOT / "tests/golden/checkpoint-0.1.0"


def test_r12_a_checkpoint_of_every_released_version_loads(tmp_path):
    assert sum(path.stat().st_size for path in GOLDEN.iterdir()) < 200_000
    assert not checkpoint.verify(GOLDEN)
    shutil.copytree(GOLDEN, tmp_path / "run/checkpoint-4")
    task = run(tmp_path / "run")
    fresh = run(tmp_path / "fresh")
    for one, two in zip(task.loop.state.parameters, fresh.loop.state.parameters, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_r13_two_runs_in_one_folder_are_refused_and_a_dead_owner_does_not_count(tmp_path):
    child = Child(tmp_path, faults.holds, str(tmp_path))
    child.until(lambda: "held" in child.text)
    started = time.perf_counter()
    with pytest.raises(FolderBusy, match=rf"in use by process {child.process.pid} on .*choose another output_dir"):
        run(tmp_path)
    with pytest.raises(FolderBusy):
        refuse_busy(tmp_path)
    assert time.perf_counter() - started < 1
    child.kill(signal.SIGKILL)
    child.wait()
    refuse_busy(tmp_path)
    with claimed(tmp_path):
        pass
    run(tmp_path)
    assert not (tmp_path / ".diffalign.lock").exists()


def worlds(name: str, folder: Path, counts: list[int], stops: list[int]) -> None:
    """Run with each of these numbers of processes in turn, stopping after a step."""
    for count, stop in zip(counts, stops, strict=True):
        program = [sys.executable] if count == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        program += [] if count == 1 else ["--nproc_per_node", str(count)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [*program, str(ROOT / "tests/reliability/world.py"), name, str(folder), str(stop)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert (done.returncode == 0) == (stop == 6), done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_r14_one_process_two_and_one_again_train_what_one_trains(name, tmp_path):
    """One process stops within an iteration of Flow-GRPO, and two do its last update."""
    worlds(name, tmp_path / "one", [1], [6])
    worlds(name, tmp_path / "changing", [1, 2, 1], [3, 4, 6])
    noted = [(folder / "seen.txt").read_text().splitlines() for folder in (tmp_path / "one", tmp_path / "changing")]
    assert set(noted[0]) == set(noted[1]), "the same prompts with the same noise, whatever the processes"
    tensors = [checkpoint.load(tmp_path / run / "checkpoint-6")[0]["weights"] for run in ("one", "changing")]
    for key in tensors[0]:
        torch.testing.assert_close(tensors[0][key], tensors[1][key], rtol=0, atol=1e-6)


def test_r14_an_iteration_that_others_would_split_otherwise_is_refused(tmp_path):
    def stop(phase, task):
        if phase == "backward" and task.loop.progress.step == step:
            task.loop.run.heartbeat.signals.received = signal.SIGTERM

    for step in (2, 3):
        folder = tmp_path / str(step)
        with pytest.raises(SystemExit):
            run(folder, stop)
        path = checkpoint.latest(folder)
        tensors, state = checkpoint.load(path)
        assert state["update"] == step % 2
        checkpoint.save(folder, step, tensors, {**state, "tasks": 2 * state["tasks"]}, keep=None)
    run(tmp_path / "2")
    with pytest.raises(
        ValueError, match=r"checkpoint-3 lies within .*update 1 of 2.*go on with 2, or from a checkpoint"
    ):
        run(tmp_path / "3")


@pytest.mark.parametrize(("updates", "processes"), [(1, 2), (2, 2), (2, 4), (3, 2)])
def test_r14_updates_get_the_same_samples_whatever_the_processes(tmp_path, updates, processes):
    changes = {"updates_per_rollout": updates, "num_groups": 6}
    trainer = TRAINERS["flow_grpo"].make(short("flow_grpo", tmp_path, **changes))
    plan = make_plan(trainer.args.plan, 1, trainer.args.seed)
    alone = trainer.algorithm.collector.update_index(1, plan)
    assert alone.bincount().tolist() == [24 // updates] * updates
    assert updates == 1 or not torch.equal(alone, trainer.algorithm.collector.update_index(2, plan))
    parts = []
    for rank in range(processes):
        accelerator = SimpleNamespace(num_processes=processes, process_index=rank)
        trainer.algorithm.collector.run = dataclasses.replace(trainer.run, accelerator=accelerator)
        parts.append(trainer.algorithm.collector.update_index(1, plan))
        assert parts[-1].bincount().tolist() == [24 // updates // processes] * updates
    assert torch.equal(torch.cat(parts), alone)


def test_what_the_loop_saves_is_what_it_puts_back(tmp_path):
    """A guard against forgetting: every counter that a save lists is one that a fresh loop takes over."""
    task = run(tmp_path, max_train_steps=4)
    other = NullTrainer(settings(tmp_path, max_train_steps=4))
    checkpointer = other.loop.checkpointer
    batch, rows = checkpointer.restore(checkpoint.latest(tmp_path))
    checkpointer.take_snapshot()
    tensors, plain = checkpointer._contents(batch, rows)
    assert rows == task.loop.log.rows
    kept, known = checkpoint.load(checkpoint.latest(tmp_path))
    assert known == json.loads(json.dumps(plain))
    assert kept.keys() == tensors.keys()
