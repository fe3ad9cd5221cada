import json

import pytest
import torch

from diffalign.losses.bco import RewardShift, bco

LIKED = torch.tensor([True, False, True, True])


def test_the_shift_is_a_constant(make_denoised):
    d = make_denoised()
    bco(d, LIKED, beta=1.0, shift=d.gain.mean())[0].backward()
    assert torch.equal(d.output.grad.flatten(1).any(1), torch.tensor([True, False, False, False]))


def test_the_loss_bounds_that_of_dpo(make_denoised):
    winner, loser = make_denoised(1), make_denoised(2)
    everyone = torch.ones(4, dtype=torch.bool)
    for shift in (-0.5, 0.0, 2.0):
        both = bco(winner, everyone, beta=3.0, shift=shift) + bco(loser, ~everyone, beta=3.0, shift=shift)
        assert (both > -torch.nn.functional.logsigmoid(3 * (winner.gain - loser.gain))).all()


def test_the_shift_lies_halfway_between_the_means_of_both_sides():
    shift = RewardShift(0.9)
    assert shift.value == 0
    assert shift.update(torch.tensor([1.0, -4.0, 2.0, 3.0]), LIKED) == (2 - 4) / 2
    # then means of 4 and of nothing: liked (0.9 * 0.1 * 2 + 0.1 * 4) / 0.19, disliked as it was
    value = shift.update(torch.full((4,), 4.0), torch.ones(4, dtype=torch.bool))
    assert float(value) == pytest.approx(((0.18 + 0.4) / 0.19 - 4) / 2, rel=1e-6)


def test_a_sample_that_is_left_out_moves_no_mean():
    counted, shift = torch.tensor([1.0, 1.0, 0.0, 1.0]), RewardShift(0.9)
    assert shift.update(torch.tensor([1.0, -4.0, 90.0, 3.0]), LIKED, counted) == (2 - 4) / 2
    assert shift.update(torch.tensor([9.0, 9.0, 9.0, 9.0]), LIKED, torch.zeros(4)) == (2 - 4) / 2


def test_a_side_never_seen_has_the_mean_zero():
    assert RewardShift().update(torch.tensor([3.0, 5.0]), torch.tensor([True, True])) == 2


def test_a_shift_continues_to_the_last_bit():
    first, second = RewardShift(), RewardShift()
    first.update(torch.tensor([0.1, 0.2, 0.3, 0.7]), LIKED)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert first.value == second.value
    rewards = torch.tensor([0.15, -0.2, 0.33, 0.1])
    assert first.update(rewards, LIKED) == second.update(rewards, LIKED)
