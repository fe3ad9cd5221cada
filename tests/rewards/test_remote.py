"""The client and the server of remote rewards, over real sockets, with the faults that servers have."""

import base64
import contextlib
import json
import math
import socket
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from diffalign.rewards import get_reward
from diffalign.rewards.base import FunctionReward, RewardUnavailable
from diffalign.rewards.remote import RemoteReward, RewardServer
from diffalign.rewards.support import http_client
from diffalign.rewards.support.asyncio_http import Handler
from diffalign.rewards.support.http_client import HTTPClient, RemoteError, decode_images, encode_image

IMAGES = torch.randint(0, 256, (5, 3, 9, 7), generator=torch.Generator().manual_seed(0)).float() / 255
PROMPTS = [f"prompt {i}" for i in range(5)]
METADATA = [{"number": i} for i in range(5)]
PNG = encode_image(IMAGES[0])
# PIL hands this format to another program.
EPS = base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n").decode()


def described(images, prompts, metadata):
    """Depends on all three, so that a mix-up shows."""
    words = torch.tensor([float(p.split()[1]) for p in prompts])
    return images.mean((1, 2, 3)) + 10 * words + 100 * torch.tensor([float(m["number"]) for m in metadata])


def nan_for_odd(images, prompts, metadata):
    return torch.tensor([math.nan if m["number"] % 2 else 1.0 for m in metadata])


def broken(images, prompts, metadata):
    raise RuntimeError("out of memory")


def no_three(images, prompts, metadata):
    if "prompt 3" in prompts:
        raise KeyError("three")
    return images.mean((1, 2, 3))


def not_loaded(images, prompts, metadata):
    raise RewardUnavailable("my/weights cannot be loaded")


def with_extras(images, prompts, metadata):
    return images.mean((1, 2, 3)), {"doubt": images.mean((1, 2, 3)), "map": images}


@contextlib.contextmanager
def running(server):
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def url():
    functions = (described, nan_for_odd, broken, no_three, not_loaded, with_extras)
    rewards = {f.__name__: FunctionReward(f.__name__, f) for f in functions}
    rewards["jpeg"] = get_reward("jpeg_compressibility")
    with running(RewardServer(rewards, port=0, batch_size=2)) as address:
        yield address


def remote(address, reward="described", batch_size=2, **options):
    line = HTTPClient(address, **{"timeout": 5.0, "retries": 2, "backoff": 0.01, **options})
    return RemoteReward(reward, line, reward, batch_size)


