"""ReFL in one process and in two: the same courses, noise and weights."""

import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.trainers.test_flow_grpo_processes import launcher_command, train


@pytest.mark.parametrize("preset", ["alignprop", pytest.param("reneg", marks=pytest.mark.slow)])
def test_two_processes_do_what_one_does(tmp_path, preset):
    script = ("tests/trainers/short_refl.py", preset)
    alone = train([sys.executable], tmp_path / "alone", script)
    both = train(launcher_command("torchrun"), tmp_path / "both", script)
    one, first, second = map(load_file, (alone / "0.safetensors", both / "0.safetensors", both / "1.safetensors"))
    assert (one["world"], first["world"], second["world"]) == (1, 2, 2)
    assert torch.equal(torch.cat([first["courses"], second["courses"]]), one["courses"])
    for name in (name for name in one if name.startswith("weight/")):
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], one[name], rtol=0, atol=2e-5)
