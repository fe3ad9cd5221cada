"""Folders of pairs: two sides with matching names, or a folder for each pair."""

import json

import pytest

from diffalign.cli import main
from diffalign.commands.image_sources import read
from diffalign.data.config import PreferenceDataConfig
from diffalign.data.folders import SIDES
from diffalign.data.pairs import load_pairs
from diffalign.data.stream import stream_pairs
from diffalign.data.unpaired import load_labelled
from diffalign.data.validation import DataWarning
from diffalign.structures import Prompt
from tests.data.preference_files import encoded, jsonl


def put(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(number))


def contents(pair):
    return [source.read() for source in pair.images]


@pytest.mark.parametrize("sides", SIDES)
def test_files_of_the_same_stem_on_two_sides_are_a_pair(sides, tmp_path):
    for number, stem in enumerate(("b", "a")):
        put(tmp_path / sides[0] / f"{stem}.jpg", 2 * number)
        put(tmp_path / sides[1] / f"{stem}.png", 2 * number + 1)
        (tmp_path / sides[0] / f"{stem}.txt").write_text(f"\ufeff text {stem}\n", encoding="utf-8")
    data = load_pairs(tmp_path)
    assert [data[i].prompt for i in range(2)] == [Prompt("text a"), Prompt("text b")]
    assert [data[i].label for i in range(2)] == [1, 1]
    assert contents(data[0]) == [encoded(2), encoded(3)], "the chosen image comes first"
    assert data[0].key == f"{tmp_path}, row 0 (a)"


@pytest.mark.parametrize("name", ["chosen/{}.jpg", "{}.jpg"])
def test_texts_may_be_listed_in_metadata(name, tmp_path):
    for stem in "ab":
        put(tmp_path / f"chosen/{stem}.jpg", 0)
        put(tmp_path / f"rejected/{stem}.jpg", 1)
    lines = [{"file_name": name.format(stem), "caption": f"text {stem}", "metadata": {"k": stem}} for stem in "ab"]
    jsonl(tmp_path / "metadata.jsonl", lines)
    data = load_pairs(tmp_path)
    assert [data[i].prompt for i in range(2)] == [Prompt("text a", {"k": "a"}), Prompt("text b", {"k": "b"})]


@pytest.mark.parametrize("sides", SIDES)
def test_a_folder_for_each_pair(sides, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("002", "001")):
        put(tmp_path / f"data/{name}/{sides[0]}.png", 2 * number)
        put(tmp_path / f"data/{name}/{sides[1]}.png", 2 * number + 1)
        (tmp_path / f"data/{name}/prompt.txt").write_text(f"text {name}")
    data = load_pairs("data")
    assert [data[i].prompt.text for i in range(2)] == ["text 001", "text 002"]
    assert contents(data[1]) == [encoded(0), encoded(1)]
    assert data[1].winner.name == f"data/002/{sides[0]}.png"


def test_a_file_without_its_partner_or_text_is_named(tmp_path):
    for stem in ("a", "b", "c"):
        put(tmp_path / f"chosen/{stem}.jpg", ord(stem))
        put(tmp_path / f"rejected/{stem}.jpg", ord(stem) + 10)
        (tmp_path / f"chosen/{stem}.txt").write_text("text")
    (tmp_path / "rejected/b.jpg").unlink()
    (tmp_path / "chosen/c.txt").unlink()
    with pytest.warns(DataWarning) as caught:
        data = load_pairs(tmp_path, settings=PreferenceDataConfig(max_bad_share=1))
    said = str(caught[0].message)
    assert f"{tmp_path}, row 1 (b): rejected: no image" in said
    assert f"{tmp_path}, row 2 (c), prompt: empty" in said
    assert data.load(1)[0].key == f"{tmp_path}, row 0 (a)"


