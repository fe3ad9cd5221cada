import pytest
import torch

from diffalign.data.epoch_order import take


def shuffled(num_items):
    return lambda epoch: torch.randperm(num_items, generator=torch.Generator().manual_seed(epoch))


@pytest.mark.parametrize(("num_items", "count"), [(7, 3), (7, 7), (3, 8), (5, 1), (1, 4), (6, 2)])
def test_iterations_are_consecutive_pieces_of_the_permutations(num_items, count):
    permutation = shuffled(num_items)
    endless = torch.cat([permutation(epoch) for epoch in range(80)]).tolist()
    for iteration in range(20):
        piece = endless[iteration * count : (iteration + 1) * count]
        assert take(num_items, count, iteration, permutation) == piece


def test_every_epoch_uses_each_item_once_across_iteration_borders():
    taken = [index for iteration in range(14) for index in take(10, 5, iteration, shuffled(10))]
    for start in range(0, 70, 10):
        assert sorted(taken[start : start + 10]) == list(range(10))
    assert taken[:10] != taken[10:20]


def test_a_permutation_is_drawn_once_per_epoch():
    asked = []
    take(4, 6, 1, lambda epoch: asked.append(epoch) or torch.arange(4))
    assert asked == [1, 2]


@pytest.mark.parametrize("sizes", [(0, 1, 0), (3, 0, 0), (3, 1, -1)])
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="use at least one item"):
        take(*sizes, shuffled(3))


def test_a_permutation_of_another_length_is_refused():
    with pytest.raises(ValueError, match="epoch 1 has 3 entries: return 4"):
        take(4, 4, 1, lambda epoch: torch.arange(4 if epoch == 0 else 3))
