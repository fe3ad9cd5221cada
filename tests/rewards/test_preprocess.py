"""Preprocessing against PIL, torchvision and transformers' own processors, pixel by pixel."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from transformers import CLIPImageProcessorPil

from diffalign.rewards import get_reward
from diffalign.rewards.support import preprocess as pre

SIZES = [(64, 64), (224, 224), (225, 301), (37, 50), (301, 225), (1, 1), (20, 80), (97, 66), (640, 481)]
# Bicubic weights can be exact halves of a level, which PIL's fixed point and a float round apart; the second pass can
# make two levels of it.
MOST, SHARE = 2, 0.01


def pixels(size, seed=0):
    """Noise over a gradient: it overshoots at edges, and no resize of it is a plain mean."""
    generator = np.random.default_rng(seed)
    ramp = np.linspace(0, 255, size[0] * size[1] * 3).reshape(*size, 3)
    return np.where(generator.random((*size, 3)) < 0.5, ramp, generator.integers(0, 256, (*size, 3))).astype(np.uint8)


def tensor(array):
    return torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255


def assert_same_levels(found, expected):
    """Both (H, W, 3), in levels of 1 / 255."""
    difference = np.abs(np.asarray(found, dtype=float) - np.asarray(expected, dtype=float))
    assert difference.max() <= MOST + 1e-3
    assert (difference > 0.5).mean() < SHARE


def levels(normalised, step):
    """Undoes the normalisation: (H, W, 3) in levels."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (step.mean, step.std))
    return ((normalised * std + mean) * 255)[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("size", SIZES)
def test_quantised_resize_is_pils(size):
    array = pixels(size)
    goal = pre.short_side(size, 32)
    expected = Image.fromarray(array).resize(goal[::-1], Image.Resampling.BICUBIC)
    found = pre.resize(tensor(array), goal, quantize=True)[0].permute(1, 2, 0) * 255
    assert_same_levels(found, expected)


@pytest.mark.parametrize("size", SIZES)
def test_the_clip_recipe_is_that_of_transformers(size):
    array, step = pixels(size), pre.Preprocess(crop=pre.centre_floor)
    expected = CLIPImageProcessorPil()(Image.fromarray(array), return_tensors="pt")["pixel_values"]
    found = step(tensor(array), quantize=True)
    assert found.shape == (1, 3, 224, 224)
    assert_same_levels(levels(found, step), levels(expected, step))


@pytest.mark.parametrize("size", SIZES)
def test_the_open_clip_recipe_is_that_of_torchvision(size):
    array, step = pixels(size), pre.Preprocess(crop=pre.centre_round)
    recipe = transforms.Compose(
        [
            transforms.Resize(224, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(pre.CLIP_MEAN, pre.CLIP_STD),
        ]
    )
    found = step(tensor(array), quantize=True)
    assert_same_levels(levels(found, step), levels(recipe(Image.fromarray(array))[None], step))


def test_the_two_crops_differ_where_three_pixels_are_too_many():
    assert (pre.centre_floor(3), pre.centre_round(3)) == (1, 2)
    assert (pre.centre_floor(1), pre.centre_round(1)) == (0, 0)


@pytest.mark.parametrize("size", [(5, 9), (9, 5), (4, 4)])
def test_padding_centres_the_picture_on_its_colour(size):
    images = torch.rand(2, 3, *size)
    square = pre.pad_square(images, (0.1, 0.2, 0.3))
    side = max(size)
    top, left = (side - size[0]) // 2, (side - size[1]) // 2
    assert square.shape == (2, 3, side, side)
    assert torch.equal(square[:, :, top : top + size[0], left : left + size[1]], images)
    outside = torch.ones(side, side, dtype=torch.bool)
    outside[top : top + size[0], left : left + size[1]] = False
    for channel, value in enumerate((0.1, 0.2, 0.3)):
        assert (square[:, channel][:, outside] == torch.tensor(value)).all()


def test_smooth_and_quantised_stay_close_and_share_their_gradient():
    images = tensor(pixels((40, 50))).requires_grad_()
    weights = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    step = pre.Preprocess(goal=24)
    values, gradients = {}, {}
    for quantize in (True, False):
        values[quantize] = step(images, quantize=quantize)
        (gradients[quantize],) = torch.autograd.grad((values[quantize] * weights).sum(), images)
    assert torch.equal(gradients[True], gradients[False])
    assert 0 < (values[True] - values[False]).abs().mean() < 1 / 255 / max(pre.CLIP_STD)


def test_the_smooth_path_agrees_with_finite_differences():
    images = torch.rand(1, 3, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 0.4 + 0.3
    images.requires_grad_()
    step = pre.Preprocess(goal=4)
    assert torch.autograd.gradcheck(lambda x: step(x, quantize=False), images)


def test_input_is_not_modified_and_precision_is_kept():
    images = torch.rand(1, 3, 30, 20, dtype=torch.float64)
    before = images.clone()
    assert pre.Preprocess(goal=8, pad=pre.CLIP_MEAN)(images, quantize=False).dtype == torch.float64
    assert torch.equal(images, before)
    assert pre.Preprocess(goal=8)(images.bfloat16(), quantize=False).dtype == torch.float32


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(3, 8, 8), r"\(B, 3, H, W\)"),
        (torch.rand(1, 4, 8, 8), r"\(B, 3, H, W\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "floats in"),
        (torch.rand(1, 3, 0, 8), "1 to 16384"),
        (torch.linspace(2, 255, 192).view(1, 3, 8, 8), "pixels from 2 to 255: pass floats in"),
        (torch.linspace(-1, 1, 192).view(1, 3, 8, 8), "pixels from -1 to 1: pass floats in"),
        (torch.rand(1, 3, 1, 8000), "crop it first"),
    ],
)
def test_input_that_is_no_image_is_refused(images, message):
    with pytest.raises(ValueError, match=message):
        pre.Preprocess()(images, quantize=True)


def test_a_batch_of_none_stays_empty():
    assert pre.Preprocess()(torch.rand(0, 3, 50, 40), quantize=True).shape == (0, 3, 224, 224)


class Mean:
    """A reward of the simplest kind, with an extra."""

    @pre.on_images("squares")
    def __call__(self, images, prompts, metadata):
        return images.mean((1, 2, 3)), {"squares": images.square().mean((2, 3))}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_an_image_that_is_not_finite_has_no_score_and_leaves_the_others_alone(bad):
    images = torch.rand(3, 3, 6, 5, dtype=torch.float64)
    images[1, 2, 3, 4] = bad
    values, extras = Mean()(images.requires_grad_(), [""] * 3, [{}] * 3)
    assert values.isnan().tolist() == [False, True, False]
    assert extras["squares"].isnan().all(1).tolist() == [False, True, False]
    assert values[0] == images[0].mean()
    assert torch.equal(extras["squares"][2], images[2].square().mean((1, 2)))
    (gradient,) = torch.autograd.grad(values[[0, 2]].sum(), images)
    assert gradient[1].abs().max() == 0
    assert gradient[0].sum().item() == pytest.approx(1.0)


def test_a_batch_of_none_has_scores_and_extras_of_none():
    values, extras = Mean()(torch.rand(0, 3, 8, 8), [], [])
    assert values.shape == extras["squares"].shape == (0,)


def test_every_image_needs_a_prompt():
    with pytest.raises(ValueError, match="2 images for 1 prompts: pass one prompt per image"):
        Mean()(torch.rand(2, 3, 8, 8), [""], [{}])


@pytest.mark.parametrize(
    "name", ["brightness", "sharpness", "jpeg_compressibility", "jpeg_incompressibility", "shapes", "shapes_strict"]
)
def test_rewards_without_weights_check_their_images_too(name):
    reward, metadata = get_reward(name), [{"include": [{"class": "circle", "count": 1}]}] * 2
    images = torch.rand(2, 3, 64, 64)
    with pytest.raises(ValueError, match=r"pixels from .*: pass floats in"):
        reward(images * 255, ["", ""], metadata)
    with pytest.raises(ValueError, match=r"images are torch\.uint8"):
        reward((images * 255).byte(), ["", ""], metadata)
    images[0, 0, 0] = torch.nan
    assert reward(images, ["", ""], metadata).isnan().tolist() == [True, False]


def test_the_nearest_of_256_levels_is_taken_halves_upwards():
    every = torch.arange(256)
    assert torch.equal(pre.to_bytes(every / 255), every.byte())
    assert torch.equal(pre.to_bytes((every[:-1] + 0.51) / 255), every[1:].byte())
    assert pre.to_bytes(torch.tensor([0.5, -1.0, 2.0])).tolist() == [128, 0, 255]
