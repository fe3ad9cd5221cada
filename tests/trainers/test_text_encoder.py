"""Every trainer trains text encoders with the denoiser, and resumes bit for bit."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from diffalign import LoraConfig
from diffalign.diffusion.plan import PlanConfig
from tests.models import tiny_unet_pipelines as tiny
from tests.reliability.trainers import TRAINERS, short

WEIGHTS = "pytorch_lora_weights.safetensors"
PLANS = {
    "flow_grpo": {"plan": PlanConfig(preset="flow_grpo", num_steps=2, noise_level=1.0, solver="ddim")},
    "forward_rl": {"plan": PlanConfig(preset="ode", num_steps=2, ode_solver="dpmpp_2m")},
    "online_dpo": {"plan": PlanConfig(preset="ode", num_steps=2, ode_solver="dpmpp_2m")},
}
CASES = [
    ("diffusion_dpo", "sd15"),
    ("diffusion_dpo", "sdxl"),
    *((name, "sd15") for name in TRAINERS if name != "diffusion_dpo"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "family"), CASES)
def test_a_run_trains_text_encoders_and_resumes_bit_for_bit(name, family, tmp_path):
    tiny.build(family, tmp_path / family)
    changes = {"model": str(tmp_path / family), "max_sequence_length": None, **PLANS.get(name, {})}
    changes |= {"lora": LoraConfig(rank=2, text_encoder=True), "cache": name == "diffusion_dpo"}
    whole = short(name, tmp_path / "whole", **changes)
    TRAINERS[name].make(whole).train()
    shutil.copytree(tmp_path / "whole", tmp_path / "halves")
    shutil.rmtree(tmp_path / "halves/checkpoint-4")
    (tmp_path / "halves" / WEIGHTS).unlink()
    halves = short(name, tmp_path / "halves", **changes)
    TRAINERS[name].make(halves, resume_from_checkpoint="latest").train()
    first, second = (load_file(tmp_path / run / WEIGHTS) for run in ("whole", "halves"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    learned = {key.split(".")[0] for key, tensor in first.items() if ".lora_B." in key and tensor.any()}
    assert learned == ({"unet", "text_encoder"} if family == "sd15" else {"unet", "text_encoder", "text_encoder_2"})
