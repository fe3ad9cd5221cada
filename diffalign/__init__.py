"""Preference fine-tuning of diffusion and flow models.

from diffalign import FlowGRPOConfig, FlowGRPOTrainer

args = FlowGRPOConfig(model="assets/shapes-sd3", train_prompts="assets/prompts/shapes_train.jsonl")
FlowGRPOTrainer(args=args, reward_funcs="shapes").train()
"""

from diffalign.evaluation.score import score_images
from diffalign.models import DiffusionModel, LoraConfig, load_model
from diffalign.rewards import get_reward, register
from diffalign.structures import Prompt
from diffalign.trainers import (
    DiffusionDPOConfig,
    DiffusionDPOTrainer,
    FlowGRPOConfig,
    FlowGRPOTrainer,
    ReFLConfig,
    ReFLTrainer,
)

__version__ = "0.1.0"

__all__ = [
    "DiffusionDPOConfig",
    "DiffusionDPOTrainer",
    "DiffusionModel",
    "FlowGRPOConfig",
    "FlowGRPOTrainer",
    "LoraConfig",
    "Prompt",
    "ReFLConfig",
    "ReFLTrainer",
    "get_reward",
    "load_model",
    "register",
    "score_images",
]
