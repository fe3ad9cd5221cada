"""Train the embedded StableDiffusion3Pipeline from scratch and writes it, with its prompt files, to ``assets/``.

    python scripts/build/shapes_pipeline.py vae        # about 6 minutes on 2 cores
    python scripts/build/shapes_pipeline.py latents    # about 2 minutes
    python scripts/build/shapes_pipeline.py denoiser   # about 30 minutes
    python scripts/build/shapes_pipeline.py web        # about 6 minutes
    python scripts/build/shapes_pipeline.py prompts

Each stage reads what the one before it left in ``--work_dir``. ``denoiser`` writes the pipeline, half-way through its
learning-rate schedule; ``web`` finishes it, on captions of which one in twelve is wrong in one word, as captions from
the web are. So the base can draw what is asked for, as guidance shows, but does not take words at their worth without:
that is for preference tuning. Every file has the layout that diffusers saves, so
``DiffusionPipeline.from_pretrained("assets/shapes-sd3")`` loads it with plain defaults.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm
from transformers import (
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

sys.path.insert(0, str(Path(__file__).parents[2]))  # a clone needs no installation

from diffalign.shapes import disjoint_prompt_set, judge_batch, prompt_set, render
from diffalign.shapes.captions import vocabulary
from scripts.build.shapes_tokenizers import make_clip_tokenizer, make_t5_tokenizer
from scripts.build.shapes_training import (
    CLIP_LENGTH,
    clip_config,
    cosine,
    encode_latents,
    follow,
    random_scenes,
    report,
    ship,
    wording,
)

SHORT = 16  # T5 tokens in most batches
LONG = (64, 256)  # the lengths, one of them the pipeline's default, that every --long_every-th batch uses
BATCH = 256


# --- models -----------------------------------------------------------------------------------------------------------


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 32, 48, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=64,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def make_transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=128,
        caption_projection_dim=128,
        pooled_projection_dim=128,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )


def make_clip(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(clip_config(tokenizer, 64))


def make_t5(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            tie_word_embeddings=False,
        )
    )


def make_pipeline(vae: AutoencoderKL) -> StableDiffusion3Pipeline:
    clip, t5 = make_clip_tokenizer(vocabulary(), CLIP_LENGTH), make_t5_tokenizer(vocabulary())
    return StableDiffusion3Pipeline(
        transformer=make_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=make_clip(clip),
        tokenizer=clip,
        text_encoder_2=make_clip(clip),
        tokenizer_2=clip,
        text_encoder_3=make_t5(t5),
        tokenizer_3=t5,
    )


# --- stages -----------------------------------------------------------------------------------------------------------


def train_vae(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    vae = make_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: cosine(s, args.vae_steps, 100))
    bar = tqdm(range(args.vae_steps), desc="vae")
    for _ in bar:
        images = render(random_scenes(32, rng)[0]) * 2 - 1
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample()).sample.float()
        error = decoded - images
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = error.abs().mean() + error.pow(2).mean() + 3e-4 * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(psnr=f"{-10 * math.log10(error.pow(2).mean().item() / 4):.1f}", kl=f"{kl.item():.2f}")
    vae.eval().requires_grad_(False)
    scenes, prompts = random_scenes(512, rng)
    images = render(scenes)
    with torch.no_grad():
        latents = torch.cat([vae.encode(i * 2 - 1).latent_dist.mean for i in images.split(64)])
        decoded = torch.cat([vae.decode(z).sample for z in latents.split(64)]).div(2).add(0.5).clamp(0, 1)
    strict = [v.strict for v in judge_batch(decoded, [p.metadata for p in prompts])]
    print(f"PSNR {-10 * math.log10((decoded - images).pow(2).mean()):.2f} dB, verified {sum(strict) / len(strict):.3f}")
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    vae.save_pretrained(args.work_dir / "vae")


def encode_text(pipe: StableDiffusion3Pipeline, texts: list[str], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode prompts with the pipeline's ``encode_prompt``, with gradients into the text encoders."""
    embeds, _, pooled, _ = pipe.encode_prompt(
        texts, None, None, device="cpu", do_classifier_free_guidance=False, max_sequence_length=length
    )
    return embeds, pooled


