"""Prompts with a source image: paths relative to the prompt file, and columns of tables and data sets."""

import csv
import io
import json
from pathlib import Path

import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from diffalign import media
from diffalign.cli import main
from diffalign.commands import image_sources
from diffalign.data.config import PreferenceDataConfig
from diffalign.data.images import content_key
from diffalign.data.pairs import load_pairs
from diffalign.data.prompts import load_prompts
from diffalign.data.stream import stream_pairs
from diffalign.data.unpaired import load_labelled
from diffalign.data.validation import DataWarning
from diffalign.structures import EditInput, ImageSource, Pair, Prompt
from tests.data.preference_files import image_table, jsonl


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def png(color, size=(8, 6)):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


ROWS = [("make it blue", "red"), ("add a square", "green")]


def written(folder, suffix):
    (folder / "pictures").mkdir()
    rows = []
    for text, color in ROWS:
        (folder / f"pictures/{color}.png").write_bytes(png(color))
        rows.append({"prompt": text, "image": f"pictures/{color}.png", "kind": color})
    path = folder / f"prompts.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == "json":
        path.write_text(json.dumps(rows))
    elif suffix == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        Dataset.from_list(rows).to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize("option", ["", "?image=image"])
def test_a_path_starts_from_the_folder_of_the_prompts(tmp_path, monkeypatch, suffix, option):
    (tmp_path / "data").mkdir()
    path = written(tmp_path / "data", suffix)
    monkeypatch.chdir(tmp_path)
    for source in (path, path.relative_to(tmp_path)):
        prompts = load_prompts(f"{source}{option}")
        assert [p.metadata["image"] for p in prompts] == [
            str(tmp_path / f"data/pictures/{color}.png") for _, color in ROWS
        ]
        assert [p.metadata["kind"] for p in prompts] == [color for _, color in ROWS]
        assert prompts[0].input == EditInput("make it blue", prompts[0].metadata["image"])


def pairs_of(path):
    return [load_pairs(str(path))[0].prompt]


def images_of(path):
    return [load_labelled(str(path))[0].prompt]


def scored_of(path):
    return [item.prompt for item in image_sources.read(str(path))]


@pytest.mark.parametrize("read", [pairs_of, images_of, scored_of, load_prompts])
@pytest.mark.parametrize("as_text", [False, True])
def test_a_source_in_the_metadata_starts_from_the_folder_of_the_data(tmp_path, monkeypatch, read, as_text):
    """Not from the working folder, which may hold another file of that name."""
    for folder, color in (("data", "red"), (".", "blue")):
        (tmp_path / folder).mkdir(exist_ok=True)
        for name in ("source.png", "result.png"):
            (tmp_path / folder / name).write_bytes(png(color, (32, 32)))
    (tmp_path / "data/other.png").write_bytes(png("green", (32, 32)))
    metadata = {"image": "source.png"}
    row = {"prompt": "make it blue", "metadata": json.dumps(metadata) if as_text else metadata}
    row |= {"image": "result.png", "liked": True} if read in (images_of, scored_of) else {}
    row |= {"image_0": "result.png", "image_1": "other.png", "label": 1} if read is pairs_of else {}
    path = tmp_path / "data/rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    monkeypatch.chdir(tmp_path)
    (prompt,) = read(path)
    assert prompt.input == EditInput("make it blue", str(tmp_path / "data/source.png"))


def test_the_content_of_a_pair_is_that_of_its_source_wherever_it_lies(tmp_path):
    def key(name, color):
        (tmp_path / name).write_bytes(png(color))
        images = (ImageSource("a", png("white")), ImageSource("b", png("black")))
        return content_key(Pair("k", Prompt("make it blue", {"image": str(tmp_path / name)}), images, 1.0))

    assert key("one.png", "red") == key("two.png", "red")
    assert key("one.png", "red") != key("one.png", "green")


@pytest.mark.parametrize("kind", ["binary", "feature"])
def test_a_column_of_images_is_read_when_it_is_named(tmp_path, kind):
    table = {"prompt": [text for text, _ in ROWS], "before": [png(color) for _, color in ROWS]}
    features = Features({"prompt": Value("string"), "before": ImageFeature() if kind == "feature" else Value("binary")})
    if kind == "feature":
        table["before"] = [{"bytes": content, "path": None} for content in table["before"]]
    path = tmp_path / "prompts.parquet"
    Dataset.from_dict(table, features=features).to_parquet(path)
    assert all("image" not in p.metadata and "before" not in p.metadata for p in load_prompts(path))
    assert not (tmp_path / "cache").exists(), "nobody asked for the images"
    for _ in range(2):
        prompts = load_prompts(f"{path}?image=before")
        colors = [media.decode(Path(p.metadata["image"]).read_bytes()).getpixel((0, 0)) for p in prompts]
        assert colors == [(255, 0, 0), (0, 128, 0)]
        assert all("before" not in p.metadata for p in prompts)
    assert len(list((tmp_path / "cache").rglob("*.img"))) == 2


