"""Distance to the nearest image of the group, against a loop over pairs, and the model that may embed images."""

import pytest
import torch

from diffalign.rewards import get_reward, novelty
from diffalign.rewards.novelty import nearest_distance

DRAW = torch.Generator().manual_seed(0)
IMAGES = torch.rand(6, 3, 8, 8, generator=DRAW)
GROUPS = torch.tensor([0, 1, 0, 1, 1, 2])


def call(reward, images, groups):
    return reward(images, [""] * len(images), [{}] * len(images), groups)


def test_it_is_the_least_cosine_distance_within_the_group():
    vectors = (IMAGES.double() * 2 - 1).flatten(1)
    expected = []
    for i, own in enumerate(vectors):
        others = [j for j in range(6) if j != i and GROUPS[j] == GROUPS[i]]
        found = [1 - (own @ vectors[j]) / (own.norm() * vectors[j].norm()) for j in others]
        expected.append(min(found) if found else torch.tensor(0.0, dtype=torch.float64))
    torch.testing.assert_close(nearest_distance(vectors, GROUPS), torch.stack(expected))
    torch.testing.assert_close(call(get_reward("novelty"), IMAGES, GROUPS), torch.stack(expected).float())


def test_twins_have_no_novelty_and_an_image_that_is_not_finite_is_nobodys_neighbour():
    images = IMAGES.clone()
    images[2] = images[0]
    found = call(get_reward("novelty"), images, torch.zeros(6, dtype=torch.long))
    assert found[[0, 2]].abs().max() < 1e-6
    assert (found[[1, 3, 4, 5]] > 0.1).all()
    images[2] = torch.nan
    found = call(get_reward("novelty"), images, torch.zeros(6, dtype=torch.long))
    assert found[2].isnan()
    assert (found[[0, 1, 3, 4, 5]] > 0.1).all()


def test_a_model_embeds_the_images(monkeypatch):
    monkeypatch.setattr(novelty, "_embedder", lambda path, device: lambda images: images.mean((2, 3)) + len(path))
    found = call(get_reward("novelty", path="dino"), IMAGES, GROUPS)
    torch.testing.assert_close(found, nearest_distance(IMAGES.mean((2, 3)) + 4, GROUPS).float())
    assert get_reward("novelty").needs_groups
    with pytest.raises(ValueError, match="images have shape"):
        call(get_reward("novelty"), IMAGES[:, :1], GROUPS)
