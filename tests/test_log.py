import logging
import os
import sys
import warnings

import pytest
from accelerate import PartialState
from tqdm.auto import tqdm

from diffalign.log import LOG_FILE, FileHandler, TerminalHandler, get_logger, log_to_file


@pytest.fixture(params=[True, False], ids=["with accelerate's state", "before it"])
def state(request):
    known = dict(PartialState._shared_state)
    PartialState._shared_state.clear()
    if request.param:
        PartialState(cpu=True)
    yield
    PartialState._shared_state.clear()
    PartialState._shared_state.update(known)


def lines(folder):
    return (folder / LOG_FILE).read_text(encoding="utf-8").splitlines()


def test_lines_are_plain_on_the_terminal_and_dated_in_the_file(tmp_path, capsys, state):
    logger = get_logger("diffalign.runtime.loop")
    with log_to_file(tmp_path):
        logger.info("resumed at 50%% of {x}")
        logger.warning("a\n  slow disk")
        logger.debug("unseen")
    logger.info("afterwards")
    printed = capsys.readouterr()
    assert printed.out == "resumed at 50%% of {x}\nafterwards\n"
    assert printed.err == "warning: a slow disk\n"
    first, *rest = lines(tmp_path)
    assert first.endswith(" INFO diffalign.runtime.loop: resumed at 50%% of {x}")
    assert first[:4].isdigit()
    assert rest[0].endswith(" WARNING diffalign.runtime.loop: a")


def test_a_second_run_appends(tmp_path):
    for word in ("one", "two"):
        with log_to_file(tmp_path):
            get_logger("diffalign.a").info(word)
    assert [line.rpartition(" ")[2] for line in lines(tmp_path)] == ["one", "two"]


def test_warnings_are_in_the_file_and_still_seen_by_who_records_them(tmp_path):
    before = warnings.showwarning
    with pytest.warns(UserWarning, match=r"a gradient\sspike"), log_to_file(tmp_path):
        warnings.warn("a gradient\nspike", stacklevel=1)
    assert lines(tmp_path)[0].endswith(" WARNING UserWarning: a gradient spike")
    assert warnings.showwarning is before


def test_other_processes_are_silent_unless_asked(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(PartialState, "_shared_state", {})
    monkeypatch.setenv("RANK", "1")
    logger = get_logger("diffalign.a")
    with log_to_file(tmp_path):
        logger.info("main only")
        logger.info("everywhere", main_process_only=False)
    assert capsys.readouterr().out == "[rank 1] everywhere\n"
    assert not (tmp_path / LOG_FILE).exists()


@pytest.mark.parametrize(
    "obstacle", [lambda path: path.mkdir(), lambda path: os.mkfifo(path), lambda path: path.symlink_to("/etc/x")]
)
def test_what_cannot_be_a_log_file_does_not_stop_or_block_a_run(tmp_path, capsys, obstacle):
    obstacle(tmp_path / LOG_FILE)
    with log_to_file(tmp_path):
        get_logger("diffalign.a").info("on it goes")
    assert capsys.readouterr().out == "on it goes\n"


def test_a_folder_that_disappears_costs_lines_only(tmp_path, capsys):
    with log_to_file(tmp_path / "gone"):
        get_logger("diffalign.a").info("on it goes")
    assert "on it goes" in capsys.readouterr().out


def test_text_that_no_encoding_holds_is_printed_and_kept(tmp_path, capsys):
    # Handlers alone: what captures the records of loggers may not hold such text.
    record = logging.makeLogRecord({"msg": "\udcff on it goes", "levelno": logging.INFO})
    TerminalHandler().emit(record)
    FileHandler(tmp_path / LOG_FILE).emit(record)
    assert "on it goes" in capsys.readouterr().out
    assert "on it goes" in (tmp_path / LOG_FILE).read_text()


def test_a_line_does_not_cut_a_progress_bar(capsys):
    with tqdm(total=2, file=sys.stderr, ascii=True, mininterval=0) as bar:
        bar.update()
        get_logger("diffalign.a").warning("look")
    assert "\rwarning: look\n" in capsys.readouterr().err.replace(" " * 2, "").replace("\r ", "\r")


def test_lines_are_printed_once_whatever_the_application_logs(capsys):
    handler = logging.StreamHandler(sys.stdout)
    logging.getLogger().addHandler(handler)
    try:
        get_logger("diffalign.a").info("once")
        get_logger("diffalign.b").info("again")
    finally:
        logging.getLogger().removeHandler(handler)
    assert capsys.readouterr().out == "once\nagain\n"
