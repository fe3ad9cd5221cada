import math

import pytest
import torch
from torch.nn.functional import avg_pool2d

from diffalign.shapes import Object, render
from diffalign.shapes.scene import BACKGROUND, COLORS, SHAPES

PAPER = torch.tensor(BACKGROUND) / 255


def paint(color):
    return torch.tensor(COLORS[color]) / 255


def cover(image, color):
    """How much of each pixel is painted, from the channel in which paint and paper differ most."""
    channel = int((paint(color) - PAPER).abs().argmax())
    return (image[channel] - PAPER[channel]) / (paint(color)[channel] - PAPER[channel])


@pytest.mark.parametrize(
    ("shape", "unit_area"),
    [("circle", math.pi * 0.92**2), ("square", 1.6**2), ("triangle", 3 * 3**0.5 / 4)],
)
@pytest.mark.parametrize(("x", "y", "radius"), [(32, 32, 12), (30.3, 33.8, 12.7), (20.5, 41.1, 8.2)])
def test_painted_area_is_that_of_the_outline(shape, unit_area, x, y, radius):
    painted = cover(render([[Object(shape, "blue", x, y, radius)]])[0], "blue")
    assert float(painted.sum()) == pytest.approx(unit_area * radius**2, rel=0.02)
    partly = ((painted > 0.01) & (painted < 0.99)).sum()
    assert partly < 12 * radius  # only pixels on the outline are mixed


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_lies_around_its_centre_upright(shape):
    painted = cover(render([[Object(shape, "red", 24.0, 30.0, 12.0)]])[0], "red")
    axis = torch.arange(64) + 0.5
    assert float((painted.sum(0) * axis).sum() / painted.sum()) == pytest.approx(24, abs=0.02)
    assert float((painted.sum(1) * axis).sum() / painted.sum()) == pytest.approx(30, abs=0.1)
    above, below = float(painted[:30].sum()), float(painted[30:].sum())
    # Above its centre, a triangle has the smaller similar one of 2/3 its height: 4/9 of the area.
    assert above / (above + below) == pytest.approx(4 / 9 if shape == "triangle" else 0.5, abs=0.01)


def test_form_range_and_exact_colours():
    image = render([[Object("circle", "green", 32, 32, 12)], []])
    assert image.shape == (2, 3, 64, 64)
    assert image.dtype == torch.float32
    assert 0 <= image.min() <= image.max() <= 1
    torch.testing.assert_close(image[0, :, 32, 32], paint("green"))
    torch.testing.assert_close(image[0, :, 0, 0], PAPER)
    assert torch.equal(image[1], PAPER.view(3, 1, 1).expand(3, 64, 64))


def test_later_objects_cover_earlier_ones():
    red, blue = Object("circle", "red", 32, 32, 12), Object("square", "blue", 32, 32, 5)
    over, under = render([[red, blue], [blue, red]])
    torch.testing.assert_close(over[:, 32, 32], paint("blue"))
    torch.testing.assert_close(under[:, 32, 32], paint("red"))


def test_a_batch_equals_its_images():
    scenes = [
        [Object("circle", "red", 20, 20, 9), Object("triangle", "cyan", 45, 40, 10)],
        [],
        [Object("square", "yellow", 30, 30, 9)],
    ]
    assert torch.equal(render(scenes), torch.cat([render([scene]) for scene in scenes]))


def test_a_larger_rendering_shows_the_same_scene():
    scene = [[Object("circle", "purple", 20.3, 22.1, 10), Object("triangle", "cyan", 45, 42.7, 11)]]
    small, large = render(scene), render(scene, size=256)
    assert large.shape == (1, 3, 256, 256)
    assert (avg_pool2d(large, 4) - small).abs().max() < 0.15
