"""Progress files: complete rows, or an error that names file and line."""

import pytest

from diffalign.commands.resume import read_rows, write_or_check_settings

BROKEN = [b"\0" * 40, b'{"a": ', b"[1]", b"7", b"\xff\xfe", b"[" * 200_000]


def test_an_incomplete_last_line_is_skipped(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'{"a": 1}\n{"a"')
    assert read_rows(tmp_path / "rows.jsonl") == [{"a": 1}]


@pytest.mark.parametrize("line", BROKEN, ids=range(len(BROKEN)))
def test_a_damaged_line_is_named(line, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2 is damaged .*delete this line"):
        read_rows(tmp_path / "rows.jsonl")
    (tmp_path / "settings.json").write_bytes(line)
    with pytest.raises(ValueError, match=r"settings\.json, line 1 is damaged"):
        write_or_check_settings(tmp_path / "settings.json", {"a": 1})
