"""What a row means does not depend on the container, nor on the command that reads it."""

import random
import re
import sys

import pytest
import torch
from PIL import Image

from diffalign.cli import main
from diffalign.commands.check import CheckConfig, examine
from diffalign.commands.relabel import RelabelConfig, relabel
from diffalign.commands.score import ScoreConfig, score_files
from diffalign.data.ai_labels import read_table
from diffalign.data.config import PreferenceDataConfig
from diffalign.data.pairs import load_pairs
from diffalign.data.prompts import load_prompts
from diffalign.data.stream import stream_pairs
from diffalign.data.tables import open_table
from diffalign.data.unpaired import load_labelled
from diffalign.shapes import prompt_set, render, scene_for
from diffalign.structures import Prompt
from tests.data import table_writers
from tests.data.preference_files import encoded, jsonl
from tests.data.table_writers import CONTAINERS, TEXTS

# Mappings of different keys, so that a table has members that a row does not.
WANTED = [
    Prompt("a red circle", {"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}]}),
    Prompt("two squares", {"tag": "counting", "include": [{"class": "square", "count": 2}], "exclude": []}),
    Prompt("anything", {}),
    Prompt("None", {"tag": "named", "deep": {"a": {"b": 1}}}),
]


@pytest.fixture
def images(tmp_path):
    for number in range(8):
        (tmp_path / f"{number}.jpg").write_bytes(encoded(number))
    return tmp_path


def pairs(prompts):
    return [
        {"prompt": p.text, "image_0": f"{2 * i}.jpg", "image_1": f"{2 * i + 1}.jpg", "label": i % 2}
        | {"metadata": dict(p.metadata)}
        for i, p in enumerate(prompts)
    ]


def settings_of(path):
    return PreferenceDataConfig(image_root=path.parent if path.is_dir() else None)


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("streaming", [False, True])
def test_pairs_have_the_metadata_of_the_plain_json(container, streaming, images):
    path = container(images, pairs(WANTED))
    if streaming:
        found = list(stream_pairs(path, settings=settings_of(path)).once())
    else:
        data = load_pairs(path, settings=settings_of(path))
        found = [data[i] for i in range(len(data))]
    assert [pair.prompt for pair in found] == WANTED
    assert [pair.label for pair in found] == [0, 1, 0, 1]
    assert [source.read() for pair in found for source in pair.images] == [encoded(i) for i in range(8)]


@pytest.mark.parametrize("container", CONTAINERS)
def test_single_images_have_the_metadata_of_the_plain_json(container, images):
    rows = [
        {"image": f"{i}.jpg", "liked": i % 2, "caption": p.text, "metadata": p.metadata} for i, p in enumerate(WANTED)
    ]
    path = container(images, rows)
    data = load_labelled(path, settings=settings_of(path))
    assert [(data[i].prompt, data[i].liked) for i in range(4)] == [(p, bool(i % 2)) for i, p in enumerate(WANTED)]


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("nested", [False, True])
def test_score_gives_rewards_the_metadata_of_the_plain_json(container, nested, images, tmp_path, monkeypatch):
    """Beside the image as in prompt files, or in "metadata" as in pairs."""
    seen = []

    def spy(pictures, prompts, metadata):
        seen.extend(Prompt(text, dict(own)) for text, own in zip(prompts, metadata, strict=True))
        return torch.zeros(len(prompts))

    monkeypatch.setitem(sys.modules, "spied_on", type(sys)("spied_on"))
    sys.modules["spied_on"].spy = spy
    (tmp_path / "reward.py").write_text("import sys\nspy = sys.modules['spied_on'].spy\n")
    rows = [
        {"image": f"{i}.jpg", "prompt": p.text, **({"metadata": p.metadata} if nested else p.metadata)}
        for i, p in enumerate(WANTED)
    ]
    path = container(images, rows)
    options = {"rewards": (f"{tmp_path}/reward.py:spy",), "allow_reward_code": True, "batch_size": 1}
    options |= {"image_root": settings_of(path).image_root, "output_dir": tmp_path / "out"}
    score_files(ScoreConfig(images=(str(path),), **options))
    if not nested and container is table_writers.comma:
        # A cell has no type: lists and mappings are read, numbers stay text, an empty one is absent.
        assert [p.text for p in seen] == [p.text for p in WANTED]
        as_texts = [{k: v if isinstance(v, (list, dict)) else str(v) for k, v in p.metadata.items()} for p in WANTED]
        assert [dict(p.metadata) for p in seen] == as_texts
    else:
        assert seen == WANTED


@pytest.mark.parametrize("container", CONTAINERS)
def test_rewards_of_the_embedded_world_score_every_container_alike(container, tmp_path):
    """The first image shows what is asked for, the second what the next prompt asks for."""
    prompts = prompt_set(1, held_out=False, seed=0)
    if container not in TEXTS:  # a list of a text and a number is no column of a table
        prompts = [prompt for prompt in prompts if prompt.metadata["tag"] != "position"]
    for i, picture in enumerate(
        render([scene_for(prompt.metadata, random.Random(i)) for i, prompt in enumerate(prompts)])
    ):
        Image.fromarray((picture.permute(1, 2, 0) * 255).round().byte().numpy()).save(tmp_path / f"{i}.png")
    rows = [
        {"prompt": p.text, "image_0": f"{i}.png", "image_1": f"{(i + 1) % len(prompts)}.png"}
        | {"label": 1, "metadata": p.metadata}
        for i, p in enumerate(prompts)
    ]
    path = container(tmp_path, rows)
    given = {"image_root": settings_of(path).image_root, "streaming": path.suffix == ".csv"}
    found = read_table(relabel(path, RelabelConfig(rewards=("shapes",), **given)))
    assert [row["shapes/0"] for row in found] == [1.0] * len(prompts)
    assert all(row["shapes/1"] < 1 for row in found)
    assert examine(CheckConfig(data=(str(path),), **given))["good"] == len(prompts)


def test_a_rollout_buffer_gives_score_and_training_one_meaning(images, tmp_path):
    lines = [
        {
            "file_name": f"{i}.jpg",
            "prompt": p.text,
            "group": 0,
            "sample": i,
            "rewards": {"r": i},
            "metadata": p.metadata,
        }
        for i, p in enumerate([WANTED[0]] * 2)
    ]
    jsonl(images / "metadata.jsonl", lines)
    assert load_pairs(images)[0].prompt == WANTED[0]
    options = {"rewards": ("shapes",), "output_dir": tmp_path / "out"}
    with pytest.warns(UserWarning, match="6 pictures without a line in the metadata not read: 2.jpg"):
        rows = score_files(ScoreConfig(images=(str(images),), **options))
    assert all(row["rewards"]["shapes"] is not None for row in rows)


def test_prompt_files_have_the_same_metadata(tmp_path):
    lines = [{"prompt": p.text, **p.metadata, "absent": None} for p in WANTED]
    nested = [{"prompt": p.text, "metadata": dict(p.metadata)} for p in WANTED]
    assert load_prompts(jsonl(tmp_path / "a.jsonl", lines)) == WANTED
    assert load_prompts(jsonl(tmp_path / "b.jsonl", nested)) == WANTED
    (tmp_path / "c.jsonl").write_text('{"prompt": "p", "metadata": "{broken"}\n')
    with pytest.raises(ValueError, match=r'c\.jsonl, line 1: "metadata": .*bad JSON'):
        load_prompts(tmp_path / "c.jsonl")


CAPTIONS = [
    "None",
    "NA",
    "null",
    "nan",
    "NaN",
    "N/A",
    "true",
    "007",
    "1.0",
    "1e5",
    "-",
    "a, b",
    'say "hi"',
    "two\nlines",
]


@pytest.mark.parametrize("container", CONTAINERS)
def test_captions_stay_as_they_are_written(container, images):
    rows = [{"prompt": text, "image_0": "0.jpg", "image_1": "1.jpg", "label": 1.0} for text in CAPTIONS]
    path = container(images, rows)
    data = load_pairs(path, settings=settings_of(path))
    assert [data[i].prompt.text for i in range(len(data))] == CAPTIONS


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("values", [[7, 12], [0.5, 1.5]])
def test_a_column_of_numbers_is_text_where_text_is_wanted(container, values, images, tmp_path):
    rows = [
        {"prompt": value, "image_0": "0.jpg", "image_1": "1.jpg", "label": 1.0, "image": "0.jpg"} for value in values
    ]
    path = container(images, rows)
    data = load_pairs(path, settings=settings_of(path))
    assert [data[i].prompt.text for i in range(2)] == [str(value) for value in values]
    options = {"rewards": ("brightness",), "output_dir": tmp_path / "out", "image_root": settings_of(path).image_root}
    assert [row["prompt"] for row in score_files(ScoreConfig(images=(str(path),), **options))] == list(map(str, values))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json"])
def test_a_folder_of_text_files_is_read_as_its_files_are(kind, images):
    """``datasets`` finds the files and their splits; it would take None for nothing, and mixed lists for an error."""
    position = Prompt("None", {"include": [{"class": "a", "count": 1}, {"class": "b", "position": ["left of", 0]}]})
    container = {"csv": table_writers.comma, "jsonl": table_writers.json_lines, "json": table_writers.json_list}[kind]
    folder = images / "set"
    folder.mkdir()
    container(images, pairs([position, WANTED[0]])).rename(folder / f"train.{kind}")
    container(images, pairs([WANTED[1]])).rename(folder / f"test.{kind}")
    for name in ("train", "test"):
        settings = PreferenceDataConfig(split=name, image_root=images)
        data = load_pairs(folder, settings=settings)
        found = [data[i].prompt for i in range(len(data))]
        assert found == ([position, WANTED[0]] if name == "train" else [WANTED[1]])
        assert [pair.prompt for pair in stream_pairs(folder, settings=settings).once()] == found


def test_pick_a_pic_as_text_keeps_flags_and_empty_cells(images):
    rows = [
        {"jpg_0": "0.jpg", "jpg_1": "1.jpg", "label_0": 1, "has_label": True, "caption": "a"},
        {"jpg_0": "2.jpg", "jpg_1": "3.jpg", "label_0": "", "has_label": False, "caption": "b"},
        {"jpg_0": "4.jpg", "jpg_1": "5.jpg", "label_0": 0.5, "has_label": True, "caption": "c"},
    ]
    data = load_pairs(table_writers.comma(images, rows), settings=PreferenceDataConfig(ties="soft"))
    assert [(data[i].prompt.text, data[i].label) for i in range(len(data))] == [("a", 1), ("c", 0.5)]
    assert data.quarantine.skipped == {"unlabelled": 1}


@pytest.mark.parametrize("text", ["{'a': 1}", "[1]", "7", '"x"', "{", "[[1, 2]]"])
@pytest.mark.parametrize("container", TEXTS)
def test_unreadable_metadata_are_an_error_by_name(text, container, images):
    row = {**pairs(WANTED)[0], "metadata": text}
    report = examine(CheckConfig(data=(str(container(images, [row, *pairs(WANTED)[1:]])),)))
    assert "row 0, metadata" in next(iter(report["faults"]["bad_row"]["samples"]))


def test_rows_of_different_keys_are_read(images):
    rows = [{"prompt": "a", "chosen": "0.jpg", "rejected": "1.jpg"}]
    rows += [{"caption": "b", "rejected": "3.jpg", "chosen": "2.jpg"}, {"prompt": "c", "chosen": "4.jpg"}]
    table = open_table(jsonl(images / "a.jsonl", rows), PreferenceDataConfig())
    assert table.columns == ["prompt", "chosen", "rejected", "caption"]
    data = load_pairs(images / "a.jsonl", settings=PreferenceDataConfig(scan=0))
    assert [data[i].prompt.text for i in range(3)] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", 'prompt,chosen,rejected\na,"b,c\n', r"a\.csv, line 2: bad CSV .*in quotes"),
        ("a.csv", "prompt,chosen,rejected\na,b\n", r"a\.csv, line 2: 2 cells for 3 columns"),
        ("a.csv", "prompt,chosen,rejected\n\n\na,b,c,d\n", r"a\.csv, line 4: 4 cells for 3 columns"),
        ("a.csv", "prompt,prompt,rejected\na,b,c\n", r"a\.csv: column prompt given twice"),
        ("a.jsonl", '{"a": 1}\n\n{"a"\n', r"a\.jsonl, line 3: bad JSON"),
        ("a.json", '[{"a": 1},\n {"a"]', r"a\.json, line 2: bad JSON"),
        ("a.json", "[1]", r"a\.json: expected a list of objects, got \[1\]"),
        ("a.json", '{"a": 1}\n{"a"\n', r"a\.json, line 2: bad JSON"),
        ("a.csv", b"prompt,chosen,rejected\nB\xe4r,b,c\n", r"a\.csv, line 2: not UTF-8"),
        ("a.json", b'[{"prompt":\n "B\xe4r"}]', r"a\.json, line 2: not UTF-8"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "B\xe4r"}', r"a\.jsonl, line 2: not UTF-8"),
    ],
)
@pytest.mark.parametrize("command", ["check", "label", "relabel", "score"])
def test_a_line_that_is_no_row_is_named_in_every_command(name, content, message, command, tmp_path, capsys):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    options = [] if command == "check" else ["--rewards", "brightness"]
    options = ["--output_dir", str(tmp_path / "out")] if command == "label" else options
    assert main([command, str(tmp_path / name), *options]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_cell_of_csv_may_be_longer_than_pythons_limit_and_have_lines(images):
    (images / "a.csv").write_text(
        f'prompt,chosen,rejected\r\n"{"x" * 90_000}\r\n{"y" * 9_000}",0.jpg,1.jpg\r\nb,2.jpg,3.jpg\r\n'
    )
    data = load_pairs(images / "a.csv")
    assert [len(data[i].prompt.text) for i in range(2)] == [99_001, 1]
    assert data[0].winner.read() == encoded(0)


@pytest.mark.parametrize("lines", ["\n{0}\n{1}\n   \n{2}\n", "{0}\r\n \t\r\n{1}\r\n\r\n{2}"])
def test_blank_lines_of_csv_are_skipped_as_those_of_json_lines(lines, images):
    path = images / "rows.csv"
    path.write_text(lines.format("prompt,image_0,image_1,label", "a,0.jpg,1.jpg,1", "b,2.jpg,3.jpg,0"), newline="")
    data = load_pairs(path)
    assert [(data[i].prompt.text, data[i].label) for i in range(len(data))] == [("a", 1), ("b", 0)]
    assert [pair.prompt.text for pair in stream_pairs(path).once()] == ["a", "b"]


def test_a_library_draws_no_bar_where_nobody_looks(images, capfd):
    path = table_writers.table(images, pairs(WANTED))
    load_pairs(path, settings=settings_of(path))
    assert "Generating" not in capfd.readouterr().err
