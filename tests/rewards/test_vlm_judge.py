"""Judges that speak, against a real HTTP server that speaks the protocol and really looks at the images."""

import contextlib
import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from diffalign.rewards import get_reward
from diffalign.rewards.base import Reward
from diffalign.rewards.support.http_client import HTTPClient, RemoteError, decode_images
from diffalign.rewards.vlm_judge import Answer, ChecklistJudge, Endpoint, PairwiseJudge, RatingJudge

BRIGHTNESS = torch.tensor([0.2, 0.8, 0.4, 0.6, 1.0])
IMAGES = BRIGHTNESS.view(5, 1, 1, 1).expand(5, 3, 8, 8)
PROMPTS = ["light"] * 5


def see(body):
    """(text of the question, brightness of each image) of a request."""
    (message,) = body["messages"]
    *pictures, words = message["content"]
    prefix = "data:image/png;base64,"
    assert all(p["image_url"]["url"].startswith(prefix) for p in pictures)
    images = decode_images([p["image_url"]["url"].removeprefix(prefix) for p in pictures])
    return words["text"], [image.float().mean().item() / 255 for image in images]


def logs(probabilities):
    return {token: math.log(p) for token, p in probabilities.items()}


def completion(text, first=None):
    top = [{"token": token, "logprob": math.log(p)} for token, p in (first or {}).items()]
    logprobs = {"content": [{"token": text, "top_logprobs": top}]} if first else None
    return {"choices": [{"message": {"content": text}, "logprobs": logprobs}]}


