"""Drive a diffusers pipeline: one file per model family, one interface for every trainer."""

from diffalign.config.sections import LoraConfig
from diffalign.models.base import DiffusionModel
from diffalign.models.checkpoint_context import with_tuned_weights
from diffalign.models.load import FAMILIES, load_model

__all__ = ["FAMILIES", "DiffusionModel", "LoraConfig", "load_model", "with_tuned_weights"]
