import pytest
import torch

from diffalign.evaluation.diversity import pairwise_distance


def flat(*values):
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, 4, 5)


def test_closed_form_of_constant_images():
    # Group 0: pairs 0.5, 1, 0.5; group 7: one pair, 0.2; group 3: no pair.
    images = flat(0.0, 0.6, 0.5, 1.0, 0.8, 0.1)
    groups = torch.tensor([0, 7, 0, 0, 7, 3])
    assert pairwise_distance(images, groups) == pytest.approx((2 / 3 + 0.2) / 2, rel=1e-6)


def test_it_is_the_root_of_the_mean_square():
    images = torch.zeros(2, 3, 2, 2)
    images[1, 0] = 0.6  # a third of the values differ
    assert pairwise_distance(images, torch.zeros(2)) == pytest.approx(0.6 / 3**0.5, rel=1e-6)


def test_black_against_white_is_one_and_copies_are_zero():
    groups = torch.tensor([0, 0])
    assert pairwise_distance(flat(0.0, 1.0), groups) == pytest.approx(1)
    assert pairwise_distance(flat(0.3, 0.3), groups) == 0


def test_at_least_two_images_of_a_prompt_are_needed():
    with pytest.raises(ValueError, match="sample at least two per prompt"):
        pairwise_distance(flat(0.0, 1.0), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="one id per image"):
        pairwise_distance(flat(0.0, 1.0), torch.tensor([0]))
