"""Tests of this folder run in a process of their own, in which the strict device is torch's accelerator.

A device can be registered only before a process's first backward pass, and would be every other test's device too. So
the tests are collected here and run there: the other process is pytest as well, and sends back its reports.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from _pytest.runner import runtestprotocol

from tests.device import strict

HERE = Path(__file__).parent
VARIABLE = "STRICT_DEVICE_PIPE"
CHILD = VARIABLE in os.environ
LIMIT = 600  # seconds of a test
REMOTE = pytest.StashKey["Remote"]()

if CHILD:
    strict.install()


class Remote:
    """The process with the device."""

    def __init__(self, config: pytest.Config) -> None:
        self.config, self.output = config, tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process)
        self.connection, theirs = Pipe()
        command = [sys.executable, "-m", "pytest", str(HERE), "-p", "no:xdist", "-p", "no:cacheprovider"]
        command += ["-o", "addopts=-q --import-mode=importlib"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        self.process = subprocess.Popen(
            [*command, "--rootdir", str(config.rootpath)],
            cwd=config.rootpath,
            env=environment | {VARIABLE: str(theirs.fileno())},
            pass_fds=[theirs.fileno()],
            stdout=self.output,
            stderr=subprocess.STDOUT,
        )
        theirs.close()

    def run(self, item: pytest.Item, nextitem: pytest.Item | None) -> list[Any]:
        """Return the reports of a test."""
        following = nextitem.nodeid if nextitem is not None and is_ours(nextitem) else None
        try:
            self.connection.send((item.nodeid, following))
            if not self.connection.poll(LIMIT):
                raise EOFError
            found = self.connection.recv()
        except (EOFError, OSError):
            self.process.kill()
            code = self.process.wait()
            self.output.seek(0)
            text = f"the process of the strict device died or hung (exit code {code}):\n{self.output.read()[-3000:]}"
            return [pytest.TestReport(item.nodeid, item.location, {}, "failed", text, "call")]
        return [self.config.hook.pytest_report_from_serializable(config=self.config, data=data) for data in found]

    def close(self) -> None:
        """End the process."""
        if self.process.poll() is None:
            self.connection.send((None, None))
            self.process.wait(timeout=60)


def is_ours(item: pytest.Item) -> bool:
    return HERE in item.path.parents


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if strict.compiler_missing():
        for item in filter(is_ours, items):
            item.add_marker(pytest.mark.skip(reason="needs a C++ compiler"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    if CHILD or not is_ours(item) or strict.compiler_missing():
        return None
    remote = item.config.stash.get(REMOTE, None)
    if remote is None or remote.process.poll() is not None:
        item.config.stash[REMOTE] = Remote(item.config)
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in item.config.stash[REMOTE].run(item, nextitem):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """Run in the child the tests that the parent names."""
    if not CHILD:
        return None
    items = {item.nodeid: item for item in session.items}
    connection: Connection = Connection(int(os.environ[VARIABLE]))
    while (name := (names := connection.recv())[0]) is not None:
        item, following = items[name], items.get(names[1])
        reports = runtestprotocol(item, log=False, nextitem=following)
        serialise = session.config.hook.pytest_report_to_serializable
        connection.send([serialise(config=session.config, report=report) for report in reports])
    return True


def pytest_sessionfinish(session: pytest.Session) -> None:
    if (remote := session.config.stash.get(REMOTE, None)) is not None:
        remote.close()


@pytest.fixture(params=[True, False], ids=["float64", "no_float64"])
def both_precisions(request):
    """The device with float64, as CUDA's, and without it, as mps."""
    strict.set_float64(request.param)
    yield request.param
    strict.set_float64(True)
