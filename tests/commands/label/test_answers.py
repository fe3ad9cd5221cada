"""The file of answers: complete lines on disk, whatever happens."""

import errno
import json
import os

import pytest

from diffalign.commands.label import answers as module
from diffalign.commands.label.answers import AnswerLog, rater_name
from tests.commands.label.world import answer


@pytest.fixture
def path(tmp_path):
    return tmp_path / "answers.jsonl"


def standing(path):
    with AnswerLog(path) as log:
        return [(a.rater, a.pair, a.choice) for a in log.answers()]


def test_answers_are_on_disk_when_add_returns(path, monkeypatch):
    synced = []
    monkeypatch.setattr(module.os, "fsync", lambda handle: synced.append(len(path.read_bytes())))
    with AnswerLog(path) as log:
        for number in range(3):
            log.add(answer(number))
            assert synced[-1] == len(path.read_bytes())
    assert standing(path) == [("Ada", f"pair {number}", "first") for number in range(3)]


@pytest.mark.parametrize("keep", [0, 1, 40, -1])
def test_a_line_cut_by_a_crash_is_removed_and_the_next_answer_is_whole(path, keep):
    with AnswerLog(path) as log:
        log.add(answer(0))
        before = path.read_bytes()
        log.add(answer(1))
    line = path.read_bytes()[len(before) :]
    path.write_bytes(before + line[:keep])
    with AnswerLog(path) as log:
        log.add(answer(2))
    assert standing(path) == [("Ada", "pair 0", "first"), ("Ada", "pair 2", "first")]
    assert all(json.loads(line) for line in path.read_bytes().splitlines())


@pytest.mark.parametrize("line", [b"{nonsense\n", b'{"rater": "Ada"}\n', b"[]\n", b"\xff\n"])
def test_a_damaged_line_elsewhere_is_an_error_that_names_it(path, line):
    with AnswerLog(path) as log:
        log.add(answer(0))
    path.write_bytes(path.read_bytes() + line + path.read_bytes())
    with pytest.raises(ValueError, match=r"line 2 .*delete this line"):
        AnswerLog(path)


def test_an_unknown_choice_is_an_error(path):
    with AnswerLog(path) as log:
        log.add(answer(0))
    path.write_text(path.read_text().replace('"first"', '"forst"'))
    with pytest.raises(ValueError, match=r"line 1: choice 'forst' is not one of first"):
        AnswerLog(path)


def test_undo_takes_back_the_last_answer_of_that_rater_only(path):
    with AnswerLog(path) as log:
        log.add(answer(0))
        log.add(answer(1))
        log.add(answer(2, rater="Bob"))
        assert log.undo("ada").pair == "pair 1"
        assert log.undo("Cleo") is None
    assert standing(path) == [("Ada", "pair 0", "first"), ("Bob", "pair 2", "first")]
    with AnswerLog(path) as log:
        assert log.undo("Ada").pair == "pair 0"
        assert log.undo("Ada") is None
    assert path.read_text().count("undo") == 2  # nothing that was written changed


@pytest.mark.parametrize("fault", ["part", "full", "fsync"])
def test_a_full_disk_leaves_no_part_of_a_line(path, fault, monkeypatch):
    real = os.write

    def failing(handle, content):
        real(handle, content[: len(content) if fault == "fsync" else 30])
        if fault == "part":
            return 30
        raise OSError(errno.ENOSPC, "No space left on device")

    with AnswerLog(path) as log:
        log.add(answer(0))
        with monkeypatch.context() as patch:
            patch.setattr(module.os, "fsync" if fault == "fsync" else "write",
                          (lambda handle: failing(handle, b"x")) if fault == "fsync" else failing)  # fmt: skip
            with pytest.raises(OSError, match=r"space|part"):
                log.add(answer(1))
        assert log.get("Ada", "pair 1") is None
        log.add(answer(2))
    assert standing(path) == [("Ada", "pair 0", "first"), ("Ada", "pair 2", "first")]


@pytest.mark.parametrize("name", ["", "  ", "a\x00b", "x" * 81, None, 7, "\ud800", "a\u202eb"])
def test_names_that_cannot_be_told_apart_are_refused(name):
    with pytest.raises(ValueError, match="the name of a rater has 1 to 80"):
        rater_name(name)


def test_spellings_of_one_name_are_one_rater(path):
    assert rater_name("  Zo\u0065\u0308 \t B ") == "Zo\u00eb B"
    with AnswerLog(path) as log:
        log.add(answer(0, rater="ADA"))
        assert log.get("ada", "pair 0").rater == "ADA"
