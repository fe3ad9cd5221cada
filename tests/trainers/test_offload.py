"""Where trainers let text encoders and the VAE come to the device, as if the CPU were one."""

import gc

import pytest
import torch

from diffalign import DiffusionDPOTrainer, FlowGRPOTrainer
from diffalign.diffusion.plan import PlanConfig
from diffalign.models import base
from diffalign.models.offload import TEXT_ENCODERS, VAE, part_of, tensors_of, to_device
from diffalign.models.weight_memory import size_of
from tests.models.logged_offload import LoggedOffload
from tests.phases import collect
from tests.trainers.made_refl import trainer_of

OFFLOAD = {"offload": (TEXT_ENCODERS, VAE), "cache": True}


@pytest.fixture
def visits(monkeypatch):
    """The parts that came, in order; what is asked to leave leaves, though it is for a CPU."""
    log = []

    def placed(pipeline, device, offload, without):
        assert to_device(pipeline, device, offload, without) == {}
        return {part: LoggedOffload(part_of(pipeline, part).values(), log, part) for part in offload}

    monkeypatch.setattr(base, "to_device", placed)
    return log


def flow_grpo(small, dpo, refl, prompts, **changes):
    return FlowGRPOTrainer(args=small(guidance_scale=2.0, **changes), train_dataset=prompts)


def diffusion_dpo(small, dpo, refl, prompts, **changes):
    return DiffusionDPOTrainer(args=dpo(num_pairs=12, train_batch_size=6, **changes))


def spin(small, dpo, refl, prompts, **changes):
    args = dpo(losers="reference", plan=PlanConfig(preset="ode", num_steps=2), rollout_batch_size=2, **changes)
    return DiffusionDPOTrainer(args=args)


def reward_gradient(small, dpo, refl, prompts, **changes):
    return trainer_of(refl("refl", num_groups=2, rollout_batch_size=1, **changes), prompts)


def update(loop, batch):
    """Take the optimizer steps of a first iteration, as the loop takes them."""
    loop.batch = batch
    for minibatch in loop.algorithm.minibatches(batch, 0):
        loop._update(batch, minibatch)


# What comes in the first iteration: while it collects, and while it trains.
PHASES = {
    flow_grpo: ([TEXT_ENCODERS, TEXT_ENCODERS, VAE], []),  # prompts, the empty prompt
    diffusion_dpo: ([VAE, TEXT_ENCODERS], []),
    spin: ([VAE, TEXT_ENCODERS], []),
    reward_gradient: ([TEXT_ENCODERS], [VAE]),
}


MAKERS = [pytest.param(make, id=make.__name__, marks=[pytest.mark.slow] if make is spin else []) for make in PHASES]


@pytest.mark.parametrize("make", MAKERS)
def test_parts_come_once_a_phase_and_change_nothing(make, small, dpo, refl, train_prompts, visits):
    weights = []
    for changes in (OFFLOAD, {}):
        trainer = make(small, dpo, refl, train_prompts, **changes)
        assert (trainer.run.prompts.cache.folder is None) == (not changes and make not in (diffusion_dpo, spin))
        seen = []
        batch = collect(trainer, 0)
        seen.append(visits[:])
        update(trainer.loop, batch)
        seen.append(visits[len(seen[0]) :])
        weights.append([p.detach().clone() for p in trainer.loop.state.parameters])
        if changes:
            assert tuple(seen) == PHASES[make]
            assert not any(module.resident for module in trainer.model.offloaded.values())
            visits.clear()
        else:
            assert not visits
    assert all(torch.equal(one, two) for one, two in zip(*weights, strict=True))


def test_an_evaluation_decodes_in_one_visit_and_a_fault_sends_everything_home(small, train_prompts, visits):
    args = small(offload=(VAE,), eval_num_steps=1)
    trainer = FlowGRPOTrainer(args=args, train_dataset=train_prompts, eval_dataset=train_prompts)
    assert trainer.outputs.evaluate(0)
    assert visits == [VAE]  # 12 images, 4 at a time
    trainer.outputs.evaluation.heartbeat = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.outputs.evaluate(0)
    assert visits == [VAE] * 2
    assert not trainer.model.offloaded[VAE].resident


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_an_update_has_the_memory_of_what_left(small, train_prompts):
    peaks, weights = [], []
    for changes in ({}, OFFLOAD):
        trainer = FlowGRPOTrainer(args=small(**changes), train_dataset=train_prompts)
        batch = collect(trainer, 0)
        torch.cuda.reset_peak_memory_stats()
        update(trainer.loop, batch)
        peaks.append(torch.cuda.max_memory_allocated())
        weights.append([p.detach().clone().cpu() for p in trainer.loop.state.parameters])
        pipeline = trainer.model.pipeline
        networks = [network for part in (TEXT_ENCODERS, VAE) for network in part_of(pipeline, part).values()]
        del trainer
        gc.collect()
    assert all(torch.equal(one, two) for one, two in zip(*weights, strict=True))
    assert peaks[1] < peaks[0] - 0.9 * sum(map(size_of, tensors_of(networks)))
