import json

import pytest

from diffalign.data.prompts import load_prompts
from diffalign.structures import Prompt


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_text_lines_survive_marks_line_ends_and_spaces(tmp_path):
    path = write(tmp_path, "a.txt", b"\xef\xbb\xbf a cat \r\n\r\n  \t\r\na dog\na cat")
    assert load_prompts(path) == [Prompt("a cat"), Prompt("a dog"), Prompt("a cat")]


def test_json_lines_carry_everything_else_as_metadata(tmp_path):
    spec = {"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}]}
    lines = [{"prompt": " a red circle ", **spec}, {"text": "a dog", "ocr": "hi"}, {"prompt": "a dog"}]
    path = write(tmp_path, "a.jsonl", "\ufeff" + "\r\n\r\n".join(map(json.dumps, lines)))
    assert load_prompts(str(path)) == [Prompt("a red circle", spec), Prompt("a dog", {"ocr": "hi"}), Prompt("a dog")]


def test_a_separator_inside_a_json_text_does_not_cut_the_line(tmp_path):
    path = write(tmp_path, "a.jsonl", json.dumps({"prompt": "one\u2028two\x85three"}, ensure_ascii=False))
    assert [p.text for p in load_prompts(path)] == ["one\u2028two\x85three"]


def test_prompt_wins_over_text_which_is_then_metadata(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"text": "shown in the image", "prompt": "a sign"}')
    assert load_prompts(path) == [Prompt("a sign", {"text": "shown in the image"})]


def test_limit_reads_no_further(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"prompt": "a"}\n{"prompt": "b"}\nbroken')
    assert [p.text for p in load_prompts(path, limit=2)] == ["a", "b"]
    with pytest.raises(ValueError, match="limit must be at least 1"):
        load_prompts(path, limit=0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', r"bad\.jsonl, line 3: bad JSON .* write one object per line"),
        ('["a"]', r"line 3: expected an object"),
        ('{"caption": "a", "tag": 1}', r'line 3: no "prompt" among caption, tag; add'),
        ("{}", r"line 3: no \"prompt\" among no keys"),
        ('{"prompt": "  "}', r"line 3: .*not empty"),
        ('{"prompt": 7}', r"line 3: .*not empty, got 7"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = write(tmp_path, "bad.jsonl", '{"prompt": "fine"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        load_prompts(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xef\xbb\xbf\r\n \n", "holds no prompt"),
        ("a.jsonl", b"", "holds no prompt"),
        ("a.tsv", b"prompt\na", r"unknown suffix '\.tsv'; rename it to one of \.txt, \.jsonl, \.csv, \.parquet"),
        ("a.txt", "é".encode("utf-16"), "not UTF-8"),
    ],
)
def test_an_unusable_file_is_named(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_prompts(write(tmp_path, name, content))
    assert str(tmp_path / name) in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt: check the path"):
        load_prompts(tmp_path / "nowhere.txt")
