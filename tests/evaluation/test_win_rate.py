import numpy as np
import pytest
import torch

from diffalign.evaluation.win_rate import mean_interval, win_rate


def test_by_hand_with_ties_and_missing_scores():
    ours = torch.tensor([1.0, 0.0, 2.0, torch.nan, 3.0])
    theirs = torch.tensor([0.0, 0.0, 3.0, 1.0, 1.0])
    found = win_rate(ours, theirs, torch.tensor([0, 0, 1, 1, 2]))
    assert (found.wins, found.ties, found.losses) == (2, 1, 1)
    assert found.rate.mean == pytest.approx((0.75 + 0 + 1) / 3)  # over prompts, not over images


def test_against_itself_it_is_one_half_without_doubt():
    scores = torch.rand(60, generator=torch.Generator().manual_seed(0))
    found = win_rate(scores, scores, torch.arange(60) // 2)
    assert (found.rate.mean, found.rate.low, found.rate.high) == (0.5, 0.5, 0.5)
    assert found.ties == 60


def test_the_two_sides_mirror_each_other():
    rng = torch.Generator().manual_seed(1)
    a, b, prompts = torch.rand(90, generator=rng), torch.rand(90, generator=rng), torch.arange(90) // 3
    there, back = win_rate(a, b, prompts).rate, win_rate(b, a, prompts).rate
    assert there.mean == pytest.approx(1 - back.mean)
    assert (there.low, there.high) == pytest.approx((1 - back.high, 1 - back.low))


@pytest.mark.slow
def test_the_interval_covers_the_truth():
    """Images of a prompt agree with each other: an interval that took them for independent would cover too rarely."""
    rng = np.random.default_rng(0)
    covered = trials = 300
    for trial in range(trials):
        per_prompt = rng.beta(1.2, 0.8, 80)  # mean 0.6
        wins = rng.random((80, 4)) < per_prompt[:, None]
        ours = torch.from_numpy(wins.astype(np.float64)).flatten()
        rate = win_rate(ours, torch.full_like(ours, 0.5), torch.arange(320) // 4, seed=trial).rate
        covered -= not rate.low <= 0.6 <= rate.high
    assert 0.91 <= covered / trials <= 0.985  # 95 %, within three deviations of 300 trials and the bootstrap's own bias


def test_a_planted_better_model_is_found():
    rng = torch.Generator().manual_seed(2)
    base = torch.randn(400, generator=rng)
    better = base + 0.3 + 0.5 * torch.randn(400, generator=rng)
    assert win_rate(better, base, torch.arange(400) // 2).rate.low > 0.5


def test_mean_interval_is_that_of_the_normal_law():
    values = torch.randn(500, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = mean_interval(values, torch.arange(500))
    assert found.mean == pytest.approx(values.mean().item())
    half = 1.96 * values.std().item() / 500**0.5
    assert (found.low, found.high) == pytest.approx((found.mean - half, found.mean + half), abs=0.1 * half)


@pytest.mark.parametrize(
    ("ours", "theirs", "groups", "message"),
    [
        (torch.zeros(2), torch.zeros(3), torch.zeros(2), "2 and 3 rewards"),
        (torch.full((2,), torch.nan), torch.zeros(2), torch.zeros(2), "no finite reward"),
    ],
)
def test_what_cannot_be_compared_is_refused(ours, theirs, groups, message):
    with pytest.raises(ValueError, match=message):
        win_rate(ours, theirs, groups)


def test_a_confidence_outside_its_range_is_refused():
    with pytest.raises(ValueError, match="confidence"):
        win_rate(torch.ones(2), torch.zeros(2), torch.arange(2), confidence=95)


def test_each_image_counts_alike_in_a_mean():
    values = torch.tensor([1.0, torch.nan, 0.0, 0.0, 1.0, 0.0])
    found = mean_interval(values, torch.tensor([0, 0, 1, 1, 2, 2]))
    assert found.mean == pytest.approx(2 / 5)
    assert found.low <= found.mean <= found.high
