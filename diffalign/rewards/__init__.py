"""Rewards: one file each; a file that is imported here can be found by name."""

from diffalign.rewards import (
    aesthetic,
    clip,
    combine,
    f_clipscore,
    geneval,
    hps,
    hpsv3,
    ict_hp,
    image_reward,
    jpeg,
    ocr,
    pixel_stats,
    qwen_vqascore,
    remote,
    shapes,
    vlm_judge,
    vqascore,
)
from diffalign.rewards.base import REWARDS, FunctionReward, Reward, RewardCard, get_reward, register
from diffalign.rewards.config import RewardConfig
from diffalign.rewards.support.images import as_image, as_images

__all__ = [
    "REWARDS",
    "FunctionReward",
    "Reward",
    "RewardCard",
    "RewardConfig",
    "aesthetic",
    "as_image",
    "as_images",
    "clip",
    "combine",
    "f_clipscore",
    "geneval",
    "get_reward",
    "hps",
    "hpsv3",
    "ict_hp",
    "image_reward",
    "jpeg",
    "ocr",
    "pixel_stats",
    "qwen_vqascore",
    "register",
    "remote",
    "shapes",
    "vlm_judge",
    "vqascore",
]
