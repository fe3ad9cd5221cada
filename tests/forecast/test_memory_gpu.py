"""The forecast of memory beside what CUDA's allocator saw. Rehearsed peaks are to be compared here, within 10 %."""

import pytest
import torch

from diffalign import FlowGRPOTrainer
from diffalign.forecast.memory import memory_of
from diffalign.trainers.cost import Share
from diffalign.trainers.registry import find_algorithm
from tests.phases import collect, update

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_the_forecast_without_activations_is_below_the_peak(small, train_prompts):
    trainer = FlowGRPOTrainer(args=small(), train_dataset=train_prompts)
    torch.cuda.reset_peak_memory_stats()
    update(trainer, collect(trainer))
    forecast = memory_of(trainer.model, find_algorithm("flow_grpo").cost, trainer.args, Share())
    assert forecast.peak <= torch.cuda.max_memory_allocated()
