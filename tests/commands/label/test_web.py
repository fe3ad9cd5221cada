"""The HTTP interface: who may connect, what may be sent, and what comes back."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from diffalign.commands.label.command import address, page_token
from diffalign.commands.label.config import LabelConfig
from diffalign.commands.label.web import FILES, for_browser, is_loopback
from diffalign.structures import Prompt
from tests.commands.label.world import BLUE, RED, ask, comparison, picture, serving, sitting_in

TOKEN = "a-token-of-some-length"
BEARER = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("label")
    with sitting_in(folder, [comparison(i) for i in range(3)]) as sitting, serving(sitting) as (port, _):
        yield port


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guarded")
    with sitting_in(folder, [comparison(i) for i in range(3)]) as sitting, serving(sitting, TOKEN) as (port, _):
        yield port


def first(port, rater="Ada", headers=None):
    return ask(port, "/api/next", {"rater": rater}, headers=headers)[2]["pairs"][0]


@pytest.mark.parametrize(("path", "kind"), [*zip(FILES, ("text/html", "text/css", "text/javascript"), strict=True)])
def test_the_page_loads_nothing_from_elsewhere(served, path, kind):
    status, headers, content = ask(served, path)
    assert (status, headers["content-type"].partition(";")[0]) == (200, kind)
    assert b"http://" not in content
    assert b"https://" not in content
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert headers["x-content-type-options"] == "nosniff"


def test_an_answer_and_undo(served):
    pair = first(served, "Cleo")
    status, _, reply = ask(
        served, "/api/answer", {"rater": "Cleo", "token": pair["token"], "pick": "left", "seconds": 1}
    )
    assert (status, reply["saved"], reply["done"], reply["total"]) == (200, True, 1, 3)
    assert reply["pairs"][0]["token"] != pair["token"]
    assert (
        ask(served, "/api/answer", {"rater": "Cleo", "token": pair["token"], "pick": "left", "seconds": 1})[2]["saved"]
        is False
    )
    _, _, reply = ask(served, "/api/undo", {"rater": "Cleo"})
    assert (reply["undone"], reply["done"], reply["pairs"][0]) == (True, 0, pair)


def test_the_source_of_an_edit_is_shown(tmp_path):
    """Without it nobody can judge how much else was changed."""
    (tmp_path / "source.png").write_bytes(picture((0, 90, 0)))
    prompts = [Prompt("make it red", {"image": name}) for name in (str(tmp_path / "source.png"), "cat-17")]
    pairs = [replace(comparison(i), prompt=prompt) for i, prompt in enumerate(prompts)]
    with sitting_in(tmp_path, pairs) as sitting, serving(sitting) as (port, _):
        given = ask(port, "/api/next", {"rater": "Ada"})[2]["pairs"]
        replies = {pair["source"]: ask(port, f"/picture/{pair['token']}/source") for pair in given}
        assert (replies[True][0], replies[True][2]) == (200, picture((0, 90, 0)))
        assert replies[False][0] == 404


def test_the_two_pictures_of_a_pair(served):
    token = first(served)["token"]
    found = {side: ask(served, f"/picture/{token}/{side}") for side in ("left", "right")}
    assert {reply[2] for reply in found.values()} == {RED, BLUE}
    assert {reply[1]["content-type"] for reply in found.values()} == {"image/png"}


@pytest.mark.parametrize(
    "path",
    ["/picture/../../etc/passwd/left", "/picture/..%2f..%2fetc%2fpasswd/left", "/picture//left", "/label.html",
     "/page/", "/picture/{token}/middle", "/picture/{token}/..", "/picture/0/left", "/answers.jsonl",
     "/..%2flabel.html", "/%2e%2e/%2e%2e/etc/passwd"],
)  # fmt: skip
def test_nothing_but_the_page_and_known_pictures_can_be_read(served, path):
    status, _, content = ask(served, path.format(token=first(served)["token"]))
    assert status in (404, 405)
    assert b"root:" not in bytes(str(content), "utf-8")


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil.example", "", "10.0.0.8",
             "[::2]", "0.0.0.0"]
)  # fmt: skip
def test_a_name_that_another_page_resolves_to_this_machine_is_refused(served, host):
    for path, body in (("/", None), ("/api/next", {"rater": "Eve"}), (f"/picture/{first(served)['token']}/left", None)):
        status, _, reply = ask(served, path, body, headers={"Host": host})
        assert status == 403, path
        assert "127.0.0.1 and localhost only" in reply["error"]


@pytest.mark.parametrize("host", ["localhost", "localhost:1", "127.0.0.1:9999", "[::1]:80", "127.1.2.3", "LOCALHOST"])
def test_names_of_this_machine_are_allowed(served, host):
    assert ask(served, "/", headers={"Host": host})[0] == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "https://127.0.0.1"])
def test_requests_of_other_pages_are_refused(served, origin):
    assert ask(served, "/api/undo", {"rater": "Ada"}, headers={"Origin": origin})[0] == 403


def test_requests_of_the_page_are_allowed(served):
    assert ask(served, "/api/next", {"rater": "Ada"}, headers={"Origin": f"http://127.0.0.1:{served}"})[0] == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_a_form_of_another_page_cannot_answer(served, kind):
    """These types need no permission of the browser to be sent across origins."""
    body = json.dumps({"rater": "Ada"}).encode()
    assert ask(served, "/api/undo", body, headers={"Content-Type": kind})[0] == 415


@pytest.mark.parametrize("given", [{}, {"Authorization": "Bearer "}, {"Authorization": f"Bearer {TOKEN[:-1]}"},
                                   {"Authorization": TOKEN}, {"Authorization": f"Basic {TOKEN}"},
                                   {"Authorization": "Bearer \xe4"}])  # fmt: skip
def test_without_the_token_only_the_empty_page_is_served(guarded, given):
    assert ask(guarded, "/", headers=given)[0] == 200
    token = first(guarded, headers=BEARER)["token"]
    for path, body in (
        ("/api/next", {"rater": "Eve"}),
        ("/api/undo", {"rater": "Ada"}),
        (f"/picture/{token}/left", None),
    ):
        status, _, reply = ask(guarded, path, body, headers=given)
        assert status == 401, path
        assert "token" in reply["error"]
        assert TOKEN not in str(reply)


def test_with_the_token_other_machines_may_connect(guarded):
    assert ask(guarded, "/api/next", {"rater": "Ada"}, headers={**BEARER, "Host": "labels.example"})[0] == 200


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"", 400), (b"[]", 400), (b"{", 400), (b"[" * 60000, 400), (b"x" * 70000, 413), (b"\xff", 400), ({}, 400),
     ({"rater": 7}, 400), ({"rater": "x" * 99}, 400)],
)  # fmt: skip
def test_bad_requests_are_refused_in_a_sentence(served, body, status):
    found, _, reply = ask(served, "/api/next", body)
    assert found == status
    assert 5 < len(reply["error"]) < 400


@pytest.mark.parametrize("change", [{"token": "0"}, {"token": None}, {"pick": "first"}, {"pick": 1}, {"seconds": "1"},
                                    {"seconds": True}, {"seconds": -1}, {"seconds": None}, {"rater": ""}])  # fmt: skip
def test_bad_answers_are_refused_and_not_stored(served, change):
    good = {"rater": "Dora", "token": first(served, "Dora")["token"], "pick": "left", "seconds": 1}
    status, _, reply = ask(served, "/api/answer", {**good, **change})
    assert status in (400, 409)
    assert reply["error"]
    assert ask(served, "/api/next", {"rater": "Dora"})[2]["done"] == 0


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS"])
def test_other_methods_are_refused(served, method):
    assert ask(served, "/api/undo", method=method)[0] == 405


def test_a_pair_whose_image_is_broken_is_left_out(tmp_path):
    pairs = [comparison(0, images=(RED[:60], BLUE)), comparison(1)]
    with sitting_in(tmp_path, pairs) as sitting, serving(sitting) as (port, reported):
        broken = next(p for p in ask(port, "/api/next", {"rater": "Ada"})[2]["pairs"] if p["prompt"] == "prompt 0")
        assert {ask(port, f"/picture/{broken['token']}/{side}")[0] for side in ("left", "right")} == {200, 410}
        state = ask(port, "/api/next", {"rater": "Ada"})[2]
        assert ([pair["prompt"] for pair in state["pairs"]], state["total"]) == (["prompt 1"], 1)
        assert len(reported) == 1
        assert reported[0].startswith("pair 0 left out: ")


def test_a_full_disk_is_said_and_the_pair_stays(tmp_path, monkeypatch):
    with sitting_in(tmp_path, [comparison(0)]) as sitting, serving(sitting) as (port, _):
        body = {"rater": "Ada", "token": first(port)["token"], "pick": "left", "seconds": 1}
        with monkeypatch.context() as patch:
            patch.setattr(
                sitting.log, "_write", lambda row: (_ for _ in ()).throw(OSError(28, "No space left on device"))
            )
            status, _, reply = ask(port, "/api/answer", body)
        assert status == 507
        assert "not saved: No space left on device" in reply["error"]
        assert first(port)["token"] == body["token"]
        assert ask(port, "/api/answer", body)[2]["saved"] is True


def colours(content):
    with Image.open(io.BytesIO(content)) as image:
        return image.format, image.convert("RGBA").getpixel((0, 0))


def saved(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


CLEAR = saved(Image.new("RGBA", (8, 8), (10, 200, 30, 0)), "PNG")
DEEP = saved(Image.fromarray(np.full((8, 8), 40000, "uint16")), "PNG")


@pytest.mark.parametrize(
    ("content", "kept"),
    [(RED, True), (picture((1, 2, 3), format="JPEG"), True), (picture((1, 2, 3), format="WEBP"), True),
     (picture((1, 2, 3), format="TIFF"), False), (picture((1, 2, 3), format="BMP"), False), (CLEAR, False),
     (DEEP, False), (saved(Image.new("P", (8, 8)), "GIF"), False)],
)  # fmt: skip
def test_a_browser_shows_what_training_reads(content, kept):
    from diffalign.media import decode

    shown, status, _, kind = for_browser(content)
    assert (status, shown == content) == (200, kept)
    assert kind == ("image/png" if not kept else f"image/{colours(content)[0].lower()}")
    assert colours(shown)[1] == (*decode(content).getpixel((0, 0)), 255)


@pytest.mark.parametrize(("host", "own"), [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False),
                                           ("::", False), ("192.168.0.4", False), ("example.com", False)])  # fmt: skip
def test_other_machines_need_a_token(host, own, monkeypatch):
    assert is_loopback(host) is own
    assert (page_token(LabelConfig(host=host)) is None) is own
    monkeypatch.setenv("LABEL_TOKEN", TOKEN)
    assert page_token(LabelConfig(host=host, token_env="LABEL_TOKEN")) == TOKEN
    found = {page_token(LabelConfig(host=host)) for _ in range(3)}
    assert len(found) == (1 if own else 3)
    assert address(host, 80, "secret").endswith("/#token=secret")  # what stands behind # is sent to no server
