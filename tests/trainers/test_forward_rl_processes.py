"""The same forward-process RL in one process and in two, between which groups are split."""

import pytest
from safetensors.torch import load_file

from tests.reliability.forks import finished
from tests.trainers.short_forward_rl import write


@pytest.mark.parametrize(
    ("preset", "updates"),
    [("dgpo", 1), *(pytest.param(*one, marks=pytest.mark.slow) for one in (("nft", 1), ("crd", 2), ("v_grpo", 2)))],
)
def test_two_processes_do_what_one_does(preset, updates, tmp_path):
    """Sums over groups, shared noise and times, filters and copies."""
    for count in (1, 2):
        finished(count, tmp_path / str(count), write, preset, updates)
    one, first, second = (load_file(tmp_path / name) for name in ("1/0.safetensors", "2/0.safetensors",
                                                                  "2/1.safetensors"))  # fmt: skip
    assert (one["world"], first["world"], second["world"]) == (1, 2, 2)
    for name in (name for name in one if name != "world"):
        assert (first[name] - second[name]).abs().max() == 0, f"the processes disagree on {name}"
        bound = 1e-5 * one[name].norm() if name.startswith("grad/") else 1e-5
        assert (first[name] - one[name]).norm() <= bound, name
