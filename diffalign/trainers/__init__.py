"""One trainer per method: each says what it collects and yields losses; the loop does the rest."""

from diffalign.trainers.flow_grpo import FlowGRPOTrainer
from diffalign.trainers.flow_grpo_config import FlowGRPOConfig

__all__ = ["FlowGRPOConfig", "FlowGRPOTrainer"]
