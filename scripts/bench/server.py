"""Load-test the reward server on this machine: many requests at once, silent clients, and slow clients.

    python scripts/bench/server.py            # starts the server itself, in a process of its own
    python scripts/bench/server.py --url http://127.0.0.1:8000 --reward brightness

Prints a line per trial: requests answered, reset and refused, requests per second, the slowest answer, and the threads
and memory of the server's process.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import torch
import urllib3

sys.path.insert(0, str(Path(__file__).parents[2]))  # a clone needs no installation

from diffalign.rewards.support.http_client import encode_image

SERVER = "from diffalign.cli import main; main({arguments!r})"


def body(reward: str, side: int = 64) -> dict[str, object]:
    """Build a request for one random image."""
    image = torch.rand(3, side, side, generator=torch.Generator().manual_seed(0))
    return {"reward": reward, "prompts": ["a red circle"], "metadata": [{}], "images": [encode_image(image)]}


def load(url: str, reward: str, total: int, in_flight: int, timeout: float = 60.0) -> tuple[Counter[str], float, float]:
    """Send ``total`` requests, ``in_flight`` at a time; return their outcomes, total seconds and the slowest answer.

    Every request has a connection of its own, as clients on many machines would.
    """
    content = body(reward)

    def one(_: int) -> tuple[str, float]:
        begin = time.monotonic()
        try:
            with urllib3.PoolManager() as pool:
                reply = pool.request("POST", f"{url}/score", json=content, retries=False, timeout=timeout)
            ended = "answered" if reply.status == 200 else f"status {reply.status}"
        except urllib3.exceptions.HTTPError as error:
            ended = "timed out" if isinstance(error, urllib3.exceptions.TimeoutError) else "reset"
        return ended, time.monotonic() - begin

    begin = time.monotonic()
    with ThreadPoolExecutor(in_flight) as pool:
        found = list(pool.map(one, range(total)))
    return Counter(ended for ended, _ in found), time.monotonic() - begin, max(seconds for _, seconds in found)


@contextmanager
def clients(url: str, count: int, sent: bytes = b"") -> Iterator[list[socket.socket]]:
    """Open connections that send ``sent`` and then nothing; refused ones are left out."""
    parts = urlsplit(url)
    with ExitStack() as stack:
        opened = []
        for _ in range(count):
            try:
                client = stack.enter_context(socket.create_connection((parts.hostname, parts.port), timeout=5))
                client.sendall(sent)
                opened.append(client)
            except OSError:
                continue
        yield opened


@contextmanager
def served(reward: str) -> Iterator[tuple[str, psutil.Process]]:
    """Run the server command in its own process."""
    program = SERVER.format(arguments=["score", "--serve", "0", "--rewards", reward])
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        yield process.stdout.readline().split()[-1], psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(60)


def say(trial: str, process: psutil.Process | None, *figures: str) -> None:
    """Print a line of the report."""
    state = []
    if process is not None:
        state = [f"{process.num_threads()} threads", f"{process.memory_info().rss / 2**20:.0f} MiB"]
    print(f"{trial}: {', '.join([*figures, *state])}", flush=True)


def trials(url: str, reward: str, process: psutil.Process | None, requests: int, in_flight: int, silent: int) -> None:
    """Test load alone, with silent clients, and with clients that send half a header or half a body."""
    half = b"POST /score HTTP/1.1\r\nHost: x\r\n"
    held = {"alone": 0, "silent clients": silent, "half a header": silent, "half a body": silent}
    sent = {"half a header": half, "half a body": half + b"Content-Length: 1000000\r\n\r\n{"}
    for trial, count in held.items():
        with clients(url, count, sent.get(trial, b"")) as opened:
            ended, seconds, slowest = load(url, reward, requests, in_flight)
            counts = ", ".join(f"{number} {how}" for how, number in sorted(ended.items()))
            speed = f"{requests / seconds:.0f} requests/s"
            say(f"{trial} ({len(opened)})", process, counts, speed, f"slowest {slowest:.2f} s")


def main() -> None:
    """Parse the options and run the trials."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a server that runs already, on this machine; default: one of our own")
    parser.add_argument("--reward", default="brightness")
    parser.add_argument("--requests", type=int, default=1640)
    parser.add_argument("--in_flight", type=int, default=64)
    parser.add_argument("--silent", type=int, default=300)
    args = parser.parse_args()
    if args.url and urlsplit(args.url).hostname not in ("127.0.0.1", "localhost", "::1"):
        parser.error("--url must be on this machine: load on another one is not a test")
    with ExitStack() as stack:
        url, process = (args.url, None) if args.url else stack.enter_context(served(args.reward))
        trials(url.rstrip("/"), args.reward, process, args.requests, args.in_flight, args.silent)


if __name__ == "__main__":
    main()
