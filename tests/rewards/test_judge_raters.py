"""Models A and B of PAL: scores by hand, gradients, and what both start from."""

import pytest
import torch
from torch.nn import functional as F

from diffalign.losses.paired_comparison import bradley_terry
from diffalign.rewards import get_reward
from diffalign.rewards.support.judge_files import load_backbone, read_about
from diffalign.rewards.support.judge_network import JudgeNetwork
from diffalign.rewards.support.judge_raters import NETWORKS, IdealPoints, PrototypeMaps
from diffalign.rewards.support.weights import Weights
from tests.rewards import tiny_judges


def moved(network, seed=0):
    """The same network away from its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if not name.startswith("backbone.") and name != "tie":
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return network.requires_grad_(False)


def pooled(network, pairs=5, seed=3):
    """Pooled outputs of the towers for pairs of images and their prompts."""
    generator = torch.Generator().manual_seed(seed)
    config = network.backbone.config
    images = torch.randn(pairs, 2, config.vision_config.hidden_size, generator=generator)
    return images, torch.randn(pairs, network.text_head.in_features, generator=generator)


@pytest.fixture
def make(clip_folder):
    return lambda kind, raters=3, prototypes=2: NETWORKS[kind](load_backbone(str(clip_folder)), raters, prototypes)


def test_a_score_of_model_a_falls_with_the_distance_from_the_rater_s_ideal_point(make):
    network = moved(make("pal_a"))
    images, texts = pooled(network)
    rater = torch.tensor([0, 1, 2, -1, 0])
    found = network(images, texts, rater=rater, pooled=True)

    first, last = network.latent[0], network.latent[2]
    shares = network.rater_logits.exp() / network.rater_logits.exp().sum(1, keepdim=True)
    shares = torch.cat([shares, shares.mean(0, keepdim=True)])

    def f(v, t):
        hidden = (first.weight @ torch.cat([v, t]) + first.bias).clamp(min=0)
        return v - t + last.weight @ hidden + last.bias

    for row in range(5):
        point = sum(share * p for share, p in zip(shares[rater[row]], network.points, strict=True))
        ideal = f(*point.chunk(2))
        text = F.normalize(network.text_head.weight @ texts[row], dim=0)
        for side in range(2):
            image = F.normalize(network.image_head.weight @ images[row, side], dim=0)
            distance = torch.linalg.norm(f(image, text) - ideal)
            torch.testing.assert_close(found[row, side], network.logit_scale * (1 - distance**2 / 2))


def test_the_nearer_of_two_images_is_preferred_and_a_point_that_moves_to_an_image_makes_it_so(make):
    network = moved(make("pal_a", raters=1, prototypes=1))
    images, texts = pooled(network, pairs=1)
    v = network.embed_images(images[0])
    t = network.embed_texts(texts)[0]
    for side in range(2):
        network.points.copy_(torch.cat([v[side], t])[None])
        scores = network(images, texts, rater=torch.tensor([0]), pooled=True)[0]
        assert scores.argmax() == side
        torch.testing.assert_close(scores[side], network.logit_scale)  # at no distance


@pytest.mark.parametrize("kind", NETWORKS)
def test_both_models_start_as_the_backbone_up_to_the_spread_of_prototypes(kind, make, clip_folder):
    network, plain = make(kind), JudgeNetwork(load_backbone(str(clip_folder)))
    images, texts = pooled(network)
    expected = plain(images, texts, pooled=True)
    own = network(images, texts, rater=torch.tensor([0, 1, 2, -1, 0]), pooled=True)
    torch.testing.assert_close(own, expected, atol=0.1 * plain.logit_scale.item(), rtol=0)
    if kind == "pal_a":
        network.points.data.zero_()
        torch.testing.assert_close(network(images, texts, pooled=True), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", NETWORKS)
def test_gradients_are_those_of_finite_differences(kind, make):
    network = moved(make(kind).double())
    network.train_head()
    images, texts = (tensor.double() for tensor in pooled(network))
    rater, label = torch.tensor([0, 1, 2, -1, 0]), torch.tensor([1.0, 0.0, 0.5, 1.0, 0.0], dtype=torch.float64)

    def loss():
        scores = network(images, texts, rater=rater, pooled=True)
        return bradley_terry(scores[:, 0] - scores[:, 1], label).mean()

    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss(), trained.values())
    own = {name for name in trained if not name.startswith("backbone.")}
    assert own == {"pal_a": {"points", "rater_logits", *(n for n in own if n.startswith("latent."))},
                   "pal_b": {"rater_logits", *(n for n in own if n.startswith("prototypes."))}}[kind]  # fmt: skip
    with torch.no_grad():
        for (name, parameter), gradient in zip(trained.items(), gradients, strict=True):
            flat, at = parameter.view(-1), int(gradient.abs().argmax())
            value, step = flat[at].item(), 1e-6
            flat[at] = value + step
            above = loss()
            flat[at] = value - step
            slope = (above - loss()) / (2 * step)
            flat[at] = value
            torch.testing.assert_close(gradient.flatten()[at], slope, rtol=1e-5, atol=1e-8, msg=name)


@torch.no_grad()
def test_a_saved_judge_of_model_a_scores_as_each_rater_and_is_differentiable(clip_folder, tmp_path):
    folder = tiny_judges.own_judge(tmp_path / "mine", clip_folder, "pal_a")
    assert read_about(Weights(str(folder))).rater_model == "pal_a"
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    rewards = {name: get_reward("judge", path=str(folder), rater=name) for name in (None, "ann", "bob", "carl")}
    found = {name: reward(images, ["a red circle"] * 2, [{}] * 2) for name, reward in rewards.items()}
    assert not torch.allclose(found["ann"], found["bob"], atol=1e-3)
    torch.testing.assert_close(found["carl"], found[None], rtol=1e-5, atol=1e-5)  # (1/2, 1/2), which is the mean
    low, high = rewards[None].range
    assert low < found[None].min()
    assert found[None].max() <= high
    with torch.enable_grad():
        images.requires_grad_(True)
        rewards["ann"](images, ["a red circle"] * 2, [{}] * 2).sum().backward()
    assert images.grad.abs().max() > 0


def test_a_judge_of_an_unknown_model_of_raters_is_refused(clip_folder, tmp_path):
    folder = tiny_judges.own_judge(tmp_path / "mine", clip_folder, "pal_a")
    about = folder / "judge.json"
    about.write_text(about.read_text().replace('"pal_a"', '"pal_c"'))
    with pytest.raises(ValueError, match="'pal_c' is not one that this version reads"):
        get_reward("judge", path=str(folder))


def test_a_judge_of_an_older_file_has_prototype_maps(clip_folder, tmp_path):
    folder = tiny_judges.own_judge(tmp_path / "mine", clip_folder)
    about = folder / "judge.json"
    before = get_reward("judge", path=str(folder), rater="ann")
    text = about.read_text()
    assert '"rater_model": "pal_b"' in text
    about.write_text(text.replace(',\n "rater_model": "pal_b"', ""))
    assert read_about(Weights(str(folder))).rater_model == PrototypeMaps.name
    assert get_reward("judge", path=str(folder), rater="ann") == before
    assert IdealPoints.format > PrototypeMaps.format  # an older version refuses what it cannot read
