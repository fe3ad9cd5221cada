"""A run goes on with the model, data and judges that it began with, or is refused by the name of what changed."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from diffalign.data.pairs import load_pairs
from diffalign.data.prompts import load_prompts
from diffalign.rollout.collector import Collector
from diffalign.runtime.provenance import WITH_PATHS, check_origin, origin
from diffalign.structures import Prompt
from diffalign.trainers.contents import sample_contents
from tests.conftest import PIPELINE, PROMPTS
from tests.reliability.trainers import TRAINERS, held_out, short


@pytest.fixture
def world(tmp_path):
    """Copies of all that runs depend on, small enough to change."""
    shutil.copytree(PIPELINE, tmp_path / "model")
    shutil.copy(PROMPTS / "shapes_train.jsonl", tmp_path / "prompts.jsonl")
    (tmp_path / "images").mkdir()
    rows = []
    for number in range(6):
        names = [f"images/{number}-{side}.png" for side in "ab"]
        for side, name in enumerate(names):
            Image.new("RGB", (64, 64), (40 * number, 200 * side, 90)).save(tmp_path / name)
        rows.append({"prompt": f"a shape {number}", "image_0": names[0], "image_1": names[1], "label": number % 2})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "judge.py").write_text("def bright(images, prompts, metadata):\n    return images.mean((1, 2, 3))\n")
    return tmp_path


def args_of(name, world):
    changes = {"model": str(world / "model"), "eval_prompts": held_out(world), "eval_rewards": ("brightness",)}
    settings = TRAINERS[name].settings
    if "train_prompts" in settings:
        changes["train_prompts"] = world / "prompts.jsonl"
    if "train_data" in settings:
        changes["train_data"] = (str(world / "pairs.jsonl"),)
    if name == "flow_grpo":
        changes |= {"rewards": {f"{world}/judge.py:bright": 1.0}, "allow_reward_code": True}
    return short(name, world / "run", **changes)


def swap_labels(world):
    rows = [json.loads(line) for line in (world / "pairs.jsonl").read_text().splitlines()]
    rows[3]["label"] = 1 - rows[3]["label"]
    (world / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def replace_picture(world):
    Image.new("RGB", (64, 64), (1, 2, 3)).save(world / "images" / "4-b.png")


def change_weights(world):
    (path,) = (world / "model" / "transformer").glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def append(name, text):
    def change(world):
        with (world / name).open("a") as file:
            file.write(text)

    return change


CHANGES = [
    *((name, "model", change_weights) for name in TRAINERS),
    *((name, "eval_prompts", append("held_out.txt", "one more\n")) for name in TRAINERS),
    ("flow_grpo", "train_prompts", append("prompts.jsonl", '{"prompt": "one more"}\n')),
    ("online_dpo", "train_prompts", append("prompts.jsonl", '{"prompt": "one more"}\n')),
    ("refl", "train_prompts", append("prompts.jsonl", '{"prompt": "one more"}\n')),
    ("diffusion_dpo", "train_data", swap_labels),
    ("diffusion_dpo", "samples of train_data", replace_picture),
    ("flow_grpo", "reward file .*judge.py", append("judge.py", "# another judge\n")),
]


@pytest.mark.parametrize(("name", "named", "change"), CHANGES)
def test_what_changed_since_a_checkpoint_is_named(name, named, change, world):
    args = args_of(name, world)
    then = json.loads(json.dumps(TRAINERS[name].make(args).loop.outputs.origin()))
    again = TRAINERS[name].make(args)
    assert not check_origin(then, again.loop.outputs.origin(), again.args)
    change(world)
    later = TRAINERS[name].make(dataclasses.replace(args))
    now = later.loop.outputs.origin()
    then["data_sha256"] = now["data_sha256"]  # which knows of some changes by itself
    with pytest.raises(ValueError, match=rf"changed since this checkpoint was written: .*{named}.*restore these files"):
        check_origin(then, now, later.args)


def test_the_weights_of_a_judge_are_looked_at_before_it_is_loaded(tmp_path):
    from diffalign.rewards.base import get_reward
    from diffalign.trainers.contents import contents

    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.safetensors").write_bytes(b"1")
    args = short("flow_grpo", tmp_path / "run")
    rewards = {"look": get_reward("clipscore", path=str(tmp_path / "weights"))}
    before = contents(args, rewards)
    (tmp_path / "weights" / "model.safetensors").write_bytes(b"2")
    after = contents(args, rewards)
    assert [name for name in before if before[name] != after[name]] == [f"reward file {tmp_path / 'weights'}"]


@pytest.mark.parametrize("suffix", [".ckpt", ".onnx", ".npz", ".pth"])
def test_the_file_of_a_judge_beside_the_run_is_looked_at(suffix, tmp_path, monkeypatch):
    from diffalign.rewards.base import FunctionReward
    from diffalign.trainers.contents import contents

    class Judge:
        def __init__(self):
            self.weights = f"judge{suffix}"

        def __call__(self, images, prompts, metadata):
            return images.mean((1, 2, 3))

    args = short("flow_grpo", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    Path(f"judge{suffix}").write_bytes(b"1")
    before = contents(args, {"look": FunctionReward("look", Judge())})
    Path(f"judge{suffix}").write_bytes(b"2")
    after = contents(args, {"look": FunctionReward("look", Judge())})
    assert [name for name in before if before[name] != after[name]] == [f"reward file judge{suffix}"]


def test_checkpoints_from_before_know_no_contents_and_are_accepted(world):
    args = args_of("refl", world)
    trainer = TRAINERS["refl"].make(args)
    now = trainer.loop.outputs.origin()
    then = {name: value for name, value in now.items() if name != "contents"}
    assert not check_origin(then, now, trainer.args)


def test_the_source_images_of_edits_are_looked_at(tmp_path):
    from diffalign.trainers.contents import source_contents

    path = tmp_path / "source.png"
    prompts = [Prompt(text, {"image": str(path)}) for text in ("make it blue", "add a square")]
    found = []
    for color in ("red", "red", "green"):
        Image.new("RGB", (8, 8), color).save(path)
        found.append(source_contents(prompts))
    assert found[0] == found[1] != found[2]
    assert source_contents([Prompt("a red circle"), Prompt("a star", {"image": "cat-17"})]) == {}


@pytest.fixture
def edited(tmp_path):
    """Two copies of pairs whose prompts edit an image beside them."""
    for name in ("here", "moved"):
        folder = tmp_path / name
        folder.mkdir()
        rows = []
        for number in range(3):
            for side in "abs":
                Image.new("RGB", (16, 16), (40 * number, 90, ord(side))).save(folder / f"{number}{side}.png")
            images = {"image_0": f"{number}a.png", "image_1": f"{number}b.png"}
            rows.append({"prompt": f"edit {number}", **images, "label": 1, "metadata": {"image": f"{number}s.png"}})
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "prompts.jsonl").write_text(
            "".join(json.dumps({"prompt": row["prompt"], **row["metadata"]}) + "\n" for row in rows)
        )
    return tmp_path / "here", tmp_path / "moved"


def digests_in(folder, monkeypatch):
    """What a run in a folder records of pairs and of prompts."""
    monkeypatch.chdir(folder)
    pairs, prompts = load_pairs("pairs.jsonl"), load_prompts("prompts.jsonl")
    assert {Path(p.metadata["image"]).parent for p in (pairs[0].prompt, prompts[0])} == {folder}
    own, old = Collector.digests(SimpleNamespace(prompts=prompts))
    return {"data_sha256": own, "data_with_paths": old, "contents": {"samples": sample_contents(pairs)}}


def test_data_that_moved_with_the_images_that_they_edit_are_the_same(edited, monkeypatch):
    here, moved = (digests_in(folder, monkeypatch) for folder in edited)
    assert here["data_sha256"] == moved["data_sha256"]
    assert here["data_with_paths"] != moved["data_with_paths"]
    assert here["contents"]["samples"]["content"] == moved["contents"]["samples"]["content"]
    Image.new("RGB", (16, 16)).save(edited[1] / "1s.png")
    assert digests_in(edited[1], monkeypatch)["contents"] != moved["contents"]


def test_a_checkpoint_whose_digests_have_paths_is_resumed_where_the_data_lie(edited, monkeypatch):
    args = short("flow_grpo", edited[0] / "run")
    for folder, accepted in zip(edited, (True, False), strict=True):
        then = {**origin(args, "", 1, "cpu"), **digests_in(edited[0], monkeypatch)}
        then["data_sha256"] = then.pop("data_with_paths")  # as version 0.1 wrote them
        samples = then["contents"]["samples"]
        then["contents"] = {"samples": {**samples, "content": samples[WITH_PATHS]}}
        now = {**origin(args, "", 1, "cpu"), **digests_in(folder, monkeypatch)}
        if accepted:
            assert not check_origin(then, now, args)
        else:
            with pytest.raises(ValueError, match="the training data have changed"):
                check_origin(then, now, args)
