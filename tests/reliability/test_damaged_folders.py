"""Run folders that crashes, copies and strangers leave: the run goes on as if nothing had been, or says why not."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from diffalign.runtime import checkpoint
from diffalign.runtime.errors import SaveFailed
from diffalign.runtime.products import is_exported
from tests.reliability import damages
from tests.reliability.compare import rows, same_checkpoint, tree
from tests.reliability.null import run, settings
from tests.reliability.trainers import TRAINERS, short

LIMIT = 20  # seconds; a pipe that is opened to read waits for ever


@pytest.fixture(autouse=True)
def no_hang():
    def stop(number, frame):
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that broke off after step 6, with a checkpoint every two steps; and one that was not interrupted."""
    root = tmp_path_factory.mktemp("stopped")

    def crash(phase, task):
        if phase == "sample" and task.loop.progress.step == 6:
            raise KeyboardInterrupt

    changes = {"checkpointing_steps": 2, "checkpoints_total_limit": 3, "hang_timeout": 0.0}
    with pytest.raises(KeyboardInterrupt):
        run(root / "broken", crash, **changes)
    run(root / "straight", **changes)
    return root / "broken", root / "straight", changes


def copy(stopped, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(stopped[0], folder)
    return folder


@pytest.mark.parametrize("damage", damages.SURVIVED)
@pytest.mark.filterwarnings("ignore:.*are no rows")
def test_a_damaged_folder_costs_no_more_than_the_damaged_checkpoint(damage, stopped, tmp_path, record_property):
    folder, (_, straight, changes) = copy(stopped, tmp_path), stopped
    damages.SURVIVED[damage](folder)
    assert isinstance(checkpoint.verify(folder / damages.NEWEST), list)
    record_property("folders", 1)
    run(folder, **changes)
    same_checkpoint(folder / "checkpoint-8", straight / "checkpoint-8")
    assert rows(folder) == rows(straight)
    assert is_exported(folder, 8)
    record_property("folders_right", 1)
    small = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size < 99]
    text = [path.read_text(errors="replace") for path in small]
    if damage in ("checkpoint a file", "checkpoints of another program"):
        assert "theirs" in text, "what others wrote is still there"


@pytest.mark.parametrize("damage", damages.REFUSED)
def test_a_folder_that_no_run_can_use_is_refused_and_left_as_it_is(damage, stopped, tmp_path, record_property):
    folder, changes = copy(stopped, tmp_path), stopped[2]
    damages.REFUSED[damage](folder)
    before = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    record_property("folders", 1)
    with pytest.raises(ValueError, match=r"(checkpoint|output_dir|run)") as caught:
        run(folder, **changes)
    assert len(str(caught.value)) < 2000
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) == before
    assert checkpoint.verify(folder / "checkpoint-4") == []
    record_property("folders_right", 1)


@pytest.mark.parametrize("damage", [*damages.SURVIVED, *damages.REFUSED])
def test_verify_returns_whatever_it_is_given(damage, stopped, tmp_path):
    folder = copy(stopped, tmp_path)
    {**damages.SURVIVED, **damages.REFUSED}[damage](folder)
    for path in (folder, *folder.rglob("*")):
        assert all(isinstance(line, str) and len(line) < 1000 for line in checkpoint.verify(path))


# Whose is it ----------------------------------------------------------------------------------------------------------


THEIRS = {".tmp-mine": "a", ".tmp-6-99": "b", "README.md": "c", "config.yaml": "d: 1", "notes.txt": "e", ".lock": "f"}
THEIRS |= {"exports.json": "g", "curves.png": "h", "pytorch_lora_weights.safetensors": "i", "metrics.jsonl": "j"}


def test_nothing_of_others_is_deleted_or_overwritten(tmp_path, capsys):
    folder = tmp_path / "run"
    (folder / ".tmp-folder").mkdir(parents=True)
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text("k")
    for name, text in THEIRS.items():
        (folder / name).write_text(text)
    run(folder)
    run(folder, max_train_steps=10, lr_scheduler="cosine", resume_from_checkpoint=None)
    found = {path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file()}
    assert set(THEIRS.values()) | {"k"} <= found
    assert (folder / ".tmp-folder").is_dir()
    for name in (".tmp-mine", ".tmp-6-99", "notes.txt", ".lock"):
        assert (folder / name).read_text() == THEIRS[name], "what is in nobody's way stays where it is"
    assert "README.md" in capsys.readouterr().out


def test_a_configuration_that_somebody_wrote_by_hand_is_kept(tmp_path):
    run(tmp_path)
    text = "# my notes\n" + (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text)
    run(tmp_path, max_train_steps=10, resume_from_checkpoint=None)
    assert (tmp_path / "config.yaml.old").read_text() == text
    run(tmp_path, max_train_steps=10, resume_from_checkpoint=None)
    assert not (tmp_path / "config.yaml.old-2").exists(), "our own is replaced"


