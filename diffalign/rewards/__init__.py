"""Rewards: one file each; a file that is imported here can be found by name."""

from diffalign.rewards import jpeg, shapes
from diffalign.rewards.base import REWARDS, FunctionReward, Reward, get_reward, register

__all__ = ["REWARDS", "FunctionReward", "Reward", "get_reward", "jpeg", "register", "shapes"]