@contextlib.contextmanager
def judge(answer):
    """An endpoint whose model is ``answer(question, brightnesses, body) -> reply``."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append(body)
            assert self.path == "/v1/chat/completions"
            reply = json.dumps(answer(*see(body), body)).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield Endpoint(HTTPClient(f"http://127.0.0.1:{server.server_port}", retries=0, timeout=5.0), "a-judge"), seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_rating_is_the_number_that_the_judge_gives():
    with judge(lambda q, b, _: completion(f'Bright. {{"score": {10 * b[0]:.1f}}} Done.')) as (endpoint, seen):
        reward = RatingJudge("rate", endpoint)
        assert isinstance(reward, Reward)
        torch.testing.assert_close(reward(IMAGES, PROMPTS, [{}] * 5), 10 * BRIGHTNESS, atol=0.06, rtol=0)
    assert seen[0]["model"] == "a-judge"
    assert "from 0 to 10" in see(seen[0])[0]
    assert '"light"' in see(seen[0])[0]


@pytest.mark.parametrize("text", ["eleven", '{"score": 11}', '{"score": "9"}', '{"score": true}', '{"rating": 3}', "{"])
def test_a_judge_that_gives_no_number_gives_no_score(text):
    with judge(lambda *_: completion(text)) as (endpoint, _), pytest.warns(UserWarning, match="the judge said"):
        assert RatingJudge("rate", endpoint)(IMAGES[:1], PROMPTS[:1], [{}]).isnan().all()


def test_a_checklist_is_the_mean_over_its_questions():
    def answer(question, brightness, body):
        yes = brightness[0] > (0.5 if "half" in question else 0.3)
        return completion("Yes." if yes else "No")

    metadata = [{"questions": ["Over half?", "Over a third?"]}] * 5
    with judge(answer) as (endpoint, seen):
        found = ChecklistJudge("list", endpoint)(IMAGES, PROMPTS, metadata)
        assert found.tolist() == [0.0, 1.0, 0.5, 1.0, 1.0]
        assert len(seen) == 10
        alone = ChecklistJudge("list", endpoint)(IMAGES[:2], PROMPTS[:2], [{}] * 2)
        assert alone.tolist() == [0.0, 1.0]
        assert 'Does this image show "light"?' in see(seen[-1])[0]


def test_log_probabilities_weigh_the_answer():
    def answer(question, brightness, body):
        assert body["logprobs"] is True
        return completion("Yes", {"Yes": 0.5, " yes": 0.1, "No": 0.2, "Maybe": 0.2})

    with judge(answer) as (endpoint, _):
        assert ChecklistJudge("list", endpoint)(IMAGES[:1], ["p"], [{}]).item() == pytest.approx(0.75)


def test_pairs_are_asked_in_both_orders_within_their_group():
    def answer(question, brightness, body):
        return completion("1" if brightness[0] > brightness[1] else "2")

    groups = torch.tensor([0, 0, 1, 1, 1])
    with judge(answer) as (endpoint, seen):
        found = PairwiseJudge("pairs", endpoint)(IMAGES, PROMPTS, [{}] * 5, groups)
    assert found.tolist() == [0.0, 1.0, 0.0, 0.5, 1.0]
    assert len(seen) == 2 * (1 + 3)


def test_a_taste_for_the_first_place_cancels():
    with judge(lambda *_: completion("1")) as (endpoint, _):
        assert PairwiseJudge("pairs", endpoint)(IMAGES, PROMPTS, [{}] * 5, torch.zeros(5)).tolist() == [0.5] * 5


def test_a_pair_that_fails_does_not_count():
    def answer(question, brightness, body):
        if max(brightness) > 0.9:
            return completion("I cannot say")
        return completion("1" if brightness[0] > brightness[1] else "2")

    groups = torch.tensor([0, 0, 0, 1, 1])
    with judge(answer) as (endpoint, _), pytest.warns(UserWarning, match="neither '1' nor '2'"):
        found = PairwiseJudge("pairs", endpoint)(IMAGES, PROMPTS, [{}] * 5, groups)
    assert found[:3].tolist() == [0.0, 1.0, 0.5]
    assert found[3:].isnan().all()


def test_most_pairs_bounds_the_questions():
    with judge(lambda *_: completion("2")) as (endpoint, seen):
        PairwiseJudge("pairs", endpoint, most_pairs=4)(IMAGES, PROMPTS, [{}] * 5, torch.zeros(5))
    assert len(seen) == 8


@pytest.mark.parametrize(
    "reply", [{}, {"choices": []}, {"choices": [{"message": {"content": None}}]}, [1], {"choices": [{"logprobs": 3}]}]
)
def test_what_is_no_completion_is_no_score(reply):
    with judge(lambda *_: reply) as (endpoint, _), pytest.warns(UserWarning, match="answered"):
        assert ChecklistJudge("list", endpoint)(IMAGES[:1], ["p"], [{}]).isnan().all()


def test_an_answer_that_says_both_is_none():
    assert Answer("Yes, surely", {}).choice("yes", "no") == 1
    assert Answer("I would say no.", {}).choice("yes", "no") == 0
    for text in ("yes or no", "", "perhaps"):
        with pytest.raises(RemoteError, match="neither 'yes' nor 'no'"):
            Answer(text, {}).choice("yes", "no")


def test_log_probabilities_of_other_words_do_not_outweigh_what_is_said():
    thinking = {"Let": 0.9, "no": 0.02, "yes": 0.001}
    assert Answer("Let me see. Yes", logs(thinking)).choice("yes", "no") == 1
    assert Answer("No", logs({"No": 0.4, "yes": 0.2})).choice("yes", "no") == pytest.approx(1 / 3)
    with pytest.raises(RemoteError, match="neither 'yes' nor 'no'"):
        Answer("Let me", logs(thinking)).choice("yes", "no")


def test_log_probabilities_are_asked_for_where_they_are_read():
    with judge(lambda *_: completion('{"score": 3}')) as (endpoint, seen):
        RatingJudge("rate", endpoint)(IMAGES[:1], ["p"], [{}])
    assert "logprobs" not in seen[0]
    assert seen[0]["max_tokens"] == endpoint.max_tokens


def test_options_that_a_judge_does_not_take_are_refused():
    with pytest.raises(ValueError, match="'vlm_rating' takes no hi; it takes question, low, high, source"):
        get_reward("vlm_rating", url="http://x", model="m", hi=3)
    with pytest.raises(ValueError, match="'vlm_checklist' takes no differentiable; it takes none"):
        get_reward("vlm_checklist", url="http://x", model="m", differentiable=True)


def test_an_image_that_is_not_finite_is_asked_nothing_about():
    images = IMAGES.clone()
    images[1, 0, 0, 0] = math.nan
    with judge(lambda q, b, _: completion("1" if b[0] > b[-1] else "2")) as (endpoint, seen):
        found = PairwiseJudge("pairs", endpoint)(images, PROMPTS, [{}] * 5, torch.zeros(5))
    assert found.isnan().tolist() == [False, True, False, False, False]
    assert found[[0, 2, 3, 4]].tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert len(seen) == 12
