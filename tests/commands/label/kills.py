"""Sittings of two raters whose server is killed at a random moment."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

from tests.commands.label.world import BLUE, RED, ask

COUNT = 150  # pairs
PRELOADED = ("diffalign.commands.label.command", "uvicorn.lifespan.off", "uvicorn.loops.auto",
             "uvicorn.protocols.http.auto", "uvicorn.protocols.websockets.auto")  # fmt: skip
RULES = {"Ada": "left", "Bob": "right"}  # what each rater always answers


def write_pairs(folder: Path) -> Path:
    """A table of pairs of two images."""
    for name, content in (("a.png", RED), ("b.png", BLUE)):
        (folder / name).write_bytes(content)
    rows = [{"prompt": f"prompt {i}", "image_0": "a.png", "image_1": "b.png"} for i in range(COUNT)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "pairs.jsonl"


def serve(pairs: str, folder: str, send) -> None:
    """Serve as the command does; the modules are imported already, where a process is forked for it."""
    from diffalign.commands.label import command
    from diffalign.commands.label.config import LabelConfig

    command.say = send
    command.run(LabelConfig(models=(pairs,), output_dir=Path(folder), port=0))


@contextmanager
def forked(pairs: Path, folder: Path):
    """A server in a process that is forked from one with its modules."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED])
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(str(pairs), str(folder), theirs.send))
    process.start()
    assert ours.poll(60)
    yield process.pid, int(re.search(r":(\d+)/", ours.recv())[1])
    process.join()


@contextmanager
def command(pairs: Path, folder: Path):
    """The command itself."""
    argv = [sys.executable, "-m", "diffalign", "label", str(pairs), "--output_dir", str(folder), "--port", "0"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    yield process.pid, int(re.search(r":(\d+)/", line)[1])
    process.wait()
    process.stdout.close()


class Rater:
    """A page: it keeps an answer that was not acknowledged, and sends it again to the next server."""

    def __init__(self, name: str) -> None:
        self.name, self.kept, self.acknowledged = name, None, []

    def work(self, port: int) -> None:
        """Answer until the server is gone."""
        try:
            while True:
                if self.kept is None:
                    pair = ask(port, "/api/next", {"rater": self.name})[2]["pairs"][0]
                    body = {"rater": self.name, "token": pair["token"], "pick": RULES[self.name], "seconds": 1}
                    self.kept = (pair["prompt"], body)
                prompt, body = self.kept
                status, _, reply = ask(port, "/api/answer", body)
                assert status == 200, reply
                self.acknowledged.append(prompt)
                self.kept = None
        except (OSError, HTTPException):
            pass


def sit(start, pairs: Path, folder: Path, raters: list[Rater], seed: int) -> None:
    """Let both raters work at once, and kill the server at a moment that the seed decides."""
    with start(pairs, folder) as (pid, port):
        ask(port, "/")  # from now on it answers
        threads = [threading.Thread(target=rater.work, args=(port,)) for rater in raters]
        for thread in threads:
            thread.start()
        time.sleep(random.Random(seed).uniform(0.0, 0.15))
        os.kill(pid, signal.SIGKILL)
        for thread in threads:
            thread.join()


def check(folder: Path, raters: list[Rater]) -> int:
    """Check the file against what the raters know; returns the number of answers."""
    *lines, _ = (folder / "answers.jsonl").read_bytes().split(b"\n")
    rows = [json.loads(line) for line in lines]
    stored = Counter((row["rater"], row["prompt"]) for row in rows)
    assert set(stored.values()) <= {1}  # none twice
    for rater in raters:
        own = {prompt for name, prompt in stored if name == rater.name}
        assert set(rater.acknowledged) <= own  # none lost
        under_way = {rater.kept[0]} if rater.kept else set()
        assert own - set(rater.acknowledged) <= under_way
    for row in rows:
        side = row["left"] if RULES[row["rater"]] == "left" else 1 - row["left"]
        assert row["choice"] == ("first", "second")[side]  # each answer is its rater's
    return len(rows)
