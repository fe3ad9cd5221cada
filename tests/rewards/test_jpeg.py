import io

import pytest
import torch
from PIL import Image

from diffalign.rewards import get_reward

NOISE = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
IMAGES = torch.stack([torch.full((3, 32, 32), 0.4), NOISE])


def values(name):
    return get_reward(name)(IMAGES, ["a", "b"], [{}, {}])


def test_the_size_is_that_of_the_file_in_kilobytes():
    file = io.BytesIO()
    pixels = [tuple(round(255 * v) for v in p) for p in NOISE.flatten(1).T.tolist()]
    picture = Image.new("RGB", (32, 32))
    picture.putdata(pixels)
    picture.save(file, format="JPEG", quality=95)
    assert values("jpeg_incompressibility")[1].item() == pytest.approx(len(file.getvalue()) / 1000)


def test_the_two_rewards_are_opposite_and_order_noise_after_a_plain_image():
    large, small = values("jpeg_incompressibility"), values("jpeg_compressibility")
    assert torch.equal(large, -small)
    assert large[1] > 2 * large[0] > 0
