"""What a request costs the server is bounded; it answers under load, beside rewards that hang, and when it stops."""

import base64
import contextlib
import importlib
import io
import json
import socket
import threading
import time
import zlib
from pathlib import Path

import pytest
import torch
import urllib3
from PIL import Image

from diffalign import media
from diffalign.cli import main
from diffalign.rewards.base import FunctionReward, RewardUnavailable
from diffalign.rewards.remote import RewardServer
from diffalign.rewards.support import reward_server as serving
from diffalign.rewards.support.asyncio_http import Handler, Limits
from diffalign.rewards.support.http_client import HTTPClient, RemoteError, encode_image
from tests.rewards.test_remote import running

PNG = encode_image(torch.zeros(3, 8, 8))


def light(images, prompts, metadata):
    return images.mean((1, 2, 3))


def rewards(**functions):
    return {name: FunctionReward(name, function) for name, function in {"light": light, **functions}.items()}


def asked(reward="light", image=PNG, count=1):
    return {"reward": reward, "prompts": ["a"] * count, "metadata": [{}] * count, "images": [image] * count}


def post(address, body=None, timeout=10.0, **options):
    with urllib3.PoolManager() as pool:
        return pool.request("POST", f"{address}/score", json=body or asked(), retries=False, timeout=timeout, **options)


def connected(address):
    return socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=5)


def picture(width, height, mode="1", form="PNG"):
    file = io.BytesIO()
    Image.new(mode, (width, height)).save(file, form)
    return base64.b64encode(file.getvalue()).decode()


def claimed(width, height):
    """A PNG whose header claims a size, and that has no pixels."""

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b""))
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(parts)).decode()


# Cost -----------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    "image",
    [picture(13300, 13300), claimed(13300, 13300), claimed(65535, 300), claimed(2**31 - 1, 2**31 - 1), claimed(0, 9)],
    ids=["177 megapixels", "claimed", "wide", "absurd", "empty"],
)
def test_pixels_are_counted_before_they_are_decoded(image, monkeypatch):
    monkeypatch.setattr(media, "decode", lambda *_: pytest.fail("it was decoded"))
    with running(RewardServer(rewards(), port=0)) as address:
        reply = post(address, asked(image=image))
    assert reply.status == 400
    assert "too large" in reply.json()["error"] or "picture file" in reply.json()["error"]


def test_pixels_of_a_request_are_bounded_together(monkeypatch):
    monkeypatch.setattr(serving, "MAX_PIXELS", 4 * 64)
    with running(RewardServer(rewards(), port=0)) as address:
        assert post(address, asked(count=4)).status == 200
        reply = post(address, asked(count=5))
    assert (reply.status, "320 pixels are too many" in reply.json()["error"]) == (400, True)


@pytest.mark.parametrize("form", ["JPEG", "WEBP", "PNG"])
def test_pictures_of_usual_size_are_scored(form):
    with running(RewardServer(rewards(), port=0)) as address:
        assert post(address, asked(image=picture(1024, 1024, "RGB", form))).json() == {"scores": [0.0]}


def head(*lines):
    return "\r\n".join(["POST /score HTTP/1.1", "Host: x", *lines, "", ""]).encode()


BAD = {
    "too long": (head(f"Content-Length: {65 << 20}"), b"400"),
    "no length": (head(), b"400"),
    "two lengths": (head("Content-Length: 1", "Content-Length: 2"), b"400"),
    "chunked": (head("Transfer-Encoding: chunked"), b"400"),
    "no HTTP": (b"hello\r\n\r\n", b"400"),
    "long header": (head("X: " + "x" * (1 << 17)), b"431"),
    "nested": (head(f"Content-Length: {2 * 10**5}") + b"[" * 10**5 + b"]" * 10**5, b"400"),
    "digits": (head("Content-Length: 20000") + b"1" * 20000, b"400"),
    "not UTF-8": (head("Content-Length: 2") + b"\xff\xfe", b"400"),
    "method": (b"PUT /score HTTP/1.1\r\n\r\n", b"501"),
    "path": (b"POST /etc/passwd HTTP/1.1\r\nContent-Length: 0\r\n\r\n", b"404"),
}


