"""Where latents wait, as far as a CPU can tell; tests/trainers/test_flow_grpo_gpu.py has the rest."""

import pytest
import torch

from diffalign import DiffusionDPOConfig, FlowGRPOConfig
from diffalign.diffusion.plan import PlanConfig
from diffalign.rollout import pinned_memory
from diffalign.runtime import checkpointer
from diffalign.trainers.cost import Share
from diffalign.trainers.registry import find_algorithm


@pytest.mark.parametrize(
    ("size", "device", "expected"),
    [
        (pinned_memory.ON_GPU, "cuda:1", False),
        (pinned_memory.ON_GPU + 1, "cuda:1", True),
        (pinned_memory.ON_GPU + 1, "cpu", False),
        (pinned_memory.ON_GPU + 1, "mps", False),
    ],
)
def test_what_is_large_waits_beside_a_gpu(size, device, expected):
    assert pinned_memory.pinned(size, torch.device(device)) == expected


def test_rows_there_and_back_are_the_rows():
    column, values = torch.zeros(6, 2, 3), torch.randn(3, 3, 2, dtype=torch.float64).transpose(1, 2)
    rows = torch.tensor([4, 0, 3])
    expected = column.clone()
    expected[rows] = values.float()
    for put in (pinned_memory.put, pinned_memory.put_rows):
        found = column.clone()
        put(found, rows, values)
        assert torch.equal(found, expected)
    for order in (rows, rows.flip(0)):
        assert torch.equal(pinned_memory.take_rows(expected, order, pin=False), expected[order])
        assert torch.equal(pinned_memory.take(expected, order, expected.device), expected[order])
    pinned_memory.settle(expected, expected.device)


class Together:
    """Stands in for two processes, of which the second has other rows."""

    num_processes, device = 2, torch.device("cpu")

    def gather(self, tensor):
        return torch.cat([tensor, tensor + 100])


@pytest.mark.parametrize("part", [1, 16, 1 << 26])
def test_a_checkpoint_has_the_rows_of_all_processes_however_they_travel(monkeypatch, part):
    monkeypatch.setattr(checkpointer, "PART", part)
    tensor = torch.arange(10.0).reshape(5, 2)
    assert torch.equal(checkpointer.gather_rows(Together(), tensor), torch.cat([tensor, tensor + 100]))
    assert torch.equal(
        checkpointer.gather_rows(Together(), tensor[:, 0]), torch.cat([tensor[:, 0], tensor[:, 0] + 100])
    )


def test_a_forecast_counts_what_a_card_holds(monkeypatch):
    plan = PlanConfig(preset="first_steps", num_steps=4, window_size=2)
    cases = {
        "flow_grpo": FlowGRPOConfig(plan=plan),
        "diffusion_dpo": DiffusionDPOConfig(train_prompts="prompts.txt", rewards={"brightness": 1.0}, plan=plan),
    }

    def stored():
        return [find_algorithm(name).cost.stored(args, (4, 8, 8), Share()) for name, args in cases.items()]

    whole = stored()
    size = 256 * 4 * 4 * 8 * 8 * 4
    assert whole[0] == size < whole[1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(pinned_memory, "ON_GPU", size)
    assert stored() == whole
    monkeypatch.setattr(pinned_memory, "ON_GPU", size - 1)
    assert stored() == [0, 0]
