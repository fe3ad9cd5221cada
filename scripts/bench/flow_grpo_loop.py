"""The inner loop that Flow-GRPO trainers of diffusers pipelines run on SD3, as an adapter for ``--against``.

Its structure is that of the paper's released trainer: a sampling that keeps latents and log-probs of the stochastic
steps, rewards, advantages of each prompt's group, and for each batch and trained step a forward and backward pass with
classifier-free guidance as one batch of two halves, a ratio and a clipped loss. Written for this bench, with a window
of stochastic steps; checks, checkpoints and logs are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scripts.bench.against import Job, RolloutJob, with_lora

CLIP = 1e-4  # range of the ratio of mean log-probs
ADVANTAGE = 5.0  # largest size of an advantage
EPSILON = 1e-4


@dataclass(frozen=True)
class Samples:
    """A sampled batch. words: embeddings of both halves; states, log_probs: by trained step; rewards (B,)."""

    words: list[Tensor]
    states: dict[int, tuple[Tensor, Tensor]]
    log_probs: dict[int, Tensor]
    rewards: Tensor


def prepare(job: Job) -> Callable[[], None]:
    """Return what does one iteration. NotImplementedError: another model than SD3, or another method."""
    if not isinstance(job, RolloutJob) or type(job.pipeline).__name__ != "StableDiffusion3Pipeline":
        raise NotImplementedError(f"no loop for {type(job.pipeline).__name__}")
    return Loop(job).iterate


class Loop:
    """A pipeline whose transformer has an adapter, and its optimizer."""

    def __init__(self, job: RolloutJob) -> None:
        self.job, self.pipe, self.network = job, job.pipeline, job.denoiser
        self.trained, self.optimizer = with_lora(job)
        self.pipe.scheduler.set_timesteps(job.num_steps, device=self.network.device)

    def iterate(self) -> None:
        """Sample the groups, score them, and take one optimizer step."""
        prompts = [prompt for prompt in self.job.prompts for _ in range(self.job.group_size)]
        starts = range(0, len(prompts), self.job.batch)
        batches = [self.sample(prompts[start : start + self.job.batch]) for start in starts]
        advantages = self.advantages(torch.cat([batch.rewards for batch in batches]))

        self.network.train()
        passes = len(batches) * len(self.job.trained_steps)
        for batch, advantage in zip(batches, advantages.split(self.job.batch), strict=True):
            for step in self.job.trained_steps:
                (self.loss(batch, step, advantage) / passes).backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def sample(self, prompts: list[str]) -> Samples:
        """Sample images of prompts; keep what the update replays."""
        self.network.eval()
        job, vae = self.job, self.pipe.vae
        embeds, _, pooled, _ = self.pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
        words = [torch.cat([torch.zeros_like(part), part]).to(self.network.device) for part in (embeds, pooled)]
        side = job.resolution // self.pipe.vae_scale_factor
        shape = (len(prompts), self.network.config.in_channels, side, side)
        x, states, log_probs = torch.randn(shape, device=self.network.device), {}, {}
        for step in range(job.num_steps):
            velocity = self.velocity(x, step, words)
            if step not in job.trained_steps:
                x = x + velocity * self.step_size(step)
                continue
            mean, std = self.moments(x, velocity, step)
            following = mean + std * torch.randn_like(x)
            states[step], log_probs[step] = (x, following), log_density(following, mean, std)
            x = following
        latents = x / vae.config.scaling_factor + vae.config.shift_factor
        images = vae.decode(latents.to(vae.dtype), return_dict=False)[0].float() / 2 + 0.5
        return Samples(words, states, log_probs, job.reward(images.clamp(0, 1)))

    def advantages(self, rewards: Tensor) -> Tensor:
        """Normalise rewards (N,) within the groups, and bound them."""
        groups = rewards.view(-1, self.job.group_size)
        found = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + EPSILON)
        return found.flatten().clamp(-ADVANTAGE, ADVANTAGE)

    def loss(self, batch: Samples, step: int, advantage: Tensor) -> Tensor:
        """Return the clipped surrogate of a batch at a step."""
        x, following = batch.states[step]
        mean, std = self.moments(x, self.velocity(x, step, batch.words), step)
        ratio = (log_density(following, mean, std) - batch.log_probs[step]).exp()
        bounded = ratio.clamp(1 - CLIP, 1 + CLIP)
        return torch.maximum(-advantage * ratio, -advantage * bounded).mean()

    def velocity(self, x: Tensor, step: int, words: list[Tensor]) -> Tensor:
        """Predict with classifier-free guidance."""
        time = self.pipe.scheduler.timesteps[step].expand(2 * len(x))
        with self.job.autocast():
            output = self.network(torch.cat([x, x]), words[0], words[1], time, return_dict=False)[0]
        negative, positive = output.float().chunk(2)
        return negative + self.job.guidance_scale * (positive - negative)

    def step_size(self, step: int) -> Tensor:
        """Return the difference of noise levels, which is negative."""
        return self.pipe.scheduler.sigmas[step + 1] - self.pipe.scheduler.sigmas[step]

    def moments(self, x: Tensor, velocity: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Return the mean and standard deviation of a stochastic step."""
        sigma, size = self.pipe.scheduler.sigmas[step], self.step_size(step)
        below = torch.where(sigma >= 1, self.pipe.scheduler.sigmas[step + 1], sigma)
        diffusion = self.job.noise_level * (sigma / (1 - below)).sqrt()
        drift = diffusion**2 / (2 * sigma)
        mean = x * (1 + drift * size) + velocity * (1 + drift * (1 - sigma)) * size
        return mean, diffusion * (-size).sqrt()


def log_density(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return the mean log-density over the dimensions of a sample: (B,)."""
    found = -((x - mean) ** 2) / (2 * std**2) - std.log() - math.log(2 * math.pi) / 2
    return found.flatten(1).mean(1)
