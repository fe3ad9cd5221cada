"""Shared by the builders of the embedded pipelines: scenes, latents, captions, and export of weights."""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTokenizer

from diffalign.shapes import TAGS, caption, judge_batch, prompt_set, render, scene_for
from diffalign.shapes.captions import OPENINGS, is_held_out, neighbours, phrase

CLIP_LENGTH = 16  # tokens; the longest caption has 10 words
TAG_WEIGHTS = {"single_object": 1, "two_object": 3, "counting": 4, "colors": 2, "position": 6, "color_attr": 5}


def clip_config(tokenizer: CLIPTokenizer, width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def random_scenes(count: int, rng: random.Random) -> tuple[list, list]:
    tags = rng.choices(list(TAG_WEIGHTS), list(TAG_WEIGHTS.values()), k=count)
    prompts = [caption(rng, tag, plain=1.0) for tag in tags]
    return [scene_for(p.metadata, rng) for p in prompts], prompts


def encode_latents(args: argparse.Namespace) -> None:
    """``latents.safetensors`` and ``specs.json`` of ``args.scenes`` scenes, by the VAE in ``args.work_dir``."""
    rng = random.Random(args.seed + 1)
    vae = AutoencoderKL.from_pretrained(args.work_dir / "vae").to(memory_format=torch.channels_last)
    latents, specs = [], []
    for _ in tqdm(range(args.scenes // 256), desc="latents"):
        scenes, prompts = random_scenes(256, rng)
        with torch.no_grad():
            # Slices of 32 stay in the processor's cache: four times faster than 256 at once.
            images = (render(scenes) * 2 - 1).contiguous(memory_format=torch.channels_last).split(32)
            mean = torch.cat([vae.encode(i).latent_dist.mean for i in images])
        latents.append((mean - vae.config.shift_factor) * vae.config.scaling_factor)
        specs += [p.metadata for p in prompts]
    save_file({"latents": torch.cat(latents).contiguous()}, args.work_dir / "latents.safetensors")
    (args.work_dir / "specs.json").write_text(json.dumps(specs))


def wording(spec: dict, wrong: float, rng: random.Random) -> str:
    """A training wording of a specification; for a share ``wrong`` of the captions, wrong in one word.

    One caption in ten is dropped, for classifier-free guidance.
    """
    if rng.random() < 0.1:
        return ""
    if rng.random() < wrong:
        spec = rng.choice(neighbours(spec))
    while True:
        opening = "" if rng.random() < 0.3 else rng.choice(OPENINGS[1:])
        if not is_held_out(spec, opening):
            return opening + phrase(spec)


def cosine(step: int, total: int, warmup: int) -> float:
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / total))


def follow(average: Sequence[Tensor], parameters: Sequence[Tensor], step: int) -> None:
    """Update the average of the weights after step ``step``, from 0."""
    decay = min(0.999, (1 + step) / (10 + step))
    torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)


def ship(
    pipe: DiffusionPipeline, parameters: Sequence[Tensor], average: Sequence[Tensor], args: argparse.Namespace
) -> None:
    """Write the averaged weights, in fp16 to ``args.output_dir``; ``pipe`` keeps its own."""
    raw = [p.detach().clone() for p in parameters]
    torch._foreach_copy_([p.data for p in parameters], average)
    pipe.save_pretrained(args.work_dir / "fp32")
    torch._foreach_copy_([p.data for p in parameters], raw)
    half = type(pipe).from_pretrained(args.work_dir / "fp32", torch_dtype=torch.float16)
    half.save_pretrained(args.output_dir)
    # transformers loads a model in the dtype that its config names, diffusers in float32: with plain defaults half of
    # the pipeline would be in half precision. The files stay small, the computation is float32.
    for path in args.output_dir.glob("text_encoder*/config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float32"}, indent=2) + "\n")


def report(pipe: DiffusionPipeline, per_tag: int, label: str, **settings: object) -> None:
    """Print the share of held-out prompts that ``pipe(..., **settings)`` gets right."""
    prompts = prompt_set(per_tag, held_out=True, seed=1)
    texts, generator = [p.text for p in prompts], torch.Generator().manual_seed(0)
    images = pipe(texts, output_type="pt", generator=generator, **settings).images
    right = judge_batch(images, [p.metadata for p in prompts])
    tags = [p.metadata["tag"] for p in prompts]
    rates = {t: sum(v.strict for v, u in zip(right, tags, strict=True) if u == t) / tags.count(t) for t in TAGS}
    overall = sum(v.strict for v in right) / len(right)
    words = ", ".join(f"{t} {r:.2f}" for t, r in rates.items())
    print(f"{label}: strict {overall:.3f} ({words})", flush=True)
