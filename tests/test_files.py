"""Users' files: bounded reads, UTF-8 with file and line, natural order, short messages."""

import os

import pytest

from diffalign import files
from diffalign.commands.image_sources import read
from diffalign.config import load_yaml
from diffalign.data.folders import folder_rows
from diffalign.data.prompts import load_prompts
from diffalign.data.records import Records
from tests.data.preference_files import encoded


def test_names_are_ordered_as_file_managers_do():
    names = ["a10", "a2", "A1", "b", "2", "10", "1.5", "a2b", "é1", "", "a02"]
    assert sorted(names, key=files.natural) == ["", "1.5", "2", "10", "A1", "a02", "a2", "a2b", "a10", "b", "é1"]
    assert sorted(["x²1", "x1"], key=files.natural) == ["x1", "x²1"], "a superscript is no digit to count by"


def test_messages_are_short_and_show_no_control_characters():
    text = "\x1b[2J" + "a" * 10**6 + "\nend"
    short = files.shorten(text)
    assert len(short) <= 200
    assert "1,000,008 characters" in short
    assert "\x1b" not in short + files.printable(text)
    assert short.endswith("\\nend")
    assert files.shorten("plain é 🦊") == "plain é 🦊"
    assert files.shorten("\0" * 200).__len__() <= 200
    whole = files.bounded("first\n" + "x" * 10**6 + "\nlast")
    assert len(whole) <= files.MAX_MESSAGE
    assert whole.startswith("first")
    assert whole.endswith("last")
    assert files.some("abcdef") == "a, b, c and 3 more"


def text_of(path):
    return files.read_text(path)


def captions(path):
    folder = path.parent / "pairs"
    for side in ("chosen", "rejected"):
        (folder / side).mkdir(parents=True)
        (folder / side / "a.png").write_bytes(encoded(0))
    os.replace(path, folder / "chosen/a.txt")
    return folder_rows(folder)[0][0]["prompt"]


def caption_of_score(path):
    (path.parent / "a.png").write_bytes(encoded(0))
    os.replace(path, path.parent / "a.txt")
    return next(read(str(path.parent / "a.png"))).prompt.text


def prompts(path):
    os.replace(path, path.with_name("a.txt"))
    return "\n".join(prompt.text for prompt in load_prompts(path.with_name("a.txt")))


READERS = [text_of, captions, caption_of_score, prompts]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_marks_and_line_ends_are_no_part_of_a_text(reader, mark, end, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(mark + b"a red" + end + "Bär \u2028 🦊".encode() + end)
    assert reader(path).strip() == "a red\nBär \u2028 🦊"


@pytest.mark.parametrize("reader", READERS)
def test_bytes_that_are_not_utf8_are_named_by_file_and_line(reader, tmp_path):
    (tmp_path / "file").write_bytes(b"fine\r\n" + "ein Bär\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"(file|a\.txt), line 2: not UTF-8 .*; save the file as UTF-8"):
        reader(tmp_path / "file")


@pytest.mark.parametrize("reader", READERS)
def test_utf16_is_named(reader, tmp_path):
    (tmp_path / "file").write_bytes("ein Bär".encode("utf-16"))
    with pytest.raises(ValueError, match="not UTF-8 but UTF-16"):
        reader(tmp_path / "file")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.yaml", "a.txt"])
def test_a_pipe_is_no_text_file(name, tmp_path):
    """Opening it would wait for a writer."""
    os.mkfifo(tmp_path / name)
    readers = {".jsonl": Records, ".csv": Records, ".yaml": load_yaml, ".txt": load_prompts}
    path = tmp_path / name
    with pytest.raises(ValueError, match="not a regular file"):
        readers[path.suffix]([path] if readers[path.suffix] is Records else path)


def test_configurations_are_text_like_others(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\r\nb: [x,\r\n  y]\r\n")
    assert load_yaml(path) == {"a": 1, "b": ["x", "y"]}
    path.write_bytes("a: 1\n# Bär\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.yaml, line 2: not UTF-8"):
        load_yaml(path)
    for text in ("[" * 10**5, "a: " + "x" * 10**5 + ": }"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"a\.yaml is not a YAML file") as caught:
            load_yaml(path)
        assert len(str(caught.value)) < files.MAX_MESSAGE


def test_a_text_of_megabytes_is_no_caption(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x" * (files.MAX_TEXT + 1))
    with pytest.raises(ValueError, match=r"a\.txt: larger than 1,048,576 bytes"):
        files.read_text(tmp_path / "a.txt")
