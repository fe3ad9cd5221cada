"""Prompts, pairs and images at addresses of a store are read as those on disk are, by every reader."""

import json
from pathlib import Path

import pytest
from datasets import Dataset
from PIL import Image

from diffalign.cli import main
from diffalign.commands.image_sources import read
from diffalign.config import from_dict, to_dict
from diffalign.data.config import PreferenceDataConfig
from diffalign.data.pairs import load_pairs
from diffalign.data.prompts import load_prompts
from diffalign.data.stream import stream_pairs
from diffalign.data.unpaired import load_labelled
from diffalign.remote import Unreachable
from diffalign.trainers.flow_grpo.config import FlowGRPOConfig
from tests.store import opened, upload

SETTINGS = PreferenceDataConfig(min_side=1)
ROWS = [
    {
        "prompt": f"prompt {number}",
        "image_0": f"images/{number}.png",
        "image_1": f"images/{number + 1}.png",
        "label": 1.0,
    }
    for number in range(2)
]


@pytest.fixture
def store(monkeypatch, tmp_path):
    return opened(monkeypatch, tmp_path / "cache")


@pytest.fixture
def folder(store, tmp_path):
    """Pairs in every form, on disk and at store://b/data."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (8, 8), (80 * number, 0, 0)).save(folder / "images" / f"{number}.png")
    for side, number in (("chosen", 0), ("rejected", 1)):
        (folder / "sides" / side).mkdir(parents=True)
        Image.new("RGB", (8, 8), (80 * number, 0, 0)).save(folder / "sides" / side / "0.png")
    (folder / "sides" / "chosen" / "0.txt").write_text("prompt 0")
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (folder / "pairs.json").write_text(json.dumps(ROWS))
    lines = [",".join(map(str, row.values())) for row in ROWS]
    (folder / "pairs.csv").write_text("\n".join([",".join(ROWS[0]), *lines]))
    Dataset.from_list(ROWS).to_parquet(folder / "pairs.parquet")
    (folder / "prompts.txt").write_text("prompt 0\nprompt 1\n")
    upload(store, folder, "/b/data")
    return folder


def contents(data):
    return [(pair.prompt.text, pair.label, *(image.read() for image in pair.images)) for pair in data]


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.json", "pairs.csv", "pairs.parquet", "sides"])
def test_pairs_are_those_on_disk(name, store, folder):
    there = load_pairs(f"store://b/data/{name}", settings=SETTINGS)
    assert contents(there) == contents(load_pairs(folder / name, settings=SETTINGS))
    assert there[0].key.startswith(f"store://b/data/{name}, row 0")
    streamed = stream_pairs(f"store://b/data/{name}", settings=SETTINGS).once()
    assert contents(streamed) == contents(there)
    liked = load_labelled(f"store://b/data/{name}", settings=SETTINGS)
    assert len(liked) == len(load_labelled(folder / name, settings=SETTINGS))


@pytest.mark.parametrize("name", ["prompts.txt", "pairs.jsonl", "pairs.json", "pairs.csv", "pairs.parquet"])
def test_prompts_are_those_on_disk(name, store, folder):
    texts = [prompt.text for prompt in load_prompts(folder / name)]
    assert [prompt.text for prompt in load_prompts(f"store://b/data/{name}")] == texts
    assert [prompt.text for prompt in load_prompts(Path(f"store://b/data/{name}?limit=1"))] == texts[:1]


def test_images_of_a_store_are_scored(store, folder):
    for name in ("images", "images/0.png"):
        items = list(read(f"store://b/data/{name}"))
        assert [item.name for item in items][:1] == ["store://b/data/images/0.png"]
        assert items[0].load().shape == (3, 8, 8)


def test_images_are_fetched_when_read_and_once(store, folder):
    data = load_pairs("store://b/data/pairs.jsonl", settings=PreferenceDataConfig(min_side=1, scan=0))
    assert not [name for name in store.sent if name.endswith(".png")]
    for _ in range(3):
        data.load(0)
    assert sorted(name for name in store.sent if name.endswith(".png")) == [
        "/b/data/images/0.png",
        "/b/data/images/1.png",
    ]


@pytest.mark.parametrize(
    ("cell", "settings", "read"),
    [
        ("store://b/data/images/0.png", {}, True),
        ("store://b/other/0.png", {}, False),
        ("../other/0.png", {}, False),
        ("store://b/other/0.png", {"image_root": Path("store://b/other")}, True),
        ("0.png", {"image_root": Path("store://b/other")}, True),
        ("store://b/other/0.png", {"allow_outside": True}, True),
        ("store://k:v@b/data/images/0.png", {"allow_outside": True}, False),
        ("https://b/x.png?X-Amz-Signature=topsecret", {}, False),
    ],
)
@pytest.mark.parametrize("where", ["store://b/data/x.jsonl", "local"])
def test_a_table_does_not_choose_what_is_fetched(cell, settings, read, where, store, folder):
    upload(store, folder / "images", "/b/other")
    row = json.dumps({**ROWS[0], "image_0": cell}).encode()
    store.pipe_file("/b/data/x.jsonl", row)
    (folder / "x.jsonl").write_bytes(row)
    source = folder / "x.jsonl" if where == "local" else where
    expected = read and (where != "local" or "image_root" in settings or "allow_outside" in settings)
    data = load_pairs(source, settings=PreferenceDataConfig(min_side=1, max_bad_share=1, scan=0, **settings))
    image = data[0].images[0]
    if expected:
        assert image.read()
    else:
        with pytest.raises(
            ValueError, match=r"is an address, and nothing is fetched|lies outside the folder"
        ) as raised:
            image.read()
        assert "topsecret" not in str(raised.value)


def test_source_images_of_prompts_lie_beside_them(store, folder):
    lines = [{"prompt": "edit", "image": name} for name in ("images/0.png", "store://b/data/images/1.png")]
    store.pipe_file("/b/data/edits.jsonl", "\n".join(map(json.dumps, lines)).encode())
    found = load_prompts("store://b/data/edits.jsonl")
    assert [Path(prompt.metadata["image"]).read_bytes() for prompt in found] == [
        (folder / "images" / f"{number}.png").read_bytes() for number in range(2)
    ]
    (folder / "edits.jsonl").write_text(json.dumps(lines[1]))
    assert load_prompts(folder / "edits.jsonl")[0].metadata["image"] == "store://b/data/images/1.png"
    with pytest.raises(ValueError, match="nothing is fetched"):
        load_prompts(f"{folder}/edits.jsonl?image=image")


def test_a_lost_connection_does_not_count_as_a_bad_sample(store, folder):
    data = load_pairs("store://b/data/pairs.jsonl", settings=PreferenceDataConfig(min_side=1, scan=0))
    type(store).failing = {"get_file"}
    with pytest.raises(Unreachable, match="cannot be reached"):
        data.load(0)
    type(store).failing = set()
    assert data.load(0)[0].prompt.text == "prompt 0"
    assert not data.quarantine.dropped


def test_a_configuration_keeps_the_address(store):
    config = from_dict(FlowGRPOConfig, {"train_prompts": "s3://b/x.jsonl", "model": "shapes-sd3"})
    assert to_dict(config)["train_prompts"] == "s3://b/x.jsonl"
    assert from_dict(FlowGRPOConfig, to_dict(config)) == config


@pytest.mark.parametrize(
    "command", ["check", "score --rewards jpeg_compressibility --images", "train diffusion_dpo --train_data"]
)
@pytest.mark.parametrize("name", ["none.jsonl", "denied.jsonl"])
def test_commands_name_what_is_not_there(command, name, store, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    if name == "denied.jsonl":
        type(store).failing, type(store).error = {"info"}, PermissionError("403 Forbidden")
    assert main([*command.split(), f"store://b/data/{name}"]) == 2
    message = capsys.readouterr().err
    expected = "there is nothing at" if name == "none.jsonl" else "no access to"
    assert f"{expected} store://b/data/{name}" in message
    assert len(message) < 2000


def test_check_reads_a_store(store, folder, capsys):
    assert main(["check", "store://b/data/pairs.csv", "--min_side", "1"]) == 0
    assert "2" in capsys.readouterr().out
