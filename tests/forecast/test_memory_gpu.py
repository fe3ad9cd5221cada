"""The rehearsed peak of memory beside what CUDA's allocator saw."""

import pytest
import torch

from diffalign import FlowGRPOTrainer
from diffalign.forecast.rehearsal import rehearse
from diffalign.trainers.registry import find_algorithm
from tests.phases import collect, update

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_the_rehearsed_peak_is_the_measured_one(small, train_prompts):
    trainer = FlowGRPOTrainer(args=small(), train_dataset=train_prompts)
    update(trainer, collect(trainer))  # the optimizer has its moments afterwards
    torch.cuda.reset_peak_memory_stats()
    update(trainer, collect(trainer, 1), 1)
    peak = rehearse(find_algorithm("flow_grpo"), trainer.args, block=512).peak
    assert abs(peak / torch.cuda.max_memory_allocated() - 1) <= 0.1
