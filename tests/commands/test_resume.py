"""Rows of a long command: whole, or an error that names file and line."""

import pytest

from diffalign.commands.resume import same_or_new, whole_rows

BROKEN = [b"\0" * 40, b'{"a": ', b"[1]", b"7", b"\xff\xfe", b"[" * 200_000]


def test_a_last_line_that_was_cut_is_left_out(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'{"a": 1}\n{"a"')
    assert whole_rows(tmp_path / "rows.jsonl") == [{"a": 1}]


@pytest.mark.parametrize("line", BROKEN, ids=range(len(BROKEN)))
def test_a_damaged_line_is_named(line, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2 is damaged .*delete this line"):
        whole_rows(tmp_path / "rows.jsonl")
    (tmp_path / "settings.json").write_bytes(line)
    with pytest.raises(ValueError, match=r"settings\.json, line 1 is damaged"):
        same_or_new(tmp_path / "settings.json", {"a": 1})
