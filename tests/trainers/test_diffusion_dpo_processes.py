"""Diffusion-DPO in one process and in two: the same pairs, noise and weights; each process draws noise of its own."""

import pytest
import torch
from safetensors.torch import load_file

from diffalign.runtime.tracking import MetricsLog
from tests.reliability.forks import finished
from tests.trainers.short_dpo import write


@pytest.mark.parametrize("loss", ["dpo", pytest.param("kto", marks=pytest.mark.slow)])
def test_two_processes_do_what_one_does(tmp_path, loss):
    alone, both = (finished(count, tmp_path / str(count), write, loss) for count in (1, 2))
    one, first, second = map(load_file, (alone / "0.safetensors", both / "0.safetensors", both / "1.safetensors"))
    assert (one["world"], first["world"], second["world"]) == (1, 2, 2)
    assert (alone / "0.txt").read_text() == "\n".join((both / f"{rank}.txt").read_text() for rank in (0, 1))
    torch.testing.assert_close(torch.cat([first["target"], second["target"]]), one["target"], rtol=0, atol=1e-5)
    assert (first["target"] - second["target"]).abs().min() > 0
    for name in (name for name in one if name.startswith("weight/")):
        assert torch.equal(first[name], second[name])
        if loss == "dpo":  # KTO's reference point is that of a batch, and batches of two processes are others
            torch.testing.assert_close(first[name], one[name], rtol=0, atol=1e-5)
    rows = [MetricsLog.read(folder / "run/metrics.jsonl") for folder in (alone, both)]
    assert len(rows[0]) == len(rows[1])
