"""The inner loop of diffusers' training scripts, on Diffusion-DPO of SDXL, as an adapter for ``--against``.

Its structure is that of diffusers' example of Diffusion-DPO: images of a pair are encoded and noised together, the
UNet predicts with its adapter and, without gradients, without it, and the loss compares the two errors. Written for
this bench; checks, checkpoints and logs are left out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from scripts.bench.against import Job, PreferenceJob, with_lora


def prepare(job: Job) -> Callable[[], None]:
    """Return what does one optimizer step. NotImplementedError: another model than SDXL, or another method."""
    if not isinstance(job, PreferenceJob) or type(job.pipeline).__name__ != "StableDiffusionXLPipeline":
        raise NotImplementedError(f"no loop for {type(job.pipeline).__name__}")
    return Loop(job).iterate


class Loop:
    """A pipeline whose UNet has an adapter, and its optimizer."""

    def __init__(self, job: PreferenceJob) -> None:
        self.job, self.pipe, self.network = job, job.pipeline, job.denoiser
        self.trained, self.optimizer = with_lora(job)
        self.times = self.pipe.scheduler.config.num_train_timesteps
        powers = self.pipe.scheduler.alphas_cumprod.to(self.network.device, torch.float32)
        self.scales = powers.sqrt(), (1 - powers).sqrt()

    def iterate(self) -> None:
        """Take one optimizer step on all pairs."""
        prompts, batch = list(self.job.prompts), self.job.batch
        for start in range(0, len(prompts), batch):
            part = prompts[start : start + batch]
            (self.loss(part) * len(part) / len(prompts)).backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def loss(self, prompts: list[str]) -> Tensor:
        """Return the loss of a batch of pairs: the preferred images first, then the others."""
        count, device = len(prompts), self.network.device
        pixels = torch.rand(2 * count, 3, self.job.resolution, self.job.resolution, device=device) * 2 - 1
        latents, words = self.encoded_images(pixels), self.encoded_prompts(prompts)
        noise = torch.randn_like(latents[:count]).repeat(2, 1, 1, 1)
        times = torch.randint(0, self.times, (count,), device=device).repeat(2)
        signal, sigma = (scale[times].view(-1, 1, 1, 1) for scale in self.scales)
        noisy = signal * latents + sigma * noise

        own = self.errors(noisy, times, words, noise)
        with torch.no_grad():
            self.network.disable_adapters()
            reference = self.errors(noisy, times, words, noise)
            self.network.enable_adapters()
        margins = [better - worse for better, worse in (own.chunk(2), reference.chunk(2))]
        return -F.logsigmoid(-0.5 * self.job.beta * (margins[0] - margins[1])).mean()

    @torch.no_grad()
    def encoded_images(self, pixels: Tensor) -> Tensor:
        """Encode images, a few at a time."""
        vae, parts = self.pipe.vae, pixels.split(self.job.batch)
        drawn = [vae.encode(part.to(vae.dtype)).latent_dist.sample() for part in parts]
        return torch.cat(drawn).float() * vae.config.scaling_factor

    @torch.no_grad()
    def encoded_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """Encode prompts once for both images of a pair."""
        embeds, _, pooled, _ = self.pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
        side, device = self.job.resolution, self.network.device
        sizes = torch.tensor([[side, side, 0, 0, side, side]], device=device).repeat(2 * len(prompts), 1)
        found = {"embeds": embeds.repeat(2, 1, 1), "pooled": pooled.repeat(2, 1)}
        return {name: part.to(device) for name, part in found.items()} | {"sizes": sizes}

    def errors(self, noisy: Tensor, times: Tensor, words: dict[str, Tensor], noise: Tensor) -> Tensor:
        """Return the mean squared error of each sample: (2B,)."""
        added = {"text_embeds": words["pooled"], "time_ids": words["sizes"]}
        with self.job.autocast():
            output = self.network(noisy, times, words["embeds"], added_cond_kwargs=added, return_dict=False)[0]
        return (output.float() - noise).square().flatten(1).mean(1)