def test_each_fresh_start_keeps_the_checkpoints_of_all_runs_before(tmp_path):
    for seed in range(4):
        run(tmp_path, seed=seed, resume_from_checkpoint=None)
    places = [tmp_path / name for name in ("earlier", "earlier-2", "earlier-3", "")]
    seeds = [checkpoint.load(place / "checkpoint-8")[1]["origin"]["config"]["seed"] for place in places]
    assert seeds == [0, 1, 2, 3]


def test_a_linked_checkpoint_is_used_and_its_target_survives_every_start(tmp_path):
    run(tmp_path / "run", max_train_steps=4, lr_scheduler="constant")
    shutil.move(tmp_path / "run/checkpoint-4", tmp_path / "elsewhere")
    (tmp_path / "run/checkpoint-4").symlink_to("../elsewhere")
    run(tmp_path / "run", checkpointing_steps=1, lr_scheduler="constant")
    assert checkpoint.latest(tmp_path / "run").name == "checkpoint-8"
    assert not checkpoint.verify(tmp_path / "elsewhere")
    (tmp_path / "run/checkpoint-9").symlink_to("../elsewhere")
    for _ in range(2):
        run(tmp_path / "run", resume_from_checkpoint=None, lr_scheduler="constant")
    assert not checkpoint.verify(tmp_path / "elsewhere")
    assert not checkpoint.verify(tmp_path / "run/earlier/checkpoint-9"), "a relative link leads there still"


# Exports --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("harm", ["delete", "truncate", "empty", "manifest"])
def test_a_finished_run_whose_exports_are_harmed_exports_again(tmp_path, harm, capsys):
    run(tmp_path)
    done = tmp_path / "done.txt"
    acts = {"delete": done.unlink, "truncate": lambda: done.write_text("8"[:0]), "empty": lambda: done.write_text("")}
    acts["manifest"] = (tmp_path / "exports.json").unlink
    acts[harm]()
    run(tmp_path)
    assert done.read_text() == "8"
    assert is_exported(tmp_path, 8)
    assert "nothing to do" not in capsys.readouterr().out
    run(tmp_path)
    assert "nothing to do" in capsys.readouterr().out


def test_an_export_that_fails_is_an_error_and_is_made_by_the_next_start(tmp_path):
    def full(phase, task):
        if phase == "finish":
            raise OSError(28, "No space left on device", str(tmp_path / "x"))

    with pytest.raises(SaveFailed, match=r"exports .*No space left.*start the same run again"):
        run(tmp_path, full)
    assert not (tmp_path / "exports.json").exists()
    run(tmp_path)
    assert is_exported(tmp_path, 8)


def half(path, *rest):
    path.write_bytes(b"x" * 100)
    raise OSError(28, "No space left on device", str(path))


@pytest.mark.parametrize(
    ("writer", "product"),
    [
        ("diffalign.models.lora.save_file", "pytorch_lora_weights.safetensors"),
        ("diffalign.report.run_report.write_model_card", "README.md"),
    ],
)
def test_a_disk_that_fills_at_the_last_export_leaves_nothing_torn(writer, product, tmp_path, monkeypatch):
    args = short("flow_grpo", tmp_path / "run", max_train_steps=2, checkpointing_steps=0, ema_decay=0.0)
    args.resume_from_checkpoint = "latest"
    trainer = TRAINERS["flow_grpo"].make(args)
    finish = trainer.outputs.finish

    def on_a_full_disk():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(writer, lambda *given, **named: half(tmp_path / "run" / ".diffalign-1-x"))
            return finish()

    trainer.outputs.finish = on_a_full_disk
    with pytest.raises(SaveFailed, match="No space left"):
        trainer.train()
    assert not (tmp_path / "run" / product).exists(), "whole, or not at all"
    TRAINERS["flow_grpo"].make(args).train()
    assert (tmp_path / "run" / product).stat().st_size > 100
    assert is_exported(tmp_path / "run", 2)
    before = tree(tmp_path / "run")
    TRAINERS["flow_grpo"].make(args).train()
    assert tree(tmp_path / "run") == before, "there is nothing to do"


def test_the_run_stays_in_its_folder_where_a_reward_changes_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()

    def wander(phase, task):
        if phase in ("score", "evaluate", "finish"):
            os.chdir(tmp_path / "other")

    run("run", wander)
    assert not list((tmp_path / "other").iterdir())
    assert checkpoint.latest(tmp_path / "run").name == "checkpoint-8"
    assert is_exported(tmp_path / "run", 8)
    assert "warning: a reward changed the working folder" in capsys.readouterr().err
    assert settings("run").output_dir.name == "run"


@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_makes_its_folder_absolute(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = TRAINERS[name].make(short(name, Path("run")))
    assert trainer.args.output_dir == trainer.loop.config.output_dir == tmp_path / "run"


def test_config_yaml_keeps_a_folder_that_can_be_moved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("runs/one")
    assert "output_dir: runs/one\n" in (tmp_path / "runs/one/config.yaml").read_text()
    assert json.loads((tmp_path / "runs/one/exports.json").read_text())["step"] == 8
