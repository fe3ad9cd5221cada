"""Samples that teach, dealt over processes."""

import pytest
import torch

from diffalign.rollout.load_balancing import at_home, deal


def table(*rows):
    return torch.tensor([[mark == "x" for mark in row] for row in rows])


@pytest.mark.parametrize(
    ("rows", "dealt"),
    [
        (["xx.x"], [[0, 1, 3]]),
        (["...."], [[0]]),
        (["....", "...."], [[0], [4]]),
        (["xxxx", "...."], [[0, 1], [2, 3]]),
        (["....", "xx.."], [[5], [4]]),
        (["x.x.", ".x.x"], [[0, 2], [5, 7]]),
        (["xxx.", "...."], [[0, 1], [2, 4]]),
        (["xxxx", "x...", "..x."], [[0, 1], [2, 4], [3, 10]]),
        (["xxxx", "xxx."], [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ],
)
def test_shares_by_hand(rows, dealt):
    assert deal(table(*rows)).tolist() == dealt


def test_every_sample_that_teaches_is_dealt_once_and_few_move():
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        processes, own = torch.randint(1, 7, (2,), generator=generator).tolist()
        teaches = torch.rand(processes, own, generator=generator) < torch.rand(1, generator=generator)
        found = deal(teaches)
        assert found.shape == (processes, max(1, -(-int(teaches.sum()) // processes)))
        assert len(found.unique()) == found.numel()
        assert set(teaches.flatten().nonzero().flatten().tolist()) <= set(found.flatten().tolist())
        moved = (found // own != torch.arange(processes)[:, None]).sum()
        assert moved == (teaches.sum(1) - found.shape[1]).clamp(min=0).sum()
        assert at_home(found, own) == (moved == 0)
