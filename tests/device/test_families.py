"""Every model family on a device that refuses mixed devices: sampling, policy gradients and preference losses."""

import pytest
import torch

from tests.device.runs import make
from tests.models import tiny_unet_pipelines as tiny
from tests.models.families import FAMILIES, LORA
from tests.phases import collect, update

DATA = {"num_groups": 1, "group_size": 2, "rollout_batch_size": 2, "train_batch_size": 2}


@pytest.mark.parametrize("name", LORA)
def test_a_family_trains(name, tmp_path):
    family = FAMILIES[name]
    options = {key: value for key, value in family.options.items() if key != "embedded_guidance"}
    options.setdefault("max_sequence_length", None)
    if family.build is not None:
        tiny.write(family.build, tmp_path / "model")
        options["model"] = str(tmp_path / "model")
    plan = {"preset": "first_steps", "num_steps": 3, "window_size": 1, "solver": family.stochastic}
    runs = {
        "flow_grpo": {**DATA, "plan": plan, **({"guidance_scale": 2.0} if family.guided else {})},
        "diffusion_dpo": {"num_pairs": 2},
    }
    for trainer_name, changes in runs.items():
        trainer = make(trainer_name, tmp_path / trainer_name, **options, **changes)
        before = [p.detach().clone() for p in trainer.loop.state.parameters]
        update(trainer, collect(trainer))
        after = trainer.loop.state.parameters
        assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert all(p.isfinite().all() for p in after)
