"""One trainer per method: each says what it collects and yields losses; the loop does the rest."""

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
