"""Diffusion-DPO on the layouts of SD 1.5 (epsilon), SD 2 (v) and SDXL."""

import math

import pytest
import torch

from diffalign import DiffusionDPOTrainer
from tests.models import tiny_unet_pipelines as tiny
from tests.phases import collect


def gradients(trainer):
    batch = collect(trainer, 0)
    (minibatch,) = trainer.algorithm.minibatches(batch, 0)
    (micro,) = minibatch.micros
    loss, metrics = trainer.algorithm.loss(micro)
    loss.backward()
    return loss.item(), metrics, torch.cat([p.grad.flatten() for p in trainer.loop.state.parameters])


@pytest.mark.parametrize("name", list(tiny.FAMILIES))
def test_the_first_loss_is_ln_2_and_gradient_checkpointing_changes_nothing(dpo, tmp_path, name):
    tiny.build(name, tmp_path / name)
    found = []
    for on in (False, True):
        args = dpo(model=str(tmp_path / name), max_sequence_length=None, gradient_checkpointing=on)
        loss, metrics, gradient = gradients(DiffusionDPOTrainer(args=args))
        # Between the policy's forward pass and its backward pass, which recomputes the activations, the reference
        # runs on the same denoiser: the weights must be the policy's again.
        assert loss == pytest.approx(math.log(2), abs=1e-6)
        assert metrics["accuracy"].item() == 0.5
        found.append(gradient)
    assert found[0].norm() > 0
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4 * found[0].abs().max().item())