def test_text_that_is_not_utf8_is_named(tmp_path):
    put(tmp_path / "chosen/a.jpg", 0)
    put(tmp_path / "rejected/a.jpg", 1)
    (tmp_path / "chosen/a.txt").write_bytes("é".encode("utf-16"))
    with pytest.raises(ValueError, match=r"chosen/a\.txt: not UTF-8"):
        load_pairs(tmp_path)
    (tmp_path / "chosen/a.txt").unlink()
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.jpg"\n')
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 1: bad JSON"):
        load_pairs(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('["a.jpg"]\n')
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 1: expected an object"):
        load_pairs(tmp_path)


def noted(folder, **settings):
    """What load_pairs warns of."""
    with pytest.warns(DataWarning) as caught:
        data = load_pairs(folder, settings=PreferenceDataConfig(**settings))
    return data, str(caught[0].message)


def layouts(tmp_path, stems):
    """Both layouts of a folder of pairs."""
    for number, stem in enumerate(stems):
        for side, shift in (("chosen", 0), ("rejected", 100)):
            put(tmp_path / f"sides/{side}/{stem}.jpg", number + shift)
            put(tmp_path / f"each/{stem}/{side}.jpg", number + shift)
        (tmp_path / f"sides/chosen/{stem}.txt").write_text(stem)
        (tmp_path / f"each/{stem}/prompt.txt").write_text(stem)
    return [tmp_path / "sides", tmp_path / "each"]


@pytest.mark.parametrize("layout", [0, 1])
def test_pairs_come_in_the_order_that_their_owner_sees(layout, tmp_path):
    folder = layouts(tmp_path, ["img10", "img2", "img1", "10", "9", "Img3"])[layout]
    data = load_pairs(folder)
    assert [data[i].prompt.text for i in range(6)] == ["9", "10", "img1", "img2", "Img3", "img10"]


CLUTTER = [".DS_Store", "._1.jpg", ".hidden.jpg", "Thumbs.db", "desktop.ini", ".ipynb_checkpoints/1-checkpoint.jpg"]


@pytest.mark.parametrize("layout", [0, 1])
@pytest.mark.parametrize("streaming", [False, True])
def test_system_files_are_ignored_and_counted(layout, streaming, tmp_path):
    folder = layouts(tmp_path, ["1", "2"])[layout]
    inner = folder / ("chosen" if layout == 0 else "1")
    for name in CLUTTER:
        put(inner / name, 0)
    put(folder / ".ipynb_checkpoints/1/chosen.jpg", 0)
    put(folder / "__MACOSX/1/chosen.jpg", 0)
    if streaming:
        with pytest.warns(DataWarning, match="8 hidden or system files not read: ") as caught:
            stream = stream_pairs(folder)
        texts, said = [pair.prompt.text for pair in stream.once()], str(caught[0].message)
    else:
        data, said = noted(folder)
        texts = [data[i].prompt.text for i in range(len(data))]
    assert texts == ["1", "2"]
    assert "8 hidden or system files not read: " in said
    assert "and 5 more" in said


@pytest.mark.parametrize("layout", [0, 1])
def test_two_pictures_of_one_stem_are_refused_by_name(layout, tmp_path):
    folder = layouts(tmp_path, ["1", "2"])[layout]
    place, stem = (folder / "chosen", "1") if layout == 0 else (folder / "1", "chosen")
    put(place / f"{stem}.png", 0)
    with pytest.raises(ValueError, match=rf"{stem}\.jpg and {stem}\.png have the same name but for the suffix: rename"):
        load_pairs(folder)


def test_names_with_accents_in_two_spellings_are_one(tmp_path):
    """As copies from macOS have them."""
    put(tmp_path / "chosen/caf\u00e9.jpg", 0)
    put(tmp_path / "rejected/cafe\u0301.jpg", 1)
    jsonl(tmp_path / "metadata.jsonl", [{"file_name": "cafe\u0301.jpg", "text": "coffee"}])
    data = load_pairs(tmp_path)
    assert (data[0].prompt.text, contents(data[0])) == ("coffee", [encoded(0), encoded(1)])


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        (0, "neutral/1.jpg"),
        (0, "chosen/notes.md"),
        (0, "chosen/deeper/7.jpg"),
        (0, "chosen/9.txt"),
        (0, "rejected/1.txt"),
        (1, "readme.md"),
        (1, "3/third.jpg"),
        (1, "1/third.jpg"),
        (1, "1/deeper/chosen.jpg"),
    ],
)
def test_every_file_that_is_not_read_is_reported(layout, name, tmp_path):
    folder = layouts(tmp_path, ["1", "2"])[layout]
    put(folder / name, 0)
    data, said = noted(folder)
    assert len(data) == 2
    assert "1 files or folders of other kinds not read: " in said


@pytest.mark.parametrize("suffix", [".eps", ".heic", ".psd", ".tga", ".svg"])
def test_a_picture_of_a_kind_that_is_not_read_is_named_and_no_missing_partner(suffix, tmp_path):
    folder = layouts(tmp_path, ["1", "2"])[0]
    (folder / "chosen/1.jpg").unlink()
    (folder / f"chosen/1{suffix}").write_bytes(b"%!PS-Adobe-3.0")
    _, said = noted(folder, max_bad_share=1)
    assert f"chosen/1{suffix}: PostScript, a program, is not read" in said


def test_metadata_lines_without_an_image_are_reported(tmp_path):
    folder = layouts(tmp_path, ["1", "2"])[0]
    jsonl(folder / "metadata.jsonl", [{"file_name": "1.jpg", "text": "t"}, {"file_name": "3.jpg", "text": "t"}])
    assert "not read: 3.jpg (in the metadata)" in noted(folder)[1]


