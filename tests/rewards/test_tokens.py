"""A token goes to its own host, and into no message."""

import json
import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from diffalign.rewards import get_reward
from diffalign.rewards.base import needs_groups
from diffalign.tokens import check_url, printable, redacted, token_for, token_variable

TOKEN = "tok-0123456789-abcdefghij"


@pytest.mark.parametrize(
    ("url", "variable"),
    [
        ("http://judge.example.com:8000", "JUDGE_EXAMPLE_COM"),
        ("https://Judge-1.example.com/v1", "JUDGE__1_EXAMPLE_COM"),
        ("http://judge_1.example.com", None),
        ("http://127.0.0.1:9", "127_0_0_1"),
        ("http://localhost", "LOCALHOST"),
        ("http://[::1]:8000", None),
        ("http://judge.example.com.", None),
        ("http://-a.com", None),
        ("ftp://a.com", None),
    ],
)
def test_each_host_has_a_variable_of_its_own(url, variable):
    assert token_variable(url) == (variable and f"DIFFALIGN_TOKEN_{variable}")


def test_hosts_that_look_alike_have_different_variables():
    hosts = ["a.b.com", "a-b.com", "a--b.com", "a.b-com", "ab.com", "a-b-com", "a.b.c.om"]
    assert len({token_variable(f"http://{host}") for host in hosts}) == len(hosts)


@pytest.mark.parametrize(
    "url", ["x", "http://", "file:///etc/passwd", "http://user:pw@host", "http://a\x1b[31m", "http://h:x"]
)
def test_addresses_that_are_none_are_refused_without_their_password(url):
    with pytest.raises(ValueError, match="url") as caught:
        check_url(url)
    assert "pw" not in str(caught.value)
    with pytest.raises(ValueError, match="url"):
        get_reward("remote", url=url, reward="r")


def test_no_secret_is_shown_in_part_or_in_disguise():
    for text in (TOKEN, f"a{TOKEN}b", TOKEN[:12], TOKEN[5:], "x/y+z=secret"):
        assert text not in redacted(f"said {text}!", [TOKEN, "x/y+z=secret"])
    assert "x%2Fy%2Bz%3Dsecret" not in redacted("x%2Fy%2Bz%3Dsecret", ["x/y+z=secret"])
    assert redacted("nothing here", [TOKEN]) == "nothing here"
    assert printable("a\x1b[2Jb\u202ec\x9bd\ne") == "a?[2Jb?c?d e"
    assert len(printable("x" * 10**6)) <= 300


class Echo(BaseHTTPRequestHandler):
    """A server that throws back what it was sent, in a body that a terminal would obey."""

    status, place, seen = 400, "text", ()

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        kind = type(self)
        kind.seen = (*kind.seen, self.headers.get("Authorization"))
        said = f"\x1b[31m{self.headers.get('Authorization')}\x1b]0;owned\x07"
        body = {
            "text": said, "json": json.dumps({"error": said}), "scores": json.dumps({"scores": [said]}),
            "errors": json.dumps({"scores": [None], "error": said}),
            "chat": json.dumps({"choices": [{"message": {"content": said}}]}),
        }[kind.place]  # fmt: skip
        self.send_response(kind.status)
        if 300 <= kind.status < 400:
            self.send_header("Location", kind.elsewhere)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def serve():
    servers = []

    def start(**fields):
        kind = type("Kind", (Echo,), {"seen": (), **fields})
        server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return kind, f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


SOURCE = "data:image/*;base64,UDYKMSAxCjI1NQoAAAA="  # a black pixel, of which only judges of edits read anything
OPTIONS = {
    "remote": {"reward": "r"},
    "vlm_rating": {"model": "m"},
    "editscore": {"model": "m"},
    "vlm_checklist": {"model": "m"},
    "vlm_pairwise": {"model": "m"},
    "unified_reward": {},
    "unified_reward_pairs": {},
    "unified_reward_think": {},
    "image_doctor": {},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(
    ("status", "place"), [(400, "text"), (501, "json"), (200, "text"), (200, "scores"), (200, "errors"), (200, "chat")]
)
def test_what_a_server_throws_back_shows_no_token_and_moves_no_terminal(name, status, place, serve, monkeypatch):
    kind, url = serve(status=status, place=place)
    monkeypatch.setenv("DIFFALIGN_TOKEN_127_0_0_1", TOKEN)
    reward = get_reward(name, url=url, retries=0, **OPTIONS[name])
    groups = [torch.zeros(2)] if needs_groups(reward) else []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            reward(torch.rand(2, 3, 8, 8), ["a", "b"], [{"image": SOURCE}] * 2, *groups)
        except ValueError as error:  # where the server says that it can score nothing
            caught.append(f"{error!r} {error.__cause__!r}")
    said = " ".join(str(getattr(one, "message", one)) for one in caught)
    assert kind.seen
    assert set(kind.seen) == {f"Bearer {TOKEN}"}
    assert said
    assert not any(TOKEN[i : i + 8] in said for i in range(len(TOKEN) - 7))
    assert not any(char in said for char in "\x1b\x07\x9b")
    assert TOKEN not in repr(reward)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(status, serve, monkeypatch):
    other, elsewhere = serve(status=200, place="errors")
    _, url = serve(status=status, elsewhere=elsewhere)
    monkeypatch.setenv("DIFFALIGN_TOKEN_127_0_0_1", TOKEN)
    with pytest.warns(UserWarning, match=f"status {status}"):
        get_reward("remote", url=url, reward="r", retries=0)(torch.rand(1, 3, 8, 8), ["a"], [{}])
    assert other.seen == ()


def test_a_token_of_another_host_stays_here(serve, monkeypatch):
    kind, url = serve(status=400)
    monkeypatch.setenv("DIFFALIGN_TOKEN_JUDGE_EXAMPLE_COM", TOKEN)
    assert token_for("https://judge.example.com") == TOKEN
    with pytest.warns(UserWarning, match="status 400"):
        get_reward("remote", url=url, reward="r", retries=0)(torch.rand(1, 3, 8, 8), ["a"], [{}])
    assert kind.seen == (None,)
