"""Rewards, one file each. Importing this package imports all of its files, which register their rewards by name."""

import importlib
import pkgutil

from diffalign.rewards.base import REWARDS, FunctionReward, Reward, RewardCard, get_reward, register
from diffalign.rewards.config import RewardConfig
from diffalign.rewards.support.images import as_image, as_images

__all__ = [
    "REWARDS",
    "FunctionReward",
    "Reward",
    "RewardCard",
    "RewardConfig",
    "as_image",
    "as_images",
    "get_reward",
    "register",
]


def _import_rewards() -> None:
    """Import the modules of this folder; ``support`` is a package, holds no rewards, and is skipped."""
    for module in pkgutil.iter_modules(__path__):
        if not module.ispkg:
            importlib.import_module(f"{__name__}.{module.name}")


_import_rewards()
