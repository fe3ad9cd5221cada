"""The loop's small functions by hand; the loop itself runs in the trainers' tests."""

import pytest
import torch

from diffalign.runtime.optimizers import lr_factor
from diffalign.runtime.progress import crossed, progress
from diffalign.runtime.state import indexed, restore


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25]),
        ("cosine", [1 / 3, 2 / 3, 1, 0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5]),
    ],
)
def test_learning_rate_by_hand(name, expected):
    assert [lr_factor(name, k, 2, 6) for k in range(6)] == pytest.approx(expected)
    assert lr_factor(name, 0, 0, 6) == 1


def test_a_multiple_is_crossed_once():
    assert [crossed(a, a + 2, 5) for a in range(0, 12, 2)] == [False, False, True, False, True, False]
    assert not crossed(0, 100, 0)


def test_tensors_by_position_come_back():
    tensors = [torch.ones(2), torch.zeros(3)]
    other = [torch.empty(2), torch.empty(3)]
    restore(other, indexed(tensors))
    assert all(torch.equal(a, b) for a, b in zip(tensors, other, strict=True))
    with pytest.raises(ValueError, match="holds 2 tensors, this run trains 1"):
        restore(other[:1], indexed(tensors))


def test_progress_shows_what_there_is():
    assert progress({"reward/mean": 0.51234, "kl": 0.001, "loss": 3.0}) == "reward 0.512 kl 0.001"