def streamed(source, settings):
    return list(stream_pairs(source, settings=settings).once())


READERS = [load_pairs, streamed, load_labelled]


def pair_rows(before):
    """Rows of two pairs, each with a source in the column "before"."""
    results = {"chosen": png("white", (32, 32)), "rejected": png("black", (32, 32))}
    return [{"prompt": "make it blue", **results, "before": source} for source in before]


@pytest.mark.parametrize("load", READERS)
def test_pairs_have_a_column_of_sources_too(tmp_path, load):
    rows = pair_rows([png("red"), png("green")])
    path = image_table(tmp_path / "pairs.parquet", rows, ("chosen", "rejected", "before"))
    samples = load(path, settings=PreferenceDataConfig(source="before"))
    found = [media.decode(Path(sample.prompt.metadata["image"]).read_bytes()).getpixel((0, 0)) for sample in samples]
    assert sorted(set(found)) == [(0, 128, 0), (255, 0, 0)]
    assert all(isinstance(sample.prompt.input, str) for sample in load(path, settings=PreferenceDataConfig()))


def test_pairs_of_other_sources_are_no_repetitions(tmp_path, capsys):
    rows = pair_rows([png("red"), png("green"), png("red")])
    path = image_table(tmp_path / "pairs.parquet", rows, ("chosen", "rejected", "before"))
    main(["check", str(path), "--source", "before"])
    said = capsys.readouterr().out
    assert "prompts: 2 different" in said
    assert "repeated: 1, of which 0" in said


@pytest.mark.parametrize("load", READERS)
def test_a_column_of_sources_may_hold_paths_of_files_beside_the_data(tmp_path, load):
    for name in ("red.png", "data/green.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png(name.split("/")[-1].split(".")[0]))
    for name, color in (("chosen", "white"), ("rejected", "black")):
        (tmp_path / f"data/{name}.png").write_bytes(png(color, (32, 32)))
    rows = [
        {"prompt": f"edit {before}", "chosen": "chosen.png", "rejected": "rejected.png", "before": before}
        for before in ("green.png", "none.png", "../red.png", "")
    ]
    path = jsonl(tmp_path / "data/pairs.jsonl", rows)
    with pytest.warns(DataWarning, match="bad_row: 3 ") as said:
        samples = load(path, settings=PreferenceDataConfig(source="before", max_bad_share=0.8))
    assert {sample.prompt.metadata["image"] for sample in samples} == {str(tmp_path / "data/green.png")}
    for reason in ("lies outside the folder of the data", "no such file", "no image"):
        assert any(reason in str(one.message) for one in said)
    with pytest.raises(ValueError, match=r"has no column 'after' of sources: name one of .* as data\.source"):
        load(path, settings=PreferenceDataConfig(source="after"))


def test_metadata_of_the_name_that_are_no_files_stay(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a", "image": "cat-17"}\n{"prompt": "b", "image": 3}\n{"prompt": "c", "image": null}\n')
    assert [p.metadata for p in load_prompts(path)] == [{"image": "cat-17"}, {"image": 3}, {}]


@pytest.mark.parametrize(
    ("row", "option", "message"),
    [
        ({"image": "none.png"}, "image", r"line 1: image: .*none\.png"),
        ({"image": ""}, "image", "line 1: image: no image; fill it or delete the line"),
        ({"picture": "x"}, "image", "line 1: no 'image' among picture; name another column: image=NAME"),
        ({"image": "prompts.jsonl"}, "other", "line 1: no 'other' among"),
    ],
)
def test_a_named_column_without_an_image_is_an_error(tmp_path, row, option, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "a", **row}) + "\n")
    with pytest.raises(ValueError, match=message):
        load_prompts(f"{path}?image={option}")


def test_text_files_have_no_images(tmp_path):
    (tmp_path / "p.txt").write_text("a\n")
    with pytest.raises(ValueError, match="image is not read of a text file; write limit, unique"):
        load_prompts(f"{tmp_path / 'p.txt'}?image=image")


def test_one_text_with_two_sources_is_two_prompts(tmp_path, capsys):
    for color in ("red", "green"):
        (tmp_path / f"{color}.png").write_bytes(png(color))
    path = jsonl(
        tmp_path / "p.jsonl", [{"prompt": "make it blue", "image": f"{c}.png"} for c in ("red", "green", "red")]
    )
    assert len(load_prompts(f"{path}?unique=true")) == 2
    assert main(["check", str(path), "--prompts"]) == 0
    said = capsys.readouterr().out
    assert "2 different" in said
    assert "repeated: 1" in said


def test_two_sources_of_one_text_are_two_inputs():
    one, other = (Prompt("make it blue", {"image": path}).input for path in ("a.png", "b.png"))
    assert len({one, other, Prompt("make it blue").input}) == 3
