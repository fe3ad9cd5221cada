"""Nobody has to read what a run prints."""

import io
import os
import subprocess
import sys
import time

import pytest

from diffalign.runtime.output import SteadyStream, emit, steady_output
from tests.conftest import ROOT
from tests.reliability import faults
from tests.reliability.forks import Child


def piped():
    ends = os.pipe()
    return ends[0], SteadyStream(os.fdopen(ends[1], "w"))


def test_a_closed_pipe_drops_text_and_leads_nowhere_afterwards():
    reader, stream = piped()
    stream.write("read\n")
    assert os.read(reader, 100) == b"read\n"
    os.close(reader)
    for _ in range(3):
        assert stream.write("lost\n") == 5
        stream.flush()
    os.write(stream.fileno(), b"what a library writes")
    stream.close()


def test_a_reader_that_has_stopped_costs_a_second_once():
    reader, stream = piped()
    started = time.perf_counter()
    for _ in range(2000):
        stream.write("x" * 99 + "\n")
    assert time.perf_counter() - started < 5
    os.read(reader, 1 << 20)
    stream.write("again\n")
    assert os.read(reader, 1 << 20).endswith(b"again\n")


class Broken(io.StringIO):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error

    flush = write


@pytest.mark.parametrize("error", [BrokenPipeError(32, "x"), OSError(5, "x"), OSError(28, "x"), ValueError("closed")])
def test_whatever_a_stream_raises_is_no_matter(error):
    stream = SteadyStream(Broken(error))
    assert stream.write("text") == 4
    with io.StringIO() as closed:
        pass
    SteadyStream(closed).write("text")


def test_text_that_the_terminal_cannot_show_is_escaped():
    raw = io.BytesIO()
    stream = SteadyStream(io.TextIOWrapper(raw, encoding="ascii"))
    stream.write("ü")
    stream.flush()
    assert raw.getvalue() == b"\\xfc"


def test_streams_are_themselves_again_after_it(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with steady_output():
        print("to nobody")
    before = sys.stderr
    with steady_output(), steady_output():
        assert isinstance(sys.stderr, SteadyStream)
        emit("from a handler\n")
    assert sys.stderr is before


@pytest.mark.parametrize("reader", faults.READERS)
def test_a_run_ends_well_whatever_reads_it(reader, tmp_path):
    child = Child(tmp_path, faults.to_nobody, str(tmp_path), reader)
    assert child.wait() == 0, child.text
    assert (tmp_path / "done.txt").read_text() == "8"
    log = (tmp_path / "metrics.jsonl").read_text()
    assert all(line.startswith("{") for line in log.splitlines()), "no message went into a file"


SHELLS = {"head": "2>&1 | head -1", "closed": ">&- 2>&- <&-", "full disk": ">/dev/full 2>/dev/full"}


@pytest.mark.slow
@pytest.mark.parametrize("shell", SHELLS)
def test_a_run_of_a_shell_ends_well_whatever_reads_it(shell, tmp_path):
    run = f'{sys.executable} -c "import sys; from tests.reliability.null import run; run(sys.argv[1])" {tmp_path}/run'
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = ["bash", "-c", f"set -o pipefail; {run} {SHELLS[shell]}"]
    assert subprocess.run(command, cwd=ROOT, env=environment, timeout=100).returncode == 0
    assert (tmp_path / "run/done.txt").read_text() == "8"
