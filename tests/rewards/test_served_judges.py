"""UnifiedReward, ImageDoctor and VisionReward: their questions, what is read from answers, and their sums."""

import base64
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.forecast.fake_rewards import network_bytes
from diffalign.rewards import FunctionReward, get_reward
from diffalign.rewards.base import registered
from diffalign.rewards.image_doctor import AXES
from diffalign.rewards.support.http_client import RemoteError
from diffalign.rewards.unified_reward import pair_share
from diffalign.rewards.vision_reward import ALIGNMENT, COEFFICIENTS, MASKS, VisionReward, questions
from diffalign.rewards.vlm_judge import Answer
from tests.rewards import test_vlm_judge
from tests.rewards.test_vlm_judge import completion, judge

IMAGES = torch.tensor([0.25, 0.75, 0.5]).view(3, 1, 1, 1).expand(3, 3, 16, 24)
PROMPTS = ["a {cat} on a mat", "two dogs", "two dogs"]
DATA = [{}] * 3


@pytest.fixture(autouse=True)
def any_format(monkeypatch):
    """Decode JPEG and PNG requests; note format and size of each picture."""
    kinds = []

    def see(body):
        (message,) = body["messages"]
        *pictures, words = message["content"]
        light = []
        for picture in pictures:
            head, _, packed = picture["image_url"]["url"].partition(",")
            image = Image.open(io.BytesIO(base64.b64decode(packed)))
            kinds.append((head, image.format, image.size))
            light.append(np.asarray(image).mean() / 255)
        return words["text"], light

    monkeypatch.setattr(test_vlm_judge, "see", see)
    return kinds


def served(name, endpoint, **options):
    return get_reward(name, url=endpoint.client.url, retries=0, timeout=5.0, **options)


def rated(question, light, body):
    assert body["temperature"] == 0
    assert body["max_tokens"] == 4096
    lines = [f"{axis} Score (1-5): {1 + 4 * light[0] * share}" for axis, share in zip(
        ("Alignment", "Coherence", "Style"), (1, 0.5, 0.25), strict=True)]  # fmt: skip
    return completion("\n".join(lines))


def test_unified_reward_is_the_mean_of_three_axes_or_one_of_them(any_format):
    with judge(rated) as (endpoint, seen):
        scores, extras = served("unified_reward", endpoint)(IMAGES, PROMPTS, DATA)
        (alone, _) = served("unified_reward", endpoint, axis="style")(IMAGES, PROMPTS, DATA)
    light = torch.tensor([0.25, 0.75, 0.5])
    torch.testing.assert_close(extras["alignment"], 1 + 4 * light, atol=0.02, rtol=0)
    torch.testing.assert_close(scores, 1 + 4 * light * 7 / 12, atol=0.02, rtol=0)
    assert torch.equal(alone, extras["style"])
    assert {kind for _, kind, _ in any_format} == {"JPEG"}
    texts = [body["messages"][0]["content"][-1]["text"] for body in seen]
    assert "Text Caption: [a {cat} on a mat]" in "".join(texts)
    assert all(text.startswith("You are presented with a generated image and its associated text") for text in texts)
    with pytest.raises(ValueError, match="axis must be one of mean, alignment, coherence, style, got 'looks'"):
        get_reward("unified_reward", url="http://127.0.0.1:1", axis="looks")


@pytest.mark.parametrize(
    "text",
    [
        "Alignment Score (1-5): 6\nCoherence Score (1-5): 2\nStyle Score (1-5): 2",
        "Alignment Score (1-5): 3\nStyle Score (1-5): 2",
        "Alignment Score (1-5): nan\nCoherence Score (1-5): 2\nStyle Score (1-5): 2",
        "",
        "x" * 10**5,
    ],
    ids=range(5),
)
def test_an_answer_without_all_axes_within_bounds_scores_nothing(text):
    with judge(lambda *_: completion(text)) as (endpoint, _), pytest.warns(UserWarning, match="score: number") as said:
        assert served("unified_reward", endpoint)(IMAGES[:1], PROMPTS[:1], DATA[:1])[0].isnan().all()
    assert len(str(said[0].message)) < 2000


def compared(question, light, body):
    share = [value / sum(light) for value in light]
    axes = ("Alignment", "Coherence", "Style")
    return completion("\n\n".join(f"{axis} Score:\n Image 1: {share[0]}\n Image 2: {share[1]}" for axis in axes))


def test_unified_pairs_average_both_orders():
    with judge(compared) as (endpoint, seen):
        found = served("unified_reward_pairs", endpoint)(IMAGES, ["p"] * 3, DATA, torch.zeros(3))
    light = [0.25, 0.75, 0.5]
    expected = [sum(a / (a + b) for j, b in enumerate(light) if j != i) / 2 for i, a in enumerate(light)]
    torch.testing.assert_close(found, torch.tensor(expected), atol=5e-3, rtol=0)
    assert len(seen) == 6


def test_a_pair_is_a_share_of_one():
    text = "Style Score:\n Image 1: 0.3\n Image 2: 0.7"
    assert pair_share(text, "style") == pytest.approx(0.3)
    for bad in (text.replace("0.7", "0.9"), text.replace("0.3", "-0.3"), "Style Score: 0.3"):
        with pytest.raises(RemoteError, match="without two style scores that sum to 1"):
            pair_share(bad, "style")


