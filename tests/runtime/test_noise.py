import random

import numpy as np
import pytest
import torch

from diffalign.rng import KeyedRNG

# A change here changes every seeded run of every user.
GOLDEN_NORMAL = [-0.38677969574928284, 1.1770607233047485, -0.5362926721572876, 1.3319913148880005]
GOLDEN_PERMUTATION = [2, 3, 0, 7, 6, 4, 5, 1]


def test_golden_values():
    noise = KeyedRNG(0)
    assert torch.equal(noise.normal((20,), "rollout", 1, 2, 3)[:4], torch.tensor(GOLDEN_NORMAL))
    assert noise.permutation(8, "order", 5).tolist() == GOLDEN_PERMUTATION


def test_global_generators_are_neither_read_nor_moved():
    def draw(seed):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        noise = KeyedRNG(3)
        drawn = [
            noise.normal((2, 3), "a", 1),
            noise.normal_batch((4,), "a", [(1,), (2,)]),
            noise.permutation(9, "a", 1),
        ]
        assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
        return drawn

    for first, second in zip(draw(0), draw(1), strict=True):
        assert torch.equal(first, second)


def test_draws_ignore_default_dtype_and_device():
    expected = KeyedRNG(3).normal((40,), "a", 1)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        drawn = KeyedRNG(3).normal((40,), "a", 1)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert torch.equal(drawn, expected)


@pytest.mark.parametrize("shape", [(), (3,), (4, 8, 8)])
def test_a_batch_is_its_rows_however_it_is_split(shape):
    noise = KeyedRNG(7)
    addresses = [(0, 1), (5, 2), (3, 3), (0, 1)]
    whole = noise.normal_batch(shape, "rollout", addresses)
    parts = [noise.normal_batch(shape, "rollout", addresses[:1]), noise.normal_batch(shape, "rollout", addresses[1:])]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(whole, torch.stack([noise.normal(shape, "rollout", *address) for address in addresses]))
    assert torch.equal(whole[0], whole[3])
    assert noise.normal_batch(shape, "rollout", []).shape == (0, *shape)
    assert whole.dtype == torch.float32


def test_distinct_addresses_streams_and_seeds_differ():
    pairs = [
        ((0, "a", 1, 23), (0, "a", 12, 3)),
        ((0, "a", 1), (0, "a", 1, 0)),
        ((0, "a"), (0, "a", 0)),
        ((0, "a", 1), (1, "a", 0)),
        ((0, "a", 1), (0, "a", -1)),
        ((0, "a", 1), (0, "a|1")),
        ((0, "1|a"), (0, "a", 1)),
        ((1, "a"), (-1, "a")),
        ((5, "a"), (5 + 2**32, "a")),
        ((5, "a", 1), (5, "a", 1 + 2**32)),
    ]
    for (seed, *left), (other, *right) in pairs:
        assert not torch.equal(KeyedRNG(seed).normal((4,), *left), KeyedRNG(other).normal((4,), *right)), (left, right)


def test_numbers_of_numpy_and_torch_are_addresses_and_fractions_are_not():
    expected = KeyedRNG(1).normal((4,), "a", 2)
    assert torch.equal(KeyedRNG(np.int64(1)).normal((4,), "a", np.int32(2)), expected)
    assert torch.equal(KeyedRNG(1).normal((4,), "a", torch.tensor(2)), expected)
    with pytest.raises(TypeError):
        KeyedRNG(1).normal((4,), "a", 2.0)


def test_moments_and_correlations():
    draws = KeyedRNG(11).normal_batch((256,), "a", [(i, j) for i in range(20) for j in range(20)])
    count = draws.numel()
    assert abs(draws.mean()) < 4 / count**0.5
    assert abs(draws.var() - 1) < 4 * (2 / count) ** 0.5
    assert abs((draws**4).mean() - 3) < 4 * (96 / count) ** 0.5
    # Neighbouring addresses: correlations of 256 numbers have standard deviation 1/16.
    correlation = torch.corrcoef(draws) - torch.eye(400)
    assert correlation.abs().max() < 6 / 16
    assert abs(correlation.std() * 16 - 1) < 0.02
    assert abs((draws[:, 1:] * draws[:, :-1]).mean()) < 4 / count**0.5


def test_permutations_are_uniform():
    noise = KeyedRNG(2)
    firsts = torch.tensor([noise.permutation(5, "p", i)[0].item() for i in range(1000)])
    assert (torch.bincount(firsts, minlength=5) - 200).abs().max() < 4 * 13
    assert noise.permutation(50, "p", 0).sort().values.tolist() == list(range(50))
