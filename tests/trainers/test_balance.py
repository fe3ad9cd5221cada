"""Samples that teach are shared evenly by all processes, and their gradient is that of all samples."""

import pytest
import torch
from safetensors.torch import load_file

from diffalign.runtime.tracking import MetricsLog
from tests.reliability.forks import finished
from tests.trainers.short_balance import seen, write


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return folder, [seen(folder)]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = finished(2, tmp_path_factory.mktemp("both"), write)
    return folder, [load_file(folder / f"{rank}.safetensors") for rank in (0, 1)]


def test_a_process_makes_as_many_passes_of_as_many_samples_as_the_other(alone, both):
    """Four of eight samples teach: two passes of two in one process, one in each of two; two steps are trained."""
    assert [found["few/passes"].tolist() for found in alone[1]] == [[2, 2, 2, 2]]
    assert [found["few/passes"].tolist() for found in both[1]] == [[2, 2]] * 2
    assert [len(found["all/passes"]) for found in (*alone[1], *both[1])] == [8, 4, 4]


def test_the_gradient_of_few_is_that_of_all(alone, both):
    expected = alone[1][0]["all/gradient"]
    assert expected.norm() > 0
    for found in (*alone[1], *both[1]):
        for name in ("all", "few"):
            assert (found[f"{name}/gradient"] - expected).norm() < 1e-5 * expected.norm(), name


def test_an_iteration_that_teaches_nothing_moves_no_weight_in_any_process(alone, both):
    for (folder, outcomes), saved in ((alone, [6.0, 4.0]), (both, [2.0, 2.0])):
        rows = [row for row in MetricsLog.read(folder / "run/metrics.jsonl") if "loss" in row]
        assert [row["passes_saved"] for row in rows] == saved
        assert [row.get("skipped") for row in rows] == [1.0, None]
        assert [row["grad_norm"] > 0 for row in rows] == [False, True]
        assert all(torch.equal(found["after"], outcomes[0]["after"]) for found in outcomes)
        assert not torch.equal(outcomes[0]["after"], outcomes[0]["before"])
