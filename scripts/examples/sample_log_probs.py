"""Use the sampler alone: a stochastic rollout of Flow-GRPO with the log-prob of each step, and the images.

python scripts/examples/sample_log_probs.py assets/shapes-sd3 "a red circle"
"""

import sys

import torch
from torchvision.utils import save_image

from diffalign import load_model
from diffalign.diffusion.plan import make_plan
from diffalign.diffusion.plan_config import PlanConfig
from diffalign.rng import KeyedRNG
from diffalign.rollout.sampler import SamplingPlan, sample


def main(name: str, prompt: str, count: int = 4) -> torch.Tensor:
    model, rng = load_model(name, max_sequence_length=16), KeyedRNG(0)
    plan = SamplingPlan(make_plan(PlanConfig("flow_grpo", num_steps=8), iteration=0, seed=0), model.levels(8))
    log_probs: list[torch.Tensor] = []
    noise = [rng.normal((count, *model.latent_shape()), "example", step) for step in range(9)]
    latents = sample(
        model, plan, model.encode([prompt] * count), noise[8], draw=noise.__getitem__,
        observe=lambda step, result: log_probs.append(result.log_prob) if result.log_prob is not None else None,
    )  # fmt: skip
    save_image(model.decode(latents), "samples.png")
    print(torch.stack(log_probs, dim=1))  # (images, stochastic steps): means over latent dimensions
    return torch.stack(log_probs, dim=1)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