def reasoned(question, light, body):
    assert "「p」" in question
    best = 1 + (light[1] > light[0])
    return completion(f"<think>Image {3 - best} is better? no</think>\n<answer>Image {best} is better</answer>")


def test_unified_think_reads_the_answer_and_not_the_thoughts():
    with judge(reasoned) as (endpoint, _):
        found = served("unified_reward_think", endpoint)(IMAGES, ["p"] * 3, DATA, torch.zeros(3))
    assert found.tolist() == [0.0, 1.0, 0.5]
    both, message = completion("<answer>both</answer>"), "without an image that is better"
    with judge(lambda *_: both) as (endpoint, _), pytest.warns(UserWarning, match=message):
        assert served("unified_reward_think", endpoint)(IMAGES, ["p"] * 3, DATA, torch.zeros(3)).isnan().all()


def diagnosed(question, light, body):
    words = "Semantic Alignment score: {0}\nMisalignment Locations: x\nAesthetic score: 0.5\nPlausibility score: .25"
    thoughts = "<think>Aesthetic score: 0.9</think>"
    return completion(f"{thoughts}<answer>{words.format(light[0])}\nOverall Impression score: 1</answer>")


def test_image_doctor_weighs_four_scores(any_format):
    light = torch.tensor([0.25, 0.75, 0.5])
    with judge(diagnosed) as (endpoint, _):
        scores, extras = served("image_doctor", endpoint)(IMAGES, PROMPTS, DATA)
        overall, _ = served("image_doctor", endpoint, weights={"overall impression": 2})(IMAGES, PROMPTS, DATA)
    torch.testing.assert_close(scores, 0.8 * light + 0.05 + 0.025, atol=5e-3, rtol=0)
    assert overall.tolist() == [1.0] * 3
    assert set(extras) == {axis.replace(" ", "_") for axis in AXES}
    assert {size for *_, size in any_format} == {(627, 418)}  # 24 x 16 enlarged to an area of 512 x 512
    for wrong in ({"looks": 1}, {"aesthetic": -1}, {"aesthetic": 0}):
        with pytest.raises(ValueError, match=r"no axis looks|must not be negative"):
            get_reward("image_doctor", url="http://127.0.0.1:1", weights=wrong)


def test_vision_reward_is_the_published_sum():
    """Against the published loop, in plain Python: answers to +-1, masked, and dotted with the coefficients."""
    asked = questions()
    assert len(asked) == 30
    assert len(COEFFICIENTS) == 27

    def answer(question, light, body):
        return completion("yes" if hash_of(question, light[0]) else "No.")

    def hash_of(question, light):
        return (sum(map(ord, question)) + round(light * 4)) % 3 > 0

    vqa = FunctionReward("vqa", lambda images, prompts, metadata: images.mean((1, 2, 3)))
    with judge(answer) as (endpoint, seen):
        found, extras = VisionReward("v", endpoint, vqa)(IMAGES, PROMPTS, DATA)
        assert len(seen) == 90
    for row, light in enumerate((0.25, 0.75, 0.5)):
        reward = [1 if hash_of(question, light) else -1 for question in asked]
        for mask, rows in MASKS.items():
            for i in rows:
                reward[i] *= int(reward[mask] > 0)
        expected = float(np.dot(np.array(reward[3:], dtype=np.float64), COEFFICIENTS))
        assert extras["checklist"][row].item() == pytest.approx(expected, abs=1e-6)
        assert found[row].item() == pytest.approx(expected + ALIGNMENT * light, abs=1e-2)


def test_a_question_without_an_answer_leaves_its_image_without_a_score():
    reply = lambda question, light, body: completion("maybe" if light[0] < 0.3 else "yes")  # noqa: E731
    with judge(reply) as (endpoint, _), pytest.warns(UserWarning, match="neither 'yes' nor 'no'"):
        found, extras = served("vision_reward", endpoint, alignment=None)(IMAGES[:2], PROMPTS[:2], DATA[:2])
    assert found.isnan().tolist() == [True, False]
    assert found[1] == extras["checklist"][1] == pytest.approx(sum(COEFFICIENTS))


def test_answers_are_read_within_answer_tags_and_numbers_need_bounds():
    answer = Answer("<answer>Aesthetic score: 0.1</answer> ... <answer>Aesthetic score : .5</answer>", {})
    assert answer.axis("aesthetic", 0, 1) == 0.5
    for low, high in ((0.6, 1), (0, 0.4)):
        with pytest.raises(RemoteError, match="aesthetic score: number"):
            answer.axis("aesthetic", low, high)


@pytest.mark.parametrize("name", ["unified_reward", "unified_reward_pairs", "unified_reward_think", "image_doctor"])
def test_weights_on_a_server_take_no_memory_here(name):
    assert registered(name).facts.served
    assert registered(name).facts.millions > 1000
    assert network_bytes(get_reward(name, url="http://127.0.0.1:1")) == 0
    assert math.isfinite(registered(name).facts.scale)
