"""Preference fine-tuning of diffusion and flow models.

from diffalign import FlowGRPOConfig, FlowGRPOTrainer

args = FlowGRPOConfig(model="assets/shapes-sd3", train_prompts="assets/prompts/shapes_train.jsonl")
FlowGRPOTrainer(args=args, reward_funcs="shapes").train()

Names are imported at first use: ``import diffalign`` alone loads neither torch nor diffusers.
"""

from typing import TYPE_CHECKING, Any

from diffalign.lazy import attribute

if TYPE_CHECKING:
    from diffalign.commands.evaluate import compare, evaluate
    from diffalign.commands.evaluate_config import EvaluationConfig
    from diffalign.commands.score import score_images
    from diffalign.config.sections import LoraConfig
    from diffalign.models import DiffusionModel, load_model
    from diffalign.rewards import get_reward, register
    from diffalign.runtime.callbacks import TrainerCallback, TrainerControl, TrainerState
    from diffalign.structures import Prompt
    from diffalign.trainers import (
        DiffusionDPOConfig,
        DiffusionDPOTrainer,
        FlowGRPOConfig,
        FlowGRPOTrainer,
        ForwardRLConfig,
        ForwardRLTrainer,
        ReFLConfig,
        ReFLTrainer,
        RewardTrainer,
        RewardTrainerConfig,
    )
    from diffalign.trainers.result import TrainingResult

__version__ = "0.1.0"

__all__ = [
    "DiffusionDPOConfig",
    "DiffusionDPOTrainer",
    "DiffusionModel",
    "EvaluationConfig",
    "FlowGRPOConfig",
    "FlowGRPOTrainer",
    "ForwardRLConfig",
    "ForwardRLTrainer",
    "LoraConfig",
    "Prompt",
    "ReFLConfig",
    "ReFLTrainer",
    "RewardTrainer",
    "RewardTrainerConfig",
    "TrainerCallback",
    "TrainerControl",
    "TrainerState",
    "TrainingResult",
    "compare",
    "evaluate",
    "get_reward",
    "load_model",
    "register",
    "score_images",
]

_HOMES = {
    "DiffusionDPOConfig": "diffalign.trainers.diffusion_dpo.config",
    "DiffusionDPOTrainer": "diffalign.trainers.diffusion_dpo.algorithm",
    "DiffusionModel": "diffalign.models",
    "EvaluationConfig": "diffalign.commands.evaluate_config",
    "FlowGRPOConfig": "diffalign.trainers.flow_grpo.config",
    "FlowGRPOTrainer": "diffalign.trainers.flow_grpo.algorithm",
    "ForwardRLConfig": "diffalign.trainers.forward_rl.config",
    "ForwardRLTrainer": "diffalign.trainers.forward_rl.algorithm",
    "LoraConfig": "diffalign.config.sections",
    "Prompt": "diffalign.structures",
    "ReFLConfig": "diffalign.trainers.refl.config",
    "ReFLTrainer": "diffalign.trainers.refl.algorithm",
    "RewardTrainer": "diffalign.trainers.reward.trainer",
    "RewardTrainerConfig": "diffalign.trainers.reward.config",
    "TrainerCallback": "diffalign.runtime.callbacks",
    "TrainerControl": "diffalign.runtime.callbacks",
    "TrainerState": "diffalign.runtime.callbacks",
    "TrainingResult": "diffalign.trainers.result",
    "compare": "diffalign.commands.evaluate",
    "evaluate": "diffalign.commands.evaluate",
    "get_reward": "diffalign.rewards",
    "load_model": "diffalign.models",
    "register": "diffalign.rewards",
    "score_images": "diffalign.commands.score",
}


def __getattr__(name: str) -> Any:
    return attribute(__name__, _HOMES, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
