"""Indicators of reward hacking: sharpness in closed form, and the plot."""

import pytest
import torch

from diffalign.evaluation.hacking import plot_hacking
from diffalign.evaluation.sharpness import sharpness

IMAGES = 0.3 + 0.4 * torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_a_linear_reward_falls_by_the_step_times_its_slope():
    slope = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = sharpness(lambda x: (x * slope).sum((1, 2, 3)), IMAGES, 0.01)
    # The step is 0.01 g / rms(g), so the fall is 0.01 |g|^2 / rms(g) = 0.01 |g| sqrt(D).
    expected = 0.01 * slope.norm() * slope.numel() ** 0.5
    torch.testing.assert_close(found, expected.expand(3))


def test_curvature_counts():
    """r = -c |x - 1/2|^2 / 2: the gradient is -c (x - 1/2), and the step goes on away from the top."""
    for c in (1.0, 10.0):
        found = sharpness(lambda x, c=c: -c * (x - 0.5).square().sum((1, 2, 3)) / 2, IMAGES, 0.01)
        gone = (IMAGES - 0.5).square().sum((1, 2, 3)).sqrt()
        step = 0.01 * IMAGES[0].numel() ** 0.5
        torch.testing.assert_close(found, c * ((gone + step).square() - gone.square()) / 2)


def test_a_hacked_reward_is_sharper_than_an_honest_one_of_the_same_value():
    honest = lambda x: x.mean((1, 2, 3))  # noqa: E731
    pattern = (torch.arange(8) % 2 * 2.0 - 1).double()
    hacked = lambda x: x.mean((1, 2, 3)) + 5 * (x * pattern).mean((1, 2, 3))  # noqa: E731
    assert (sharpness(hacked, IMAGES, 0.01) > 3 * sharpness(honest, IMAGES, 0.01)).all()


def test_a_step_leaves_no_image_behind_and_a_flat_reward_nothing_to_lose():
    seen = []

    def score(x):
        seen.append(x.detach())
        return 100 * x.sum((1, 2, 3))

    sharpness(score, torch.zeros(1, 3, 4, 4), 0.5)
    assert seen[-1].min() >= 0
    assert (sharpness(lambda x: (0 * x).sum((1, 2, 3)), IMAGES) == 0).all()


def test_evaluations_are_drawn_together(tmp_path):
    names = ("accuracy", "pickscore", "hpsv2.1", "diversity", "reference_distance", "sharpness/pickscore", "alarm")
    rows = [{"step": 10, "loss": 1.0}]
    rows += [{"step": step, **{f"eval/{name}": step / 10 + 1 for name in names}} for step in (0, 10, 20)]
    drawn = plot_hacking(rows, tmp_path / "hacking.png", ["pickscore"], ["hpsv2.1", "missing"])
    assert drawn == [
        "pickscore", "accuracy", "hpsv2.1", "diversity", "reference_distance", "sharpness/pickscore"
    ]  # fmt: skip
    assert (tmp_path / "hacking.png").stat().st_size > 10000
    with pytest.raises(ValueError, match="no evaluation to plot"):
        plot_hacking(rows[:1], tmp_path / "none.png", [], [])
