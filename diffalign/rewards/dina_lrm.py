"""DiNa-LRM (arXiv 2602.11146): the first layers of SD3.5-medium and a head score noised latents; nothing is decoded."""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from diffalign.config import load_yaml
from diffalign.rewards.base import LATENTS, Metadata, RewardCard, register
from diffalign.rewards.support.lora_merge import merge_lora
from diffalign.rewards.support.preprocess import at_least_float32, check_images, on_samples
from diffalign.rewards.support.prompts import unique_prompts
from diffalign.rewards.support.reward_head import RewardHead
from diffalign.rewards.support.weights import Weights, frozen, load_once, on_device, pinned
from diffalign.rng import KeyedRNG

BASE = "stabilityai/stable-diffusion-3.5-medium"
ADAPTER = "checkpoint/backbone_lora"
ADAPTER_FILES = (f"{ADAPTER}/adapter_config.json", f"{ADAPTER}/adapter_model.safetensors")
CONFIG, HEAD = "config.json", "checkpoint/rm_head.pt"
NOISE, IMAGE_NOISE = 0.4, 0.1  # published levels for latents of a sampler, and for images
KEPT_PROMPTS = 64  # encoded prompts in main memory; one takes 2.7 MB at the published size


class Network(nn.Module):
    """The first layers of an SD3 transformer, and a head that reads some of them.

    Args:
        transformer: whose further layers are dropped.
        config: the table ``model`` of the published ``config.json``.
    """

    def __init__(self, transformer: SD3Transformer2DModel, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.visual, self.text = config["visual_head_idx"], config["text_head_idx"]
        self.pos_embed, self.time_text_embed = transformer.pos_embed, transformer.time_text_embed
        self.context_embedder = transformer.context_embedder
        self.transformer_blocks = transformer.transformer_blocks[: config["num_transformer_layers"]]
        head = config["reward_head"]
        sizes = (transformer.inner_dim, len(self.visual), len(self.text), head["num_queries"], head["num_attn_heads"])
        self.reward_head = RewardHead(*sizes)

    def forward(self, latents: Tensor, time: Tensor, embeds: Tensor, pooled: Tensor) -> Tensor:
        """Score latents (B, C, h, w) at times (B,), in [0, 1000], for encoded prompts: (B,)."""
        image, text = self.pos_embed(latents), self.context_embedder(embeds)
        condition = self.time_text_embed(time, pooled)
        images, texts = [image], [text]
        for block in self.transformer_blocks:
            text, image = block(hidden_states=image, encoder_hidden_states=text, temb=condition)
            images.append(image)
            texts.append(text)
        return self.reward_head([images[i] for i in self.visual], [texts[i] for i in self.text], condition)


class PromptEncoder(nn.Module):
    """The text encoders of the base model; keeps the embeddings of the last prompts.

    Args:
        pipeline: with text encoders and tokenizers.
        length: T5 tokens per prompt.
    """

    def __init__(self, pipeline: StableDiffusion3Pipeline, length: int) -> None:
        super().__init__()
        self.encoders = nn.ModuleList([pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3])
        self.pipeline, self.length = pipeline, length
        self.known: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()
        self.lock = threading.Lock()  # of ``known``, for threads of a server

    def encode(self, prompts: Sequence[str], weights: Weights, device: torch.device) -> tuple[Tensor, Tensor]:
        """Encode prompts: embeddings (B, L, D) and pooled embeddings (B, P), on the device.

        The encoders are moved there if a prompt is not kept.
        """
        once, rows = unique_prompts(prompts)
        with self.lock:
            if new := [prompt for prompt in once if prompt not in self.known]:
                with torch.no_grad(), on_device(self, weights, device):
                    self.known.update(zip(new, self._encoded(new, device), strict=True))
            for prompt in once:
                self.known.move_to_end(prompt)
            found = [self.known[prompt] for prompt in once]
            while len(self.known) > KEPT_PROMPTS:
                self.known.popitem(last=False)
        embeds, pooled = (torch.stack(parts).to(device)[rows] for parts in zip(*found, strict=True))
        return embeds, pooled

    def _encoded(self, prompts: Sequence[str], device: torch.device) -> Iterable[tuple[Tensor, Tensor]]:
        options = {"do_classifier_free_guidance": False, "max_sequence_length": self.length}
        embeds, _, pooled, _ = self.pipeline.encode_prompt(list(prompts), None, None, device=device, **options)
        return zip(embeds.cpu(), pooled.cpu(), strict=True)


def folder_of(weights: Weights) -> Path:
    """Locate the published files: a folder, or a hub repository."""
    files = [CONFIG, HEAD, *ADAPTER_FILES]
    if Path(weights.path).exists():
        folder = Path(weights.path)
    else:
        folder = Path(snapshot_download(weights.path, revision=weights.revision, allow_patterns=files))
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise ValueError(f"{weights.path} lacks {', '.join(missing)}: copy the whole repository of DiNa-LRM")
    return folder


def read_config(path: Path) -> dict[str, Any]:
    """Read the table ``model`` of the published configuration. Raises ValueError for a network of another kind."""
    try:
        config = load_yaml(path)["model"]
        kind = config["use_lora"], bool(config.get("use_logistic")), config["reward_head"]["use_proj_in"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no configuration of DiNa-LRM ({error!r}): copy the published one") from error
    if kind != (True, False, False):
        raise ValueError(f"{path} describes another kind of network (LoRA, logistic, projection: {kind})")
    return config


def _load(weights: Weights, base: str) -> tuple[Network, FlowMatchEulerDiscreteScheduler]:
    folder = folder_of(weights)
    source, config = pinned(base), read_config(folder / CONFIG)
    transformer = SD3Transformer2DModel.from_pretrained(**source, subfolder="transformer", dtype=weights.dtype)
    network = Network(transformer, config)
    adapter = load_file(folder / ADAPTER_FILES[1])
    adapted = nn.ModuleDict({"transformer_blocks": network.transformer_blocks})
    merge_lora(adapted, adapter, json.loads((folder / ADAPTER_FILES[0]).read_text()), str(folder / ADAPTER))
    network.reward_head.load_state_dict(torch.load(folder / HEAD, map_location="cpu", weights_only=True))
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(**source, subfolder="scheduler")
    return frozen(network, weights), scheduler


def _load_text(weights: Weights, base: str, length: int) -> PromptEncoder:
    pipeline = StableDiffusion3Pipeline.from_pretrained(**pinned(base), transformer=None, vae=None, dtype=weights.dtype)
    return frozen(PromptEncoder(pipeline, length), weights)


def _load_vae(weights: Weights, base: str) -> AutoencoderKL:
    return frozen(AutoencoderKL.from_pretrained(**pinned(base), subfolder="vae"), weights)


def prompt_key(prompt: str) -> int:
    """Return the address of a prompt's noise."""
    return int.from_bytes(hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).digest()[:8], "little")


@dataclass(frozen=True)
class DiNaReward:
    """Predict human preference from latents of SD3's VAE: (output + 10) / 10, about 0 to 2.

    Departures from the published code: 1. it draws new noise at each call; here the noise is a function of ``seed`` and
    prompt, so that scores are reproducible and images of one prompt get the same noise. 2. The LoRA is merged, in
    float32.

    Images are encoded by the base model's VAE, after a resize of their sides to multiples of a token's size.

    Args:
        name: under which scores are stored.
        weights: of the LoRA and the head; precision and placement are those of the whole network.
        base: folder, or hub id with or without @revision, of Stable Diffusion 3.5 medium.
        noise: level in (0, 1) to which latents are noised; None: 0.4 for latents, 0.1 for images, as published.
        seed: of the noise.
        max_sequence_length: T5 tokens per prompt.
        differentiable: True.
        range: lowest and highest score.
        wants: latents.
    """

    name: str
    weights: Weights
    base: str = BASE
    noise: float | None = None
    seed: int = 0
    max_sequence_length: int = 256
    differentiable: bool = True
    range: tuple[float, float] = (-math.inf, math.inf)
    wants: str = LATENTS

    def __post_init__(self) -> None:
        """Check the noise level."""
        if self.noise is not None and not 0 < self.noise < 1:
            raise ValueError(f"reward {self.name!r}: noise is {self.noise}; write a level between 0 and 1")

    def check_latents(self, vae_config: Mapping[str, Any]) -> None:
        """Raise ValueError unless latents of a VAE are those of the base model's."""
        own = AutoencoderKL.load_config(**pinned(self.base), subfolder="vae")
        for key in ("latent_channels", "scaling_factor", "shift_factor"):
            if vae_config.get(key) != own.get(key):
                raise ValueError(
                    f"it scores latents of {self.base}, whose VAE has {key} {own.get(key)}; that of this model has "
                    f"{vae_config.get(key)}: train a model with that VAE, or choose a reward of images"
                )

    @on_samples()
    def __call__(self, samples: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """Score latents (B, C, h, w), or images (B, 3, H, W), float, [0, 1]: (B,), float32 or wider."""
        network, scheduler = load_once(_load, self.weights, self.base)
        text = load_once(_load_text, self.weights, self.base, self.max_sequence_length)
        is_image = samples.shape[1] == 3
        latents = self._encoded(samples, prompts) if is_image else at_least_float32(samples)
        embeds, pooled = text.encode(prompts, self.weights, samples.device)

        level = self.noise or (IMAGE_NOISE if is_image else NOISE)
        nearest = (scheduler.sigmas - level).abs().argmin()
        sigma, time = scheduler.sigmas[nearest].item(), scheduler.timesteps[nearest].to(samples.device)
        noised = (1 - sigma) * latents + sigma * self._noise(latents, prompts, "noise")
        with on_device(network, self.weights, samples.device):
            found = network(noised.to(self.weights.dtype), time.expand(len(samples)), embeds, pooled)
        return (at_least_float32(found) + 10) / 10

    def _encoded(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Encode images: a sample of the VAE's distribution, by keyed noise."""
        check_images(images)
        vae = load_once(_load_vae, self.weights, self.base)
        unit = 2 * 2 ** (len(vae.config.block_out_channels) - 1)  # a token is 2 x 2 latents
        size = tuple(max(1, round(side / unit)) * unit for side in images.shape[-2:])
        images = at_least_float32(images)
        if size != tuple(images.shape[-2:]):
            images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
        with on_device(vae, self.weights, images.device):
            found = vae.encode((images * 2 - 1).to(self.weights.dtype)).latent_dist
        mean, std = at_least_float32(found.mean), at_least_float32(found.std)
        latents = mean + std * self._noise(mean, prompts, "vae")
        return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor

    def _noise(self, latents: Tensor, prompts: Sequence[str], stream: str) -> Tensor:
        keys = [(prompt_key(prompt),) for prompt in prompts]
        return KeyedRNG(self.seed).normal_batch(latents.shape[1:], f"dina_lrm/{stream}", keys).to(latents)


FACTS = RewardCard(
    "human preference, from latents", 0.1, "arXiv 2602.11146", "liuhuohuo/DiNa-LRM-SD35M-12layers", "Apache-2.0", 7036
)


@register("dina_lrm", FACTS)
def dina_lrm(
    name: str,
    path: str = FACTS.weights,
    base: str = BASE,
    noise: float | None = None,
    seed: int = 0,
    max_sequence_length: int = 256,
    revision: str | None = None,
    precision: str = "bf16",
    offload: bool = False,
) -> DiNaReward:
    """Build the published model, or one from the same files in a folder ``path`` on another ``base``."""
    weights = Weights(path, revision, precision, offload)
    return DiNaReward(name, weights, base, noise, seed, max_sequence_length)
