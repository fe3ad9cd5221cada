"""Both images of a pair are resized, mirrored and cropped alike, and SDXL is conditioned on the sizes of each."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from diffalign.data.crops import DRAWS, CropParams, SizeConditioning, frame
from tests.data.preference_files import picture


def drawn(seed):
    return np.random.default_rng(seed).integers(DRAWS, size=3).tolist()


def numbered(width, height):
    """A picture whose red and green say column and row."""
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([columns, rows, 0 * rows], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("size", [(40, 24), (24, 40), (24, 24)])
def test_both_images_lose_the_same_pixels(size):
    """At their own resolution no pixel is resampled, so that each says where it was."""
    for seed in range(20):
        params = CropParams.drawn(drawn(seed))
        (pixels, first), (other, second) = (frame(numbered(*size), (24, 24), params) for _ in range(2))
        assert torch.equal(pixels, other)
        assert first == second
        top, left = first.crop_top_left
        columns = torch.arange(size[0]).flip(0) if params.flip else torch.arange(size[0])
        assert torch.equal(pixels[0], columns[left : left + 24].expand(24, 24).to(torch.uint8))
        assert torch.equal(pixels[1], torch.arange(top, top + 24)[:, None].expand(24, 24).to(torch.uint8))


def test_every_crop_position_is_equally_likely_and_half_are_mirrored():
    places, flips = [], 0
    for seed in range(4000):
        params = CropParams.drawn(drawn(seed))
        places.append(frame(numbered(28, 24), (24, 24), params)[1].crop_top_left)
        flips += params.flip
    tops, lefts = zip(*places, strict=True)
    assert set(tops) == {0}
    counts = torch.tensor(lefts).bincount()
    assert len(counts) == 5
    # Each count is binomial(4000, 1/5): mean 800, deviation 25.
    assert (counts - 800).abs().max() < 5 * 25
    assert abs(flips - 2000) < 5 * 32


def test_a_centre_crop_and_no_flip_draw_nothing():
    for seed in range(5):
        assert CropParams.drawn(drawn(seed), crop="center", flip=False) == CropParams()
    assert frame(numbered(34, 24), (24, 24), CropParams())[1].crop_top_left == (0, 5)


@pytest.mark.parametrize("size", [(50, 37), (37, 50), (13, 90)])
def test_the_shorter_side_is_resized_as_torchvision_does(size):
    image = picture(3, size)
    resized = transforms.resize(image, 20, InterpolationMode.BICUBIC, antialias=True)
    pixels, sizes = frame(image, (20, 20), CropParams(down=0.9, right=0.2, flip=True))
    top, left = sizes.crop_top_left
    wanted = transforms.hflip(transforms.pil_to_tensor(resized))[:, top : top + 20, left : left + 20]
    assert torch.equal(pixels, wanted)
    assert (top, left) == (int(0.9 * (resized.height - 19)), int(0.2 * (resized.width - 19)))
    assert sizes.original_size == (size[1], size[0])


def test_sdxl_is_conditioned_on_the_sizes_of_each_image():
    """The larger one is cut at the same relative place."""
    images = [picture(0, (96, 64)), picture(1, (48, 32))]
    pixels, sizes = zip(*(frame(image, (32, 32), CropParams(down=0.0, right=0.5)) for image in images), strict=True)
    assert all(one.shape == (3, 32, 32) for one in pixels)
    assert all(one.dtype == torch.uint8 for one in pixels)
    assert sizes == (
        SizeConditioning(original_size=(64, 96), crop_top_left=(0, 8), target_size=(32, 32)),
        SizeConditioning(original_size=(32, 48), crop_top_left=(0, 8), target_size=(32, 32)),
    )
    params = CropParams(down=0.25, right=0.75)
    wide, tall = (frame(picture(0, size), (32, 32), params)[1] for size in ((64, 32), (32, 64)))
    assert (wide.crop_top_left, tall.crop_top_left) == ((0, int(0.75 * 33)), (int(0.25 * 33), 0))


def test_the_last_crop_position_can_be_drawn_and_none_beyond():
    params = CropParams.drawn([DRAWS - 1, DRAWS - 1, 0])
    assert frame(numbered(30, 24), (24, 24), params)[1].crop_top_left == (0, 6)
    assert not params.flip
    assert CropParams.drawn([0, 0, DRAWS - 1]) == CropParams(0, 0, True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CropParams.drawn([0, 0]), "draw three integers"),
        (lambda: CropParams.drawn([0, 0, DRAWS]), r"in \[0, 2\^32\)"),
        (lambda: CropParams.drawn([0, 0, 0], crop="centre"), "unknown crop 'centre': choose random or center"),
    ],
)
def test_impossible_crops_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