@pytest.mark.parametrize("kind", BAD)
def test_every_bad_request_is_answered(kind):
    request, status = BAD[kind]
    with running(RewardServer(rewards(), port=0)) as address:
        with connected(address) as client:
            client.sendall(request)
            assert client.recv(1000).split(b" ")[1] == status
        assert post(address).json() == {"scores": [0.0]}


def test_a_request_has_so_many_images_at_most(monkeypatch):
    with running(RewardServer(rewards(), port=0)) as address:
        reply = post(address, asked(count=serving.MAX_IMAGES + 1))
    assert (reply.status, "too many for one request" in reply.json()["error"]) == (400, True)


# Load -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
        yield importlib.import_module("scripts.bench.server")


@pytest.mark.parametrize(
    ("requests", "silent"),
    [
        (256, 0),
        (128, 300),
        pytest.param(1640, 0, marks=pytest.mark.slow),
        pytest.param(1640, 300, marks=pytest.mark.slow),
    ],
)
def test_all_of_64_in_flight_are_answered_beside_silent_clients(requests, silent, bench, record_property):
    with running(RewardServer(rewards(), port=0)) as address, bench.clients(address, silent) as held:
        assert len(held) == silent
        ended, _, _ = bench.load(address, "light", requests, 64)
        own = [thread for thread in threading.enumerate() if thread.name.startswith(("reward", "requests"))]
    record_property("requests", requests)
    record_property("requests_answered", ended["answered"])
    assert ended == {"answered": requests}
    assert len(own) < 8


@pytest.mark.parametrize("sent", [b"", b"POST /score HTTP/1.1\r\nHost: x\r\n", head("Content-Length: 9") + b"{"])
def test_a_client_that_falls_silent_is_let_go(sent, monkeypatch):
    monkeypatch.setattr(Handler, "timeout", 0.1)
    with running(RewardServer(rewards(), port=0)) as address, connected(address) as client:
        client.sendall(sent)
        while client.recv(1000):
            pass


def test_clients_beyond_the_limit_get_a_retry_response(bench):
    with running(RewardServer(rewards(), port=0, limits=Limits(connections=2))) as address:
        with bench.clients(address, 2):
            time.sleep(0.05)
            reply = post(address)
            assert (reply.status, reply.headers["Retry-After"]) == (503, "1")
        time.sleep(0.05)
        assert post(address).status == 200


def test_bodies_wait_for_their_share_of_memory():
    size = len(json.dumps(asked(), separators=(",", ":")))
    with running(RewardServer(rewards(), port=0, limits=Limits(waiting=size + 10))) as address:
        client = HTTPClient(address, retries=0, concurrency=4)
        assert [reply["scores"] for reply in client.map(lambda _: client.post("/score", asked()), range(12))] == [
            [0.0]
        ] * 12


# Time -----------------------------------------------------------------------------------------------------------------


def test_a_reward_that_hangs_blocks_only_itself():
    go = threading.Event()

    def hangs(images, prompts, metadata):
        go.wait(10)
        return light(images, prompts, metadata)

    try:
        with running(RewardServer(rewards(hangs=hangs), port=0, time_limit=0.2)) as address:
            assert (post(address, asked("hangs")).status, post(address).status) == (504, 200)
            reply = post(address, asked("hangs"))
            assert (reply.status, reply.headers["Retry-After"]) == (503, "1")
            go.set()
            time.sleep(0.1)
            assert post(address, asked("hangs")).json() == {"scores": [0.0]}
    finally:
        go.set()


@pytest.mark.parametrize("error", [SystemExit(0), KeyboardInterrupt(), MemoryError(), RecursionError()])
def test_a_reward_that_ends_its_thread_ends_one_request(error):
    def raises(images, prompts, metadata):
        raise error

    with running(RewardServer(rewards(raises=raises), port=0, time_limit=5)) as address:
        for _ in range(2):
            assert post(address, asked("raises")).status in (200, 500)
        assert post(address).status == 200


