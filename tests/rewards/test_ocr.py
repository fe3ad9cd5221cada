"""Text is read from real pictures by the real reader, and compared by edit distance."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from diffalign.rewards import as_images, get_reward
from diffalign.rewards.ocr import padded, similarity, target_of


def sign(text):
    picture = Image.new("RGB", (320, 96), "white")
    ImageDraw.Draw(picture).text((20, 24), text, fill="black", font=ImageFont.load_default(size=40))
    return picture


def plain_distance(a, b):
    table = np.add.outer(np.arange(len(a) + 1), np.arange(len(b) + 1))
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (x != y))
    return table[-1, -1]


@pytest.mark.parametrize(
    ("found", "target"),
    [
        ("HELLO", "hello"),
        ("say hello you", "Hello"),
        ("helo", "hello"),
        ("", "hello"),
        ("jazz", "hello"),
        ("wor ld", "world"),
    ],
)
def test_similarity_is_one_minus_the_edit_distance(found, target):
    a, b = found.replace(" ", "").lower(), target.lower()
    expected = 1 if b in a else max(0, 1 - plain_distance(a, b) / len(b))
    assert similarity(found, target) == pytest.approx(expected)


def test_the_target_is_given_or_quoted():
    assert target_of('a sign that says "Open Now" in red', {}) == "Open Now"
    assert target_of("a sign, “Closed”", {}) == "Closed"
    assert target_of('a sign that says "Open"', {"text": "Shut"}) == "Shut"
    with pytest.raises(ValueError, match=r"no text to look for in 'a sign': quote it"):
        target_of("a sign", {})


@pytest.mark.slow
def test_signs_are_read():
    texts = ["HELLO WORLD", "diffusion", "HELP WORLD"]
    images = as_images([sign(text) for text in texts])
    prompts = ['a sign that says "Hello World"', 'a sign that says "diffusion"', 'a sign that says "Hello World"']
    scores = get_reward("ocr")(images, prompts, [{}] * 3)
    torch.testing.assert_close(scores, torch.tensor([1.0, 1.0, 0.8]), atol=1e-6, rtol=0)
    strip = torch.ones(3, 60, 1600)
    strip[:, :, :320] = images[0, :, 18:78]
    assert get_reward("ocr")(strip[None], prompts[:1], [{}]).item() == 1
    blank = torch.ones(1, 3, 96, 320)
    assert get_reward("ocr")(blank, prompts[:1], [{}]).item() == 0
    assert get_reward("ocr")(blank[:0], [], []).shape == (0,)


@pytest.mark.parametrize(
    ("size", "goal"), [((1, 400), (50, 400)), ((600, 3), (600, 75)), ((96, 320), (96, 320)), ((9, 65), (9, 65))]
)
def test_a_strip_is_padded_so_that_reading_it_is_bounded(size, goal):
    image = torch.rand(3, *size)
    found = padded(image)
    assert found.shape[1:] == goal
    assert torch.equal(found[:, : size[0], : size[1]], image)
    white = 3 * (goal[0] * goal[1] - size[0] * size[1])
    assert found.sum().item() == pytest.approx(image.sum().item() + white, rel=1e-4)
