import pytest
import torch

from diffalign.evaluation.accuracy import summarise

TAGS = ["colors", "position", "colors", "colors"]


@pytest.mark.parametrize("strict", [[True, False, False, True], torch.tensor([1.0, 0.0, 0.0, 1.0])])
def test_means_over_images_and_per_tag(strict):
    result = summarise(strict, TAGS)
    assert result == {"accuracy": 0.5, "accuracy/colors": pytest.approx(2 / 3), "accuracy/position": 0.0}
    assert list(result) == ["accuracy", "accuracy/colors", "accuracy/position"]


@pytest.mark.parametrize(("strict", "tags"), [([], []), ([True], TAGS)])
def test_nothing_to_count_is_refused(strict, tags):
    with pytest.raises(ValueError, match="one tag per image"):
        summarise(strict, tags)


def test_images_without_a_verdict_are_left_out():
    found = summarise(torch.tensor([1.0, torch.nan, 0.0, torch.nan]), ["a", "a", "a", "b"])
    assert found["accuracy"] == found["accuracy/a"] == 0.5
    assert found["accuracy/b"] != found["accuracy/b"]