def scripted(*answers):
    """A server that gives these (status, body or seconds to wait) one after the other, then repeats the last."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status, text = answers[min(len(seen), len(answers) - 1)]
            seen.append(json.loads(body))
            if status == "wait":
                time.sleep(text)
                status, text = 200, '{"scores": [1.0]}'
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    return server, seen


def ask(address, **options):
    return remote(address, batch_size=1, **options)(IMAGES[:1], PROMPTS[:1], METADATA[:1])


@pytest.mark.parametrize("batch_size", [1, 2, 5, 16])
def test_a_remote_reward_is_the_local_one(url, batch_size):
    expected = described(IMAGES, PROMPTS, METADATA)
    torch.testing.assert_close(remote(url, batch_size=batch_size)(IMAGES, PROMPTS, METADATA), expected)
    local = get_reward("jpeg_compressibility")(IMAGES, PROMPTS, METADATA)
    assert torch.equal(remote(url, "jpeg")(IMAGES, PROMPTS, METADATA), local)
    assert remote(url)(IMAGES[:0], [], []).shape == (0,)


def test_images_survive_the_wire():
    assert torch.equal(decode_images([encode_image(IMAGES[0])])[0].float() / 255, IMAGES[0])
    for text in ("no base64!", "aGVsbG8="):
        with pytest.raises(ValueError, match="picture file in base64"):
            decode_images([text])


def test_no_score_stays_no_score(url):
    assert remote(url, "nan_for_odd")(IMAGES, PROMPTS, METADATA).isnan().tolist() == [False, True] * 2 + [False]


def test_what_is_offered_can_be_asked(url):
    with urllib.request.urlopen(url) as reply:
        offered = json.load(reply)["rewards"]
    assert (offered[0], offered[-1]) == ("described", "jpeg")


def test_a_server_that_recovers_is_asked_again():
    server, seen = scripted((500, "busy"), (503, "busy"), (200, '{"scores": [3.5]}'))
    with running(server) as address:
        assert ask(address).tolist() == [3.5]
    assert len(seen) == 3
    assert seen[0] == seen[2]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((500, "busy"), "answered with status 500: busy"),
        ((200, "<html>"), "answered no JSON: b'<html>'"),
        ((200, '{"scores": [1.0, 2.0]}'), "not a list of 1 scores"),
        ((200, "[1.0]"), "not a list of 1 scores"),
        ((200, '{"scores": ["good"]}'), "'good' where a number belongs"),
        ((200, '{"scores": [true]}'), "'True' where a number belongs"),
        ((200, '{"scores": [1' + "0" * 400 + "]}"), "'1000.*' where a number belongs"),
        ((404, "nothing here"), "answered with status 404: nothing here"),
    ],
)
def test_a_faulty_server_costs_scores_not_the_run(answer, message):
    server, seen = scripted(answer)
    with running(server) as address, pytest.warns(UserWarning, match=message):
        assert ask(address).isnan().all()
    assert len(seen) == (3 if answer[0] == 500 else 1)


def test_a_literal_nan_is_no_score():
    server, _ = scripted((200, '{"scores": [NaN]}'))
    with running(server) as address:
        assert ask(address).isnan().all()


def test_a_slow_server_is_given_up():
    server, _ = scripted(("wait", 1.0))
    started = time.monotonic()
    with running(server) as address, pytest.warns(UserWarning, match="no answer in 2 attempts, last ReadTimeoutError"):
        assert ask(address, timeout=0.1, retries=1).isnan().all()
    assert time.monotonic() - started < 5


def test_a_dead_server_is_given_up():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.warns(UserWarning, match="check that the server runs"):
        assert remote(address, retries=1)(IMAGES, PROMPTS, METADATA).isnan().all()


def test_one_failing_request_costs_its_images_alone():
    server, _ = scripted((200, '{"scores": [1.0]}'), (400, "bad"), (200, '{"scores": [2.0]}'))
    with running(server) as address, pytest.warns(UserWarning, match="status 400: bad"):
        found = remote(address, batch_size=1, concurrency=1)(IMAGES[:3], PROMPTS[:3], METADATA[:3])
    assert found.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([], "must be a JSON object"),
        ({"reward": "nobody", "prompts": [], "images": []}, "unknown reward 'nobody'; offered: described"),
        ({"reward": ["described"], "prompts": [], "images": []}, "must be a name, got"),
        ({"reward": "described", "prompts": ["a"], "images": []}, "lists of the same length"),
        ({"reward": "described", "prompts": [], "images": [], "metadata": [{}]}, "must be a list of 0 objects"),
        ({"reward": "described", "prompts": ["a"], "images": [PNG], "metadata": 5}, "must be a list of 1 objects"),
        ({"reward": "described", "prompts": ["a"], "images": [PNG], "metadata": [5]}, "holds 5: write texts"),
        ({"reward": "described", "prompts": [5], "images": [PNG]}, "holds 5: write texts"),
        ({"reward": "described", "prompts": ["a"], "images": [5]}, "picture file in base64"),
        ({"reward": "described", "prompts": ["a"], "images": [EPS]}, "picture file in base64"),
        ({"reward": "described", "prompts": ["a"], "images": ["?"]}, "picture file in base64"),
    ],
)
def test_the_server_says_what_is_wrong(url, body, message):
    with pytest.raises(RemoteError, match=message):
        HTTPClient(url, retries=0).post("/score", body)


def test_concurrency_is_bounded():
    active, most, lock = 0, 0, threading.Lock()

    def work(item):
        nonlocal active, most
        with lock:
            active += 1
            most = max(most, active)
        time.sleep(0.01)
        with lock:
            active -= 1
        return item * 2

    assert HTTPClient("", concurrency=3).map(work, range(12)) == list(range(0, 24, 2))
    assert most == 3


def test_a_reward_with_extras_is_served_without_them(url):
    expected = IMAGES.mean((1, 2, 3))
    torch.testing.assert_close(remote(url, "with_extras")(IMAGES, PROMPTS, METADATA), expected)


def test_one_bad_sample_costs_its_own_score_alone(url):
    with pytest.warns(UserWarning, match="KeyError: 'three'"):
        found = remote(url, "no_three", batch_size=5)(IMAGES, PROMPTS, METADATA)
    assert found.isnan().tolist() == [False, False, False, True, False]
    with pytest.warns(UserWarning, match="RuntimeError: out of memory"):
        assert remote(url, "broken")(IMAGES, PROMPTS, METADATA).isnan().all()


def test_the_server_scores_as_many_at_once_as_it_was_told():
    sizes = []

    def counts(images, prompts, metadata):
        sizes.append(len(images))
        return images.mean((1, 2, 3))

    with running(RewardServer({"counts": FunctionReward("counts", counts)}, port=0, batch_size=2)) as address:
        remote(address, "counts", batch_size=5)(IMAGES, PROMPTS, METADATA)
    assert sizes == [2, 2, 1]


@pytest.mark.parametrize("name", ["not_loaded", "nobody"])
def test_a_server_that_can_score_nothing_ends_the_run(name, url):
    with pytest.raises(RewardUnavailable, match=r"status 501: .*(my/weights cannot be loaded|unknown reward)"):
        remote(url, name)(IMAGES, PROMPTS, METADATA)


def test_a_reward_that_ranks_is_not_served():
    class Ranks:
        name, needs_groups = "ranks", True

    with pytest.raises(ValueError, match="ranks rank images within a group"):
        RewardServer({"ranks": Ranks()}, port=0)


def test_pixels_of_nan_have_no_score_far_away_too(url):
    images = IMAGES.clone()
    images[1, 0, 2, 3], images[4] = math.nan, math.inf
    found = remote(url)(images, PROMPTS, METADATA)
    assert found.isnan().tolist() == [False, True, False, False, True]
    keep = [0, 2, 3]
    torch.testing.assert_close(found[keep], described(IMAGES, PROMPTS, METADATA)[keep])
    with pytest.raises(ValueError, match="pixels that are not finite"):
        encode_image(images[1])


def raw(address, request):
    """The first line that comes back."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(request)
        return connection.recv(1000).decode().splitlines()[0]


