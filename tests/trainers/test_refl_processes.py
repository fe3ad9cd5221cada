"""ReFL in one process and in two: the same courses, noise and weights."""

import pytest
import torch
from safetensors.torch import load_file

from tests.reliability.forks import finished
from tests.trainers.short_refl import write


@pytest.mark.parametrize("preset", ["alignprop", pytest.param("reneg", marks=pytest.mark.slow)])
def test_two_processes_do_what_one_does(tmp_path, preset):
    alone, both = (finished(count, tmp_path / str(count), write, preset) for count in (1, 2))
    one, first, second = map(load_file, (alone / "0.safetensors", both / "0.safetensors", both / "1.safetensors"))
    assert (one["world"], first["world"], second["world"]) == (1, 2, 2)
    assert torch.equal(torch.cat([first["courses"], second["courses"]]), one["courses"])
    for name in (name for name in one if name.startswith("weight/")):
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], one[name], rtol=0, atol=2e-5)
