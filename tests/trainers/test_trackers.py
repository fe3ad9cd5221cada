"""Config, metrics, captioned images and pictures reach tensorboard, wandb and trackio, read back from their files."""

import json
import sqlite3
import struct

import pytest

from diffalign.runtime.tracking import TRACKERS, tracker_names


def tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    scalars, images, texts = {}, {}, []
    for file in folder.rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(file), size_guidance={"images": 0, "tensors": 0})
        events.Reload()
        scalars |= {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        images |= {tag: [event.step for event in events.Images(tag)] for tag in events.Tags()["images"]}
        for tag in events.Tags()["tensors"]:
            texts += [str(make_ndarray(event.tensor_proto)) for event in events.Tensors(tag)]
    return scalars, images, " ".join(texts)


def records(path):
    """Yield the records of an offline run: a log of LevelDB's format, after a header of seven bytes."""
    data, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:  # the rest of a block holds no header
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield whole
            whole = b""


def wandb(folder):
    from wandb.proto.wandb_internal_pb2 import Record

    scalars, images, texts = {}, {}, []
    (file,) = folder.rglob("*.wandb")
    for data in records(file):
        record = Record()
        record.ParseFromString(data)
        found = {}
        for item in record.history.item:
            name, *inner = [item.key] if item.key else item.nested_key
            value = json.loads(item.value_json)
            if inner:
                found.setdefault(name, {})[inner[0]] = value
            else:
                found[name] = value
        step = found.get("_step", record.history.step.num)
        for name, value in found.items():
            shown = isinstance(value, dict) and "image" in str(value.get("_type"))
            (images if shown else scalars).setdefault(name, []).append(step)
            texts += map(str, value.get("captions") or []) if shown else []
    return scalars, images, " ".join(texts)


def trackio(folder):
    (file,) = (path for path in folder.rglob("*.db") if "diffalign" in path.name)
    scalars, images, texts = {}, {}, []
    for step, text in sqlite3.connect(file).execute("SELECT step, metrics FROM metrics"):
        for name, value in json.loads(text).items():
            kept = images if isinstance(value, dict) else scalars
            kept.setdefault(name, []).append(step)
            texts += [str(value.get("caption"))] if isinstance(value, dict) else []
    return scalars, images, " ".join(texts)


READERS = {"tensorboard": tensorboard, "wandb": wandb, "trackio": trackio}


@pytest.mark.usefixtures("curves")
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "tensorboard")) for n in TRACKERS])
def test_everything_reaches_the_tracker(name, small, train_prompts, tmp_path, monkeypatch):
    from diffalign import FlowGRPOTrainer

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "trackers"))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackers"))
    (tmp_path / "trackers").mkdir()
    monkeypatch.chdir(tmp_path)
    args = small(report_to=name, eval_rewards=("shapes_strict",), output_dir=tmp_path / "run")
    FlowGRPOTrainer(args=args, train_dataset=train_prompts, eval_dataset=train_prompts).train()

    scalars, images, texts = READERS[name](tmp_path)
    assert scalars["loss"] == [1, 2]
    assert scalars["eval/accuracy"] == [0, 2]
    several = len({prompt.text for prompt in train_prompts}) > 1 and name != "wandb"
    assert images["eval/images/00" if several else "eval/images"] == [0, 2]
    assert images["compare"] == images["curves"] == [2]
    assert f"{train_prompts[0].text} (shapes_strict " in texts


def test_all_are_those_installed(monkeypatch):
    assert tracker_names("all") == list(TRACKERS)
    monkeypatch.setattr("diffalign.runtime.tracking.find_spec", lambda name: name == "wandb" or None)
    assert tracker_names("all") == ["wandb"]
    monkeypatch.setattr("diffalign.runtime.tracking.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="report_to all: none of tensorboard, wandb, trackio is installed"):
        tracker_names("all")
