"""Every reward with a network on a device that refuses mixed devices."""

import pytest
import torch

from diffalign.rewards import get_reward
from diffalign.rewards.base import names, registered
from tests.device import strict
from tests.rewards.conftest import (  # noqa: F401
    aesthetic_file,
    clip_folder,
    clip_t5_folder,
    deqa_folder,
    detector_folder,
    dina_folder,
    evalmuse_folder,
    hps_folder,
    hpsv3_parts,
    ict_hp_folders,
    image_reward_folder,
    judge_folder,
    mps_folder,
    nothing_loaded,
    qwen_folders,
    siglip_folder,
    small,
)
from tests.rewards.test_contract import IMAGES, call, make

SLOW = {"hpsv3", "ocr"}  # 15 and 7 s; Qwen-VL's code is run by the VQAScores too


def quick(rewards):
    """Parameters of which the slow ones are marked."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in rewards]


NETWORKS = [name for name in names() if registered(name).facts.weights and not registered(name).facts.served]


@pytest.mark.parametrize("name", quick(NETWORKS))
def test_a_network_scores_as_on_the_cpu_with_a_gradient(name, small):  # noqa: F811
    reward = make(name, small)
    with torch.no_grad():
        expected = call(reward, IMAGES)
    images = IMAGES.to(strict.NAME).requires_grad_(reward.differentiable)
    found = call(reward, images)
    torch.testing.assert_close(found.detach().cpu(), expected, rtol=2e-2, atol=2e-2 * registered(name).facts.scale)
    if reward.differentiable:
        found.sum().backward()
        assert images.grad.device.type == strict.NAME
        assert images.grad.isfinite().all()
        assert images.grad.abs().max() > 0


# Those ask other machines.
REMOTE = {"remote", "combined", "vlm_rating", "vlm_checklist", "vlm_pairwise"}
REMOTE |= {name for name in names() if registered(name).facts.served}


OTHERS = sorted(set(names()) - set(NETWORKS) - REMOTE)


@pytest.mark.parametrize("name", quick(OTHERS))
def test_the_others_take_images_of_the_device(name, small):  # noqa: F811
    reward = make(name, small)
    torch.testing.assert_close(call(reward, IMAGES.to(strict.NAME)).cpu(), call(reward, IMAGES))


@pytest.mark.parametrize("rule", ["soft_and", "pessimistic", "weighted_sum", "minimum"])
def test_a_combination_needs_no_float64(rule):
    weight = 1.0 if rule == "minimum" else 2.0
    reward = get_reward("combined", rewards={"brightness": 1.0, "sharpness": {"weight": weight}}, rule=rule)
    expected = call(reward, IMAGES)
    strict.set_float64(False)
    try:
        found = call(reward, IMAGES.to(strict.NAME))
    finally:
        strict.set_float64(True)
    torch.testing.assert_close(found.cpu(), expected)
