"""The inner loop of Flow-GRPO on SD3 in plain diffusers and peft, as an adapter for ``--against``.

The least that any script must do: sample with the pipeline's scheduler, decode, score, and a forward and backward pass
per trained step, with classifier-free guidance as one batch of two halves. It has no checks, checkpoints or logs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from scripts.bench.against import Job, RolloutJob, with_lora


def prepare(job: Job) -> Callable[[], None]:
    """Return what does one iteration. NotImplementedError: another model than SD3, or another method."""
    pipe = job.pipeline
    if not isinstance(job, RolloutJob) or type(pipe).__name__ != "StableDiffusion3Pipeline":
        raise NotImplementedError(f"no loop for {type(pipe).__name__}")
    network, (trained, optimizer) = pipe.transformer, with_lora(job)
    device = network.device
    shape = (network.config.in_channels, *(job.resolution // pipe.vae_scale_factor,) * 2)

    def predict(x: Tensor, time: Tensor, words: list[Tensor]) -> Tensor:
        with job.autocast():
            output = network(
                hidden_states=torch.cat([x, x]),
                timestep=time.expand(2 * len(x)),
                encoder_hidden_states=words[0],
                pooled_projections=words[1],
                return_dict=False,
            )[0]
        negative, positive = output.float().chunk(2)
        return negative + job.guidance_scale * (positive - negative)

    def part(prompts: list[str]) -> None:
        embeds, _, pooled, _ = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
        words = [torch.cat([torch.zeros_like(t), t]).to(device) for t in (embeds, pooled)]
        pipe.scheduler.set_timesteps(job.num_steps, device=device)
        x, visited = torch.randn(len(prompts), *shape, device=device), []
        with torch.no_grad():
            for time in pipe.scheduler.timesteps:
                visited.append((x, time))
                x = pipe.scheduler.step(predict(x, time, words), time, x, return_dict=False)[0]
            latents = x / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
            job.reward(pipe.vae.decode(latents.to(pipe.vae.dtype)).sample.float() / 2 + 0.5)
        for step in job.trained_steps:
            predict(*visited[step], words).square().mean().backward()

    def iterate() -> None:
        prompts = [prompt for prompt in job.prompts for _ in range(job.group_size)]
        for start in range(0, len(prompts), job.batch):
            part(prompts[start : start + job.batch])
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return iterate
