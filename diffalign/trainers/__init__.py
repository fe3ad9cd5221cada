"""One trainer per method: each says what it collects and yields losses; the loop does the rest."""

from typing import TYPE_CHECKING, Any

from diffalign.lazy import attribute

if TYPE_CHECKING:
    from diffalign.trainers.diffusion_dpo import DiffusionDPOTrainer
    from diffalign.trainers.diffusion_dpo_config import DiffusionDPOConfig
    from diffalign.trainers.flow_grpo import FlowGRPOTrainer
    from diffalign.trainers.flow_grpo_config import FlowGRPOConfig
    from diffalign.trainers.refl import ReFLTrainer
    from diffalign.trainers.refl_config import ReFLConfig

__all__ = [
    "DiffusionDPOConfig",
    "DiffusionDPOTrainer",
    "FlowGRPOConfig",
    "FlowGRPOTrainer",
    "ReFLConfig",
    "ReFLTrainer",
]

_HOMES = {
    "DiffusionDPOConfig": "diffalign.trainers.diffusion_dpo_config",
    "DiffusionDPOTrainer": "diffalign.trainers.diffusion_dpo",
    "FlowGRPOConfig": "diffalign.trainers.flow_grpo_config",
    "FlowGRPOTrainer": "diffalign.trainers.flow_grpo",
    "ReFLConfig": "diffalign.trainers.refl_config",
    "ReFLTrainer": "diffalign.trainers.refl",
}


def __getattr__(name: str) -> Any:
    return attribute(__name__, _HOMES, name)
