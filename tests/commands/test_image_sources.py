"""Images to score: order of folders, and a warning for every file that is not read."""

import json

import pytest
from PIL import Image

from diffalign.cli import main
from diffalign.commands.image_sources import read
from diffalign.data.validation import DataWarning
from tests.data.preference_files import encoded, jsonl, picture


def put(path, number=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(number))


def names(folder):
    return [item.name.removeprefix(f"{folder}/") for item in read(str(folder))]


def test_pictures_come_in_natural_order_of_their_paths(tmp_path):
    for name in ("10.jpg", "9.jpg", "b/2.JPG", "b/11.jpg", "a10/1.jpg", "a9/1.jpg"):
        put(tmp_path / name)
    assert names(tmp_path) == ["9.jpg", "10.jpg", "a9/1.jpg", "a10/1.jpg", "b/2.JPG", "b/11.jpg"]


def test_clutter_and_other_files_are_counted(tmp_path):
    for name in ("1.jpg", "._1.jpg", ".ipynb_checkpoints/1.jpg", "Thumbs.db", "notes.md", "2.txt"):
        put(tmp_path / name)
    (tmp_path / "1.txt").write_text("a caption")
    with pytest.warns(DataWarning) as caught:
        assert names(tmp_path) == ["1.jpg"]
    said = str(caught[0].message)
    assert "3 hidden or system files not read: " in said
    assert "2 files or folders of other kinds not read: notes.md, 2.txt" in said or "2.txt, notes.md" in said


def test_two_pictures_with_one_text_are_refused(tmp_path):
    put(tmp_path / "1.jpg")
    put(tmp_path / "1.png")
    assert names(tmp_path) == ["1.jpg", "1.png"]
    (tmp_path / "1.txt").write_text("of which?")
    with pytest.raises(ValueError, match=r"1\.jpg and 1\.png share one text, 1\.txt: rename one"):
        names(tmp_path)


def test_a_picture_that_cannot_be_read_is_named_and_counted(tmp_path, capsys):
    put(tmp_path / "1.jpg")
    (tmp_path / "2.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0")
    (tmp_path / "3.heic").write_bytes(b"\0\0\0\x18ftypheic")
    command = ["score", str(tmp_path), "--prompt", "x", "--rewards", "brightness"]
    assert main([*command, "--output_dir", str(tmp_path.parent / f"{tmp_path.name}-out")]) == 0
    said = capsys.readouterr().out
    assert "2.eps cannot be read as a picture: PostScript, a program, is not read" in said
    assert "3.heic cannot be read as a picture: HEIC is not read" in said
    assert "2 of 3 pictures cannot be read" in said


@pytest.mark.parametrize("listing", ["metadata.jsonl", "metadata.csv"])
def test_images_missing_in_the_metadata_are_reported(listing, tmp_path):
    for number in range(3):
        put(tmp_path / f"{number}.jpg", number)
    if listing.endswith("csv"):
        (tmp_path / listing).write_text("file_name,text\n1.jpg,None\n")
    else:
        jsonl(tmp_path / listing, [{"file_name": "1.jpg", "text": "None"}])
    with pytest.warns(DataWarning, match=r"2 pictures without a line in the metadata not read: 0\.jpg, 2\.jpg"):
        items = list(read(str(tmp_path)))
    assert [item.prompt.text for item in items] == ["None"]


def test_a_caption_beside_a_picture_is_text_like_others(tmp_path):
    picture(0).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert next(read(str(tmp_path))).prompt.text == "one\ntwo"
    (tmp_path / "a.txt").write_bytes("Bär".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.txt, line 1: not UTF-8"):
        list(read(str(tmp_path)))


def test_escapes_in_names_do_not_reach_the_terminal(tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/\x1b[2Jgone.png").write_bytes(b"no picture")
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures/a.png")
    command = ["score", str(tmp_path / "pictures"), "--prompt", "x", "--rewards", "brightness"]
    assert main([*command, "--output_dir", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert "\x1b[2J" not in said.out + said.err
    rows = [json.loads(line) for line in (tmp_path / "out/scores.jsonl").open()]
    assert sum("error" in row for row in rows) == 1