def test_two_layouts_and_two_lists_are_refused(tmp_path):
    folder = layouts(tmp_path, ["1"])[0]
    (folder / "metadata.jsonl").write_text("{}\n")
    (folder / "metadata.csv").write_text("file_name,text\n1.jpg,a\n")
    with pytest.raises(ValueError, match=r"has metadata\.jsonl and metadata\.csv: remove"):
        load_pairs(folder)
    (folder / "metadata.jsonl").unlink()
    put(folder / "winner/1.jpg", 0)
    put(folder / "loser/1.jpg", 0)
    with pytest.raises(ValueError, match="has the sides chosen/rejected and winner/loser"):
        load_pairs(folder)


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
@pytest.mark.parametrize("place", ["", "train/"])
def test_a_folder_of_pictures_with_metadata_is_read_as_it_is_written(name, place, tmp_path):
    """In the layout of ``datasets``, which would add nulls, and drop what is not listed."""
    for number in range(4):
        put(tmp_path / f"{place}{number}.jpg", number)
    rows = [{"file_name": f"{i}.jpg", "prompt": text, "liked": i} for i, text in enumerate(("None", "007"))]
    if name.endswith("csv"):
        lines = ["file_name,prompt,liked", *(",".join(map(str, row.values())) for row in rows)]
        (tmp_path / f"{place}{name}").write_text("\n".join(lines))
    else:
        jsonl(tmp_path / f"{place}{name}", [{**row, "metadata": {"k": ["left of", 0]}} for row in rows])
    with pytest.warns(DataWarning, match=r"2 pictures without a line in the metadata not read: 2\.jpg, 3\.jpg"):
        data = load_labelled(tmp_path)
    assert [(data[i].prompt.text, data[i].liked, data[i].image.read()) for i in range(2)] == [
        ("None", False, encoded(0)),
        ("007", True, encoded(1)),
    ]
    assert name.endswith("csv") or data[0].prompt.metadata == {"k": ["left of", 0]}


def test_columns_that_name_files_are_images(tmp_path):
    for number in range(2):
        put(tmp_path / f"{number}.jpg", number)
    row = {"chosen_file_name": "0.jpg", "rejected_file_name": "1.jpg", "prompt": "p"}
    jsonl(tmp_path / "metadata.jsonl", [row])
    assert contents(load_pairs(tmp_path)[0]) == [encoded(0), encoded(1)]


def test_check_counts_what_is_not_read(tmp_path, capsys):
    folder = layouts(tmp_path, ["1", "2"])[0]
    put(folder / "chosen/._1.jpg", 0)
    assert main(["check", str(folder)]) == 0
    assert "1 hidden or system files not read: chosen/._1.jpg" in capsys.readouterr().out
    assert main(["check", str(folder), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["not_read"]) == 1
    assert main(["relabel", str(folder), "--rewards", "brightness"]) == 0
    assert "1 hidden or system files not read: chosen/._1.jpg" in capsys.readouterr().out
    assert main(["check", str(folder)]) == 0
    assert ".labels" not in capsys.readouterr().out, "labels of our own are no clutter"


@pytest.mark.parametrize("layout", [0, 1, 2])
def test_a_text_is_no_link_to_a_file_elsewhere(layout, tmp_path):
    """It would go to the reward as a prompt, wherever that is served."""
    folder = [*layouts(tmp_path, ["1", "2"]), tmp_path / "sides/chosen"][layout]
    secret, text = tmp_path / "secret.txt", folder / ["chosen/1.txt", "1/prompt.txt", "1.txt"][layout]
    secret.write_text("a secret")
    text.unlink()
    text.symlink_to(secret)
    with pytest.raises(ValueError, match=r"(1|prompt)\.txt: lies outside the folder of the data"):
        load_pairs(folder) if layout < 2 else list(read(str(folder)))
    if layout < 2:
        data = load_pairs(folder, settings=PreferenceDataConfig(allow_outside=True))
        assert data[0].prompt.text == "a secret"
    else:
        assert next(read(str(folder), allow_outside=True)).prompt.text == "a secret"


def test_two_lines_of_metadata_for_one_picture_are_refused(tmp_path):
    for side in ("chosen", "rejected"):
        put(tmp_path / side / "1.jpg", 1)
    jsonl(tmp_path / "metadata.jsonl", [{"file_name": "1.jpg", "text": "a"}, {"file_name": "1.jpg", "text": "b"}])
    with pytest.raises(ValueError, match=r"two lines for 1\.jpg: remove one"):
        load_pairs(tmp_path)
