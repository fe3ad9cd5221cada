"""One trainer per method: each says what it collects and yields losses; the loop does the rest."""

from typing import TYPE_CHECKING, Any

from diffalign.lazy import attribute

if TYPE_CHECKING:
    from diffalign.trainers.diffusion_dpo.algorithm import DiffusionDPOTrainer
    from diffalign.trainers.diffusion_dpo.config import DiffusionDPOConfig
    from diffalign.trainers.flow_grpo.algorithm import FlowGRPOTrainer
    from diffalign.trainers.flow_grpo.config import FlowGRPOConfig
    from diffalign.trainers.forward_rl.algorithm import ForwardRLTrainer
    from diffalign.trainers.forward_rl.config import ForwardRLConfig
    from diffalign.trainers.refl.algorithm import ReFLTrainer
    from diffalign.trainers.refl.config import ReFLConfig
    from diffalign.trainers.reward.config import RewardTrainerConfig
    from diffalign.trainers.reward.trainer import RewardTrainer

__all__ = [
    "DiffusionDPOConfig",
    "DiffusionDPOTrainer",
    "FlowGRPOConfig",
    "FlowGRPOTrainer",
    "ForwardRLConfig",
    "ForwardRLTrainer",
    "ReFLConfig",
    "ReFLTrainer",
    "RewardTrainer",
    "RewardTrainerConfig",
]

_HOMES = {
    "DiffusionDPOConfig": "diffalign.trainers.diffusion_dpo.config",
    "DiffusionDPOTrainer": "diffalign.trainers.diffusion_dpo.algorithm",
    "FlowGRPOConfig": "diffalign.trainers.flow_grpo.config",
    "FlowGRPOTrainer": "diffalign.trainers.flow_grpo.algorithm",
    "ForwardRLConfig": "diffalign.trainers.forward_rl.config",
    "ForwardRLTrainer": "diffalign.trainers.forward_rl.algorithm",
    "ReFLConfig": "diffalign.trainers.refl.config",
    "ReFLTrainer": "diffalign.trainers.refl.algorithm",
    "RewardTrainer": "diffalign.trainers.reward.trainer",
    "RewardTrainerConfig": "diffalign.trainers.reward.config",
}


def __getattr__(name: str) -> Any:
    return attribute(__name__, _HOMES, name)
