import math

import pytest
import torch
from PIL import Image, ImageColor, ImageFont

from diffalign.report.grids import CELL, FONT, GREEN, RED, TEXT_WIDTH, _wrap, compare_grid, image_grid

COLORS = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
IMAGES = COLORS[:, :, None, None].expand(-1, -1, 64, 64)


def count(picture, color):
    """Pixels of exactly ``color``."""
    rgb = ImageColor.getrgb(color) if isinstance(color, str) else color
    return sum(n for n, value in picture.convert("RGB").getcolors(1 << 24) if value == rgb)


def compare(tmp_path, columns, prompts, scores):
    compare_grid(columns, prompts, scores, tmp_path / "compare.png")
    with Image.open(tmp_path / "compare.png") as picture:
        return picture.convert("RGB")


def test_images_lie_row_by_row_and_are_enlarged():
    grid = image_grid(IMAGES, 3, scale=2)
    assert grid.size == (8 + 3 * 136, 8 + 2 * 136)
    places = [(8, 8), (144, 8), (280, 8), (8, 144)]
    for (x, y), color in zip(places, (COLORS * 255).int().tolist(), strict=True):
        assert grid.crop((x, y, x + 128, y + 128)).getcolors() == [(128 * 128, tuple(color))]


def test_labels_are_written_below_and_cut_to_the_cell():
    bare = image_grid(IMAGES[:1], 1)
    labelled = image_grid(IMAGES[:1], 1, labels=["a label that is much too long for the image above it"])
    assert labelled.width == bare.width
    assert labelled.height == bare.height + FONT + 6
    strip = labelled.crop((0, 137, labelled.width, labelled.height))
    assert count(strip, "#ffffff") < strip.width * strip.height - 200
    assert strip.crop((0, 0, 8, strip.height)).getcolors() == [(8 * strip.height, (255, 255, 255))]


def test_values_out_of_range_or_not_finite_do_not_wrap_round():
    images = torch.tensor([2.0, -1.0, math.nan]).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    grid = image_grid(images, 3, scale=1)
    assert [grid.getpixel((8 + 10 * i, 8))[0] for i in range(3)] == [255, 0, 0]


@pytest.mark.parametrize(("columns", "options"), [(0, {}), (2, {"scale": 0}), (2, {"labels": ["one"]})])
def test_a_grid_that_cannot_be_is_refused(columns, options):
    with pytest.raises(ValueError, match=r"at least 1|one label per image"):
        image_grid(IMAGES, columns, **options)


def test_a_comparison_has_a_row_per_prompt_and_a_column_per_model(tmp_path):
    picture = compare(tmp_path, {"base": IMAGES[:2], "tuned": IMAGES[2:]}, ["a cat", "a dog"], None)
    assert picture.width == TEXT_WIDTH + 16 + 2 * (CELL[0] + 8)
    centres = [(216 + 136 * j + 64, 40 + 8 + 136 * i + 64) for j in range(2) for i in range(2)]
    assert [picture.getpixel(place) for place in centres] == [tuple(c) for c in (COLORS * 255).int().tolist()]


def test_right_and_wrong_are_marked_green_and_red(tmp_path):
    columns = {"base": IMAGES[:2], "tuned": IMAGES[2:]}
    scores = {"base": {"r": torch.tensor([0.0, math.nan])}, "tuned": {"r": torch.tensor([1.0, 1.0])}}
    picture = compare(tmp_path, columns, ["a cat", "a dog"], scores)
    left, right = picture.crop((216, 0, 344, picture.height)), picture.crop((352, 0, 480, picture.height))
    assert count(left, RED) > 20
    assert count(left, GREEN) == 0
    assert count(right, GREEN) > 40
    assert count(right, RED) == 0


def test_numbers_are_written_and_the_best_of_a_row_is_green(tmp_path):
    columns = {"base": IMAGES[:2], "tuned": IMAGES[2:]}
    scores = {"base": {"r": torch.tensor([0.25, 0.5])}, "tuned": {"r": torch.tensor([0.75, 0.5])}}
    picture = compare(tmp_path, columns, ["a cat", "a dog"], scores)
    left, right = picture.crop((216, 0, 344, picture.height)), picture.crop((352, 0, 480, picture.height))
    assert count(right, GREEN) > 0
    assert count(left, GREEN) == count(left, RED) == count(right, RED) == 0
    assert count(right.crop((0, right.height // 2 + 20, 128, right.height)), GREEN) == 0  # a tie has no best


def test_several_rewards_have_a_named_line_each(tmp_path):
    scores = {"base": {"right": torch.tensor([0.0]), "nice": torch.tensor([0.25])}}
    scores["tuned"] = {"right": torch.tensor([1.0]), "nice": torch.tensor([0.75])}
    columns = {"base": IMAGES[:1], "tuned": IMAGES[2:3]}
    picture = compare(tmp_path, columns, ["a cat"], scores)
    one = compare(tmp_path, columns, ["a cat"], {name: {"nice": own["nice"]} for name, own in scores.items()})
    assert picture.height == one.height + 2 * FONT + 14  # a line below the image, a mean in the header
    assert count(picture.crop((216, 0, 344, picture.height)), RED) > 20
    assert count(picture.crop((352, 0, 480, picture.height)), GREEN) > 40


def test_a_long_prompt_is_wrapped_and_makes_its_row_taller(tmp_path):
    long = "a photo of " + "very " * 150 + "many words"
    picture = compare(tmp_path, {"base": IMAGES[:1]}, [long], None)
    assert picture.height > compare(tmp_path, {"base": IMAGES[:1]}, ["short"], None).height + 100
    lines = _wrap(long + " " + "x" * 300, TEXT_WIDTH)
    font = ImageFont.load_default(FONT)
    assert max(font.getlength(line) for line in lines) <= TEXT_WIDTH
    assert "".join(lines).replace(" ", "") == long.replace(" ", "") + "x" * 300


def test_large_images_shrink(tmp_path):
    picture = compare(tmp_path, {"base": torch.rand(1, 3, 512, 512)}, ["a cat"], None)
    assert picture.width == TEXT_WIDTH + 16 + CELL[1] + 8


@pytest.mark.parametrize(
    ("columns", "prompts", "scores"),
    [
        ({}, ["a"], None),
        ({"base": IMAGES}, ["a"], None),
        ({"base": IMAGES[:1]}, ["a"], {}),
        ({"base": IMAGES[:1]}, ["a"], {"base": {"r": torch.zeros(2)}}),
    ],
)
def test_a_comparison_with_holes_is_refused(tmp_path, columns, prompts, scores):
    with pytest.raises(ValueError, match=r"at least one of each|one image per prompt|for each column"):
        compare_grid(columns, prompts, scores, tmp_path / "compare.png")