@pytest.mark.parametrize("finishes", [True, False])
def test_stopping_answers_requests_in_flight(finishes):
    started, go = threading.Event(), threading.Event()

    def slow(images, prompts, metadata):
        started.set()
        go.wait(10)
        return light(images, prompts, metadata)

    server = RewardServer(rewards(slow=slow), port=0, limits=Limits(stop=5 if finishes else 0.3))
    replies = {}

    def client(number):
        replies[number] = post(address, asked("slow"))

    with running(server) as address:
        first = threading.Thread(target=client, args=(0,))
        first.start()
        started.wait(5)
        second = threading.Thread(target=client, args=(1,))
        second.start()
        time.sleep(0.1)
        stopping = threading.Thread(target=server.shutdown)
        stopping.start()
        second.join(5)
        assert replies[1].status == 503
        if finishes:
            go.set()
        first.join(5)
        stopping.join(5)
        go.set()
        with pytest.raises(urllib3.exceptions.HTTPError):
            post(address)
    assert replies[0].status == (200 if finishes else 503)


def test_the_command_ends_on_sigterm_with_its_port_free(monkeypatch, capsys):
    def stop(self, poll_interval=0.5):
        self.shutdown()

    monkeypatch.setattr(RewardServer, "serve_forever", stop)
    assert main(["score", "--serve", "0", "--rewards", "brightness"]) == 0
    assert "rewards brightness at http://127.0.0.1:" in capsys.readouterr().out


# What is said ---------------------------------------------------------------------------------------------------------

PATHS = [
    "/home/me/judge/head.pth",
    "'/home/me/my weights/head.pth'",
    "~/judge",
    "C:\\Users\\me\\judge.pth",
    "/root",
    "file:///home/me/judge",
    "cwd:/home/me/judge",
    __file__,
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", [FileNotFoundError, RewardUnavailable, ValueError])
def test_no_path_of_this_machine_is_answered(path, kind):
    def broken(images, prompts, metadata):
        raise kind(f"cannot read {path}: see https://host.org/a/b, or my/weights")

    with running(RewardServer(rewards(broken=broken), port=0)) as address:
        said = post(address, asked("broken")).data.decode()
    for part in ("home", "judge", "Users", "weights/head", "/root", "tests", "my weights"):
        assert part not in said
    assert "https://host.org/a/b, or my/weights" in said


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.1", "example.com", ""])
def test_other_machines_need_a_token(host, capsys):
    with pytest.raises(ValueError, match="--token_env"):
        RewardServer(rewards(), host=host, port=0)
    assert main(["score", "--serve", "0", "--rewards", "brightness", f"--host={host or '0.0.0.0'}"]) == 2
    assert "--token_env" in capsys.readouterr().err


def test_a_token_opens_the_server_to_other_machines(monkeypatch):
    with running(RewardServer(rewards(), host="0.0.0.0", port=0, token="s3cret-token")) as address:
        with pytest.raises(RemoteError, match="status 401"):
            HTTPClient(address, retries=0).post("/score", asked())
        monkeypatch.setenv("DIFFALIGN_TOKEN_127_0_0_1", "s3cret-token")
        assert HTTPClient.for_url(address, retries=0).post("/score", asked()) == {"scores": [0.0]}
        large = b"x" * (1 << 22)
        with urllib3.PoolManager() as pool, contextlib.suppress(urllib3.exceptions.ProtocolError):
            reply = pool.request("POST", f"{address}/score", body=large, retries=False)
            assert reply.status == 401, "refused before the body is read"


def test_a_file_does_not_name_the_token_of_the_server(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("rewards: [brightness]\nserve: 0\nhost: 0.0.0.0\ntoken_env: HOME\n")
    assert main(["score", "--config", str(tmp_path / "a.yaml")]) == 2
    assert "token_env: a file cannot set this" in capsys.readouterr().err