def make_optimizers(modules: torch.nn.Module, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks, AdamW for embeddings, norms, biases and the outer layers.

    Two to three times fewer steps than with AdamW alone.
    """
    inside = ("transformer_blocks.", "encoder.layers.", "encoder.block.")
    named = list(modules.named_parameters())
    matrices = [p for n, p in named if p.ndim == 2 and any(i in n for i in inside) and "relative" not in n]
    chosen = {id(p) for p in matrices}
    others = [p for _, p in named if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def train_denoiser(args: argparse.Namespace) -> None:
    """Train half of a cosine schedule on correct captions."""
    pipe = make_pipeline(AutoencoderKL.from_pretrained(args.work_dir / "vae"))
    train(pipe, args, args.steps, lambda step: cosine(step, 2 * args.steps, args.warmup), wrong=0.0)


def train_web(args: argparse.Namespace) -> None:
    """Train the other, shorter half on captions of which some are wrong."""
    pipe = StableDiffusion3Pipeline.from_pretrained(args.output_dir, torch_dtype=torch.float32)
    half = args.web_steps
    train(pipe, args, half, lambda step: cosine(half + step, 2 * half, 1), wrong=args.wrong)


def train(
    pipe: StableDiffusion3Pipeline,
    args: argparse.Namespace,
    steps: int,
    factor: Callable[[int], float],
    wrong: float,
) -> None:
    torch.manual_seed(args.seed + 2)
    rng = random.Random(args.seed + 2)
    data = load_file(args.work_dir / "latents.safetensors")["latents"]
    specs = json.loads((args.work_dir / "specs.json").read_text())
    modules = torch.nn.ModuleList([pipe.transformer, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3])
    parameters = list(modules.parameters())
    print(f"{sum(p.numel() for p in parameters) / 1e6:.2f} M trained parameters")
    average = [p.detach().clone() for p in parameters]
    optimizers = make_optimizers(modules, args)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
    order = torch.randperm(len(data))
    cursor, started = 0, time.time()
    for step in range(steps):
        long = step % args.long_every == args.long_every - 1
        batch, length = (BATCH // 4, rng.choice(LONG)) if long else (BATCH, SHORT)
        if cursor + batch > len(order):
            cursor, order = 0, torch.randperm(len(data))
        rows = order[cursor : cursor + batch]
        cursor += batch
        x0 = data[rows]
        texts = [wording(specs[i], wrong, rng) for i in rows.tolist()]
        noise = torch.randn_like(x0)
        sigma = torch.sigmoid(torch.randn(batch) * 1.1 + 0.4)
        x = torch.lerp(x0, noise, sigma.view(-1, 1, 1, 1))
        # On CPUs the fused attention's backward pass is about ten times slower in bfloat16 than three plain matmuls.
        with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16):
            embeds, pooled = encode_text(pipe, texts, length)
            output = pipe.transformer(x, embeds, pooled, sigma * 1000, return_dict=False)[0]
        loss = F.mse_loss(output.float(), noise - x0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        follow(average, parameters, step)
        if step % 50 == 0:
            print(f"step {step} loss {loss.item():.4f} {time.time() - started:.0f} s", flush=True)
        if (step + 1) % args.export_every == 0 or step + 1 == steps:
            export(pipe, parameters, average, args)


def export(pipe: StableDiffusion3Pipeline, parameters: list, average: list, args: argparse.Namespace) -> None:
    """Write the averaged weights in fp16 and print their accuracy on held-out prompts."""
    ship(pipe, parameters, average, args)
    pipe = StableDiffusion3Pipeline.from_pretrained(args.output_dir, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for guidance, steps, length in ((1.0, 8, SHORT), (3.0, 8, SHORT), (7.0, 28, 256)):
        settings = {"guidance_scale": guidance, "num_inference_steps": steps, "max_sequence_length": length}
        report(pipe, args.check_per_tag, f"guidance {guidance} steps {steps} length {length}", **settings)


def write_prompts(args: argparse.Namespace) -> None:
    """Write the prompts of training, of validation (settings are chosen on them) and of test (results are reported).

    Validation and test hold out the same words, pairs and relations of training. Their captions differ; so do the
    combinations of positions and colour attributions, see ``disjoint_prompt_set``.
    """
    seed = args.seed + 3
    sets = {
        "train": prompt_set(70, held_out=False, seed=seed),
        "train_long": prompt_set(300, held_out=False, seed=seed, repeat=True),
        "validation": prompt_set(70, held_out=True, seed=seed),
    }
    sets["test"] = disjoint_prompt_set(70, seed=seed, others=[p for prompts in sets.values() for p in prompts])
    for name, prompts in sets.items():
        lines = [json.dumps({"prompt": p.text, **p.metadata}) for p in prompts]
        path = args.output_dir.parent / "prompts" / f"shapes_{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
        print(f"{path}: {len(lines)} prompts")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = {
        "vae": train_vae,
        "latents": encode_latents,
        "denoiser": train_denoiser,
        "web": train_web,
        "prompts": write_prompts,
    }
    parser.add_argument("stage", choices=stages)
    parser.add_argument("--work_dir", type=Path, default=Path("runs/shapes-build"))
    parser.add_argument("--output_dir", type=Path, default=Path("assets/shapes-sd3"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae_steps", type=int, default=2000)
    parser.add_argument("--scenes", type=int, default=150_000)
    parser.add_argument("--steps", type=int, default=3200)
    parser.add_argument("--web_steps", type=int, default=500)
    parser.add_argument("--wrong", type=float, default=0.08)
    parser.add_argument("--warmup", type=int, default=150)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--long_every", type=int, default=16)
    parser.add_argument("--export_every", type=int, default=1600)
    parser.add_argument("--check_per_tag", type=int, default=20)
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    stages[args.stage](args)


if __name__ == "__main__":
    main()
