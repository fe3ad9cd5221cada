"""Processes that find more examples in their rollouts, fewer or none: all make the same passes, and each example counts
alike."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from diffalign.data.rollouts import Pairing
from diffalign.losses.registry import get_loss
from diffalign.losses.unpaired import SingleObjective
from diffalign.rollout.buffer import RolloutBuffer
from diffalign.rollout.collector import Rollout
from diffalign.rollout.sampler import ode_plan
from diffalign.runtime.tracking import MetricsLog
from diffalign.structures import Prompt
from diffalign.trainers.diffusion_dpo.batches import RolloutSource
from tests.reliability.forks import finished
from tests.trainers.short_online import write


def examples_of(scores, counts, loss="kto"):
    """Those of one group on a process, where the processes have so many."""
    data = SimpleNamespace(rollouts=Pairing(rule="all"))
    config = SimpleNamespace(num_groups=len(counts), group_size=len(scores), data=data)
    run = SimpleNamespace(config=config, gather=lambda own: torch.tensor([[n, n] for n in counts]))
    group, sample = torch.zeros(len(scores), dtype=torch.long), torch.arange(len(scores))
    buffer = RolloutBuffer.allocate(ode_plan(2), group, sample, [Prompt("a")], (1, 1, 1))
    buffer.x = torch.arange(len(buffer.step)).float().reshape(-1, 1, 1, 1)
    buffer.set_rewards({"r": torch.tensor(scores)})
    source = RolloutSource(run, SimpleNamespace(weights={"r": 1.0}), get_loss(loss))
    return source.examples(Rollout(buffer, None, None))[0]


@pytest.mark.parametrize(("loss", "own", "most"), [("kto", 3, 5), ("dpo", 3, 5)])
def test_a_process_with_fewer_examples_repeats_some_without_weight(loss, own, most):
    found = examples_of([1.0, 2.0, 3.0], [own, most], loss)
    assert found.number == [found.number[i % own] for i in range(most)]
    assert torch.equal(found.latents[own:], found.latents[: most - own])
    assert torch.equal(found.label[own:], found.label[: most - own])
    # The mean over both processes of means of weighted losses is the mean over all examples.
    assert torch.equal(found.weight > 0, torch.arange(most) < own)
    assert found.weight[0] / most / 2 == pytest.approx(1 / (own + most))


def test_a_process_without_examples_keeps_company_and_counts_nothing():
    found = examples_of([1.0, 1.0, 1.0], [0, 4])
    assert len(found.texts) == len(found.latents) == len(found.number) == 4
    assert not found.weight.any()


def test_no_example_anywhere_is_one_without_weight():
    found = examples_of([1.0, 1.0, 1.0], [0, 0])
    assert found.weight.tolist() == [0.0]


def test_alone_every_example_has_the_weight_one():
    assert examples_of([1.0, 2.0, 3.0], [3]).weight.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("loss", ["kto", "bco"])
def test_what_is_known_of_the_batch_leaves_company_out(loss):
    class Alone:
        reduce = staticmethod(lambda own, how: own)
        gather = staticmethod(lambda own: own)

    gain, liked = torch.tensor([0.3, 0.1, -0.2, 7.0]), torch.tensor([True, False, True, True])
    weight = torch.tensor([2.0, 2.0, 2.0, 0.0])
    found = [
        SingleObjective(loss, {}, Alone())(SimpleNamespace(gain=gain[:n]), liked[:n], 2.0, weight[:n]) for n in (3, 4)
    ]
    assert torch.equal(found[0], found[1][:3])
    z = gain[:3].mean() if loss == "kto" else None
    if z is not None:
        assert found[0][0].item() == pytest.approx(1 - torch.sigmoid(2 * (gain[0] - z)).item(), rel=1e-6)


@pytest.mark.slow
def test_single_images_in_two_processes_do_what_they_do_in_one(tmp_path):
    alone, both = (finished(count, tmp_path / str(count), write) for count in (1, 2))
    one, first, second = map(load_file, (alone / "0.safetensors", both / "0.safetensors", both / "1.safetensors"))
    assert (one.pop("world"), first.pop("world"), second.pop("world")) == (1, 2, 2)
    assert one["shift/bco"] != 0
    for name in one:
        assert torch.equal(first[name], second[name]), f"the processes disagree on {name}"
        torch.testing.assert_close(first[name], one[name], rtol=0, atol=5e-5)  # of three steps of 3e-4
    for loss in ("kto", "bco"):
        logs = [MetricsLog.read(folder / loss / "metrics.jsonl") for folder in (alone, both)]
        rows = [[row for row in log if "loss" in row] for log in logs]
        assert len(rows[0]) == 3
        for single, double in zip(*rows, strict=True):
            for name in ("loss", "grad_norm", "pairs"):
                assert double[name] == pytest.approx(single[name], rel=1e-3), name
