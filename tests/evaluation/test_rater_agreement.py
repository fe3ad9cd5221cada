"""Agreement of raters, against published examples."""

import math

import pytest

from diffalign.evaluation.rater_agreement import cohen_kappa, krippendorff_alpha, pairwise_kappa

# Krippendorff, Computing Krippendorff's alpha-reliability (2011), part C: four observers, twelve units.
OBSERVERS = ["123321412...", "1233224125.3", ".3332342251.", "1233244125 1.".replace(" ", "")]


def test_cohens_example():
    """Two raters, 50 items: 20 both yes, 15 both no, 5 and 10 differ: kappa = 0.4."""
    first = ["y"] * 25 + ["n"] * 25
    second = ["y"] * 20 + ["n"] * 5 + ["y"] * 10 + ["n"] * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4)


def test_krippendorffs_example():
    units = [[answer for answer in column if answer != "."] for column in zip(*OBSERVERS, strict=True)]
    assert krippendorff_alpha(units) == pytest.approx(0.743, abs=5e-4)


@pytest.mark.parametrize(("items", "value"), [([[1, 1], [0, 0]], 1.0), ([[1, 0], [1, 0]], -0.5), ([[1, 1]], math.nan),
                                              ([], math.nan), ([[1], [0]], math.nan)])  # fmt: skip
def test_alpha_at_its_ends(items, value):
    assert krippendorff_alpha(items) == pytest.approx(value, nan_ok=True)


def test_kappa_at_its_ends():
    assert cohen_kappa([1, 0, 1], [1, 0, 1]) == 1
    assert cohen_kappa([1, 0], [0, 1]) == -1
    assert math.isnan(cohen_kappa([1, 1], [1, 1]))
    assert math.isnan(cohen_kappa([], []))
    with pytest.raises(ValueError, match="1 and 2 answers"):
        cohen_kappa([1], [1, 0])


def test_kappa_of_each_two_raters_counts_common_items():
    found = pairwise_kappa({"a": {"x": 1, "y": 0, "z": 1}, "b": {"x": 1, "y": 0}, "c": {"w": 1}})
    assert found == {("a", "b"): (1.0, 2)}
