"""ICT, HP and their product, by which of the two weights are given."""

import pytest

from diffalign.rewards.ict_hp import ict_hp


@pytest.mark.parametrize("left_out", [None, ""])
def test_weights_that_are_left_out_are_not_loaded(left_out):
    assert ict_hp("hp", ict=left_out).ict is None
    assert ict_hp("hp", ict=left_out).range == (0.0, 1.0)
    assert ict_hp("ict", hp=left_out).hp is None


@pytest.mark.parametrize("left_out", [None, ""])
def test_one_of_the_two_is_needed(left_out):
    with pytest.raises(ValueError, match="give the weights of ict, of hp, or of both"):
        ict_hp("neither", ict=left_out, hp=left_out)
