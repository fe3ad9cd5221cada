"""Drive a diffusers pipeline: one file per model family, one interface for every trainer."""

from diffalign.config.sections import LoraConfig
from diffalign.models.base import DiffusionModel
from diffalign.models.checkpoint_context import with_tuned_weights
from diffalign.models.load import load_model
from diffalign.models.registry import family_names, get_family, register_family

__all__ = [
    "DiffusionModel",
    "LoraConfig",
    "family_names",
    "get_family",
    "load_model",
    "register_family",
    "with_tuned_weights",
]
