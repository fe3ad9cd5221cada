"""ReFL as its authors' script has it: noise on the way, and a scaled loss."""

import pytest
import torch

from diffalign.config import load_yaml
from diffalign.diffusion.steps import step
from tests.conftest import ROOT
from tests.phases import collect
from tests.trainers.made_refl import close, config, gradients, trainer_of


def at_last_step(tmp_path, **changes):
    """A run whose gradient is of the last of four steps, so that three are sampled before."""
    return config(tmp_path, recipe={"window": (0.75, 1.0)}, **changes)


@pytest.mark.parametrize("size", [1, 4])
def test_samplings_draw_noise_by_its_address(tmp_path, train_prompts, size):
    trainer = trainer_of(at_last_step(tmp_path, rollout_batch_size=size, train_batch_size=1), train_prompts[:4])
    levels = trainer.algorithm.levels
    for batch in collect(trainer, 3).parts:
        x = trainer.algorithm.starts(3, batch.samples, 3).x
        for index in range(3):
            output = trainer.model.predict(x, levels[index], batch.conditioning)
            noise = trainer.run.rng.normal_batch(x.shape[1:], "refl/step", [(3, *own, index) for own in batch.samples])
            x = step("ddim", x, output, levels[index], levels[index + 1],
                     parameterization="flow", noise_level=1.0, noise=noise).x_next  # fmt: skip
        torch.testing.assert_close(batch.state(torch.arange(len(batch.samples)), 3), x, rtol=0, atol=1e-5)


def test_without_eta_samplings_follow_the_ode(tmp_path, train_prompts):
    args = config(tmp_path, recipe={"window": (0.75, 1.0), "eta": 0.0})
    trainer = trainer_of(args, train_prompts[:4])
    batch, levels = collect(trainer).parts[0], trainer.algorithm.levels
    x = trainer.algorithm.starts(0, batch.samples, 3).x
    for index in range(3):
        output = trainer.model.predict(x, levels[index], batch.conditioning)
        x = step("ode", x, output, levels[index], levels[index + 1], parameterization="flow").x_next
    torch.testing.assert_close(batch.state(torch.arange(len(batch.samples)), 3), x, rtol=0, atol=1e-5)


def test_the_gradient_is_scaled_before_it_is_clipped(tmp_path, train_prompts):
    scaled = gradients(trainer_of(config(tmp_path / "a"), train_prompts[:4]))
    plain = gradients(trainer_of(config(tmp_path / "b", recipe={"grad_scale": 1.0}), train_prompts[:4]))
    close(1e3 * scaled, plain, 1e-5)


def test_the_published_configuration_has_the_scripts_weight_decay():
    found = load_yaml(ROOT / "configs/refl/sd15_image_reward_1gpu.yaml")
    assert found["recipe"] == {"preset": "refl_script", "num_steps": 40}
    assert float(found["adam_weight_decay"]) == 1e-2
    assert float(found["learning_rate"]) == 1e-5
    assert found["max_train_steps"] == 100
    assert found.get("max_grad_norm", 1.0) == 1.0