@pytest.mark.parametrize("length", ["abc", "-1", "", str(1 << 40), "9" * 5000])
def test_a_length_that_is_none_is_answered(length, url):
    request = f"POST /score HTTP/1.0\r\nContent-Length: {length}\r\n\r\n{{}}".encode()
    assert "400" in raw(url, request)


def test_a_body_that_does_not_come_holds_no_thread(url, monkeypatch):
    monkeypatch.setattr(Handler, "timeout", 0.1)
    assert "408" in raw(url, b"POST /score HTTP/1.0\r\nContent-Length: 10\r\n\r\n{")


def test_a_server_may_ask_for_a_token(monkeypatch):
    monkeypatch.setenv("JUDGE_TOKEN", "s3cret")
    offered = {"described": FunctionReward("described", described)}
    with running(RewardServer(offered, port=0, token="s3cret")) as address:
        options = {"url": address, "reward": "described", "retries": 0}
        scores = get_reward("remote", token_env="JUDGE_TOKEN", **options)(IMAGES, PROMPTS, METADATA)
        torch.testing.assert_close(scores, described(IMAGES, PROMPTS, METADATA))
        with pytest.warns(UserWarning, match="status 401: .*asks for a token"):
            assert get_reward("remote", **options)(IMAGES, PROMPTS, METADATA).isnan().all()
        assert "401" in raw(address, b"GET / HTTP/1.0\r\n\r\n")


class Trying(BaseHTTPRequestHandler):
    """A server that tries the patience of its clients."""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        later = self.server.kind == "later"
        self.send_response(503 if later else 200)
        self.send_header("Retry-After", "3600")
        self.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(0 if later else 100):
                self.wfile.write(b" " * (1 << 20 if self.server.kind == "huge" else 1))
                self.wfile.flush()
                time.sleep(0.05 if self.server.kind == "drip" else 0)

    def log_message(self, *args):
        pass


@pytest.mark.parametrize(
    ("kind", "message"), [("later", "status 503"), ("drip", "bytes and no end"), ("huge", "bytes and no end")]
)
def test_a_call_ends_in_bounded_time_and_size(kind, message):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Trying)
    server.daemon_threads, server.kind = True, kind
    started = time.monotonic()
    with running(server) as address, pytest.warns(UserWarning, match=message):
        assert ask(address, retries=1, deadline=5.0 if kind == "huge" else 0.5).isnan().all()
    assert time.monotonic() - started < 4


def test_a_wish_to_be_asked_later_is_kept_up_to_a_bound(monkeypatch):
    slept = []
    monkeypatch.setattr(http_client.time, "sleep", slept.append)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Trying)
    server.kind = "later"
    with running(server) as address, pytest.warns(UserWarning, match="status 503"):
        ask(address, retries=2, deadline=100.0)
    assert [wait for wait in slept if wait > 1] == [http_client.MAX_WAIT] * 2


@pytest.mark.parametrize("options", [{"concurrency": 0}, {"retries": -1}, {"timeout": 0.0}, {"batch_size": 0}])
def test_numbers_that_are_too_small_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        get_reward("remote", url="http://127.0.0.1:9", reward="r", **options)
