"""Train the embedded FluxKontextPipeline, which edits images by instructions, and write its prompts.

    python scripts/build/shapes_edit.py denoiser   # 36 minutes on one core
    python scripts/build/shapes_edit.py denoiser --go_on --seed 1 --lr 1.5e-3 --wrong 0.1 --minutes 15
    python scripts/build/shapes_edit.py denoiser --go_on --seed 2 --lr 1.5e-3 --wrong 0.1 --minutes 18 --scenes 51200
    python scripts/build/shapes_edit.py prompts

The pipeline has the VAE of ``assets/shapes-sd3``. Its transformer and text encoders learn from scenes, instructions and
edited scenes; one instruction in five is wrong in one word, which leaves something to preference tuning.
"""

from __future__ import annotations

import argparse
import io
import random
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxTransformer2DModel
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel, T5Config, T5EncoderModel, T5TokenizerFast

sys.path.insert(0, str(Path(__file__).parents[2]))  # a clone needs no installation

from diffalign.models.flow import pack
from diffalign.models.flux import image_ids
from diffalign.shapes import render
from diffalign.shapes.edits import judge_edits, phrase, random_edit, vocabulary, wrong_edit
from scripts import ROOT
from scripts.build.shapes_tokenizers import make_clip_tokenizer, make_t5_tokenizer
from scripts.build.shapes_training import CLIP_LENGTH, clip_config, cosine, follow, ship

WIDTH = 96
LENGTH = 16  # T5 tokens
SIDE = 8  # of the latents
EDITS = {"train": 600, "validation": 200, "test": 200}


def make_transformer() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=32,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=WIDTH // 32,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=64,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )


def make_t5(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        d_kv=32,
        d_ff=192,
        num_layers=2,
        num_heads=3,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        tie_word_embeddings=False,
    )
    return T5EncoderModel(config)


def make_pipeline() -> FluxKontextPipeline:
    clip, t5 = make_clip_tokenizer(vocabulary(), CLIP_LENGTH), make_t5_tokenizer(vocabulary())
    return FluxKontextPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=AutoencoderKL.from_pretrained(ROOT / "assets/shapes-sd3/vae", torch_dtype=torch.float32),
        text_encoder=CLIPTextModel(clip_config(clip, 64)),
        tokenizer=clip,
        text_encoder_2=make_t5(t5),
        tokenizer_2=t5,
        transformer=make_transformer(),
    )


def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    with torch.no_grad():
        images = (images * 2 - 1).contiguous(memory_format=torch.channels_last)
        mean = torch.cat([vae.encode(part).latent_dist.mean for part in images.split(32)])
    return (mean - vae.config.shift_factor) * vae.config.scaling_factor


def make_data(vae: AutoencoderKL, count: int, rng: random.Random) -> tuple[Tensor, Tensor, list]:
    """Draw ``count`` edits: latents of sources and of results, and (source scene, edit)."""
    sources, results, edits = [], [], []
    vae = vae.to(memory_format=torch.channels_last)
    for _ in range(count // 256):
        drawn = [random_edit(rng) for _ in range(256)]
        sources.append(encode(vae, render([before for before, _, _ in drawn])))
        results.append(encode(vae, render([after for _, _, after in drawn])))
        edits += [(before, edit) for before, edit, _ in drawn]
    return torch.cat(sources), torch.cat(results), edits


def make_optimizers(modules: torch.nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Use Muon for the matrices inside blocks, AdamW for the others."""
    inside = ("transformer_blocks.", "encoder.layers.", "encoder.block.")
    named = list(modules.named_parameters())
    matrices = [p for n, p in named if p.ndim == 2 and any(i in n for i in inside) and "relative" not in n]
    chosen = {id(p) for p in matrices}
    others = [p for _, p in named if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def train_denoiser(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    pipe = FluxKontextPipeline.from_pretrained(args.work_dir / "fp32") if args.go_on else make_pipeline()
    started = time.time()
    sources, results, edits = make_data(pipe.vae, args.scenes, rng)
    print(f"{len(edits)} edits in {time.time() - started:.0f} s", flush=True)
    modules = torch.nn.ModuleList([pipe.transformer, pipe.text_encoder, pipe.text_encoder_2])
    parameters = [p for p in modules.parameters() if p.requires_grad]
    print(f"{sum(p.numel() for p in parameters) / 1e6:.2f} M trained parameters")
    average = [p.detach().clone() for p in parameters]
    optimizers = make_optimizers(modules, args.lr)
    ids = image_ids(SIDE // 2, SIDE // 2, torch.device("cpu"), torch.float32)
    ids = torch.cat([ids, ids + torch.tensor([1.0, 0.0, 0.0])])
    started, step, share, order = time.time(), 0, 0.0, torch.randperm(len(edits))
    while share < 1:
        # The schedule follows the clock, so that training ends in time on any machine.
        share = max((time.time() - started) / (60 * args.minutes), step / args.steps)
        factor = min((step + 1) / args.warmup, cosine(int(1000 * min(share, 1)), 1000, 1)) + 1e-3
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * factor
        first = step * args.batch % (len(edits) - args.batch)
        rows = order[first : first + args.batch]
        texts = []
        for scene, edit in (edits[i] for i in rows.tolist()):
            wrong = rng.random() < args.wrong
            texts.append("" if rng.random() < 0.05 else phrase(wrong_edit(edit, scene, rng) if wrong else edit, rng))
        x0 = results[rows]
        noise = torch.randn_like(x0)
        sigma = torch.sigmoid(torch.randn(args.batch) * 1.1 + 0.4)
        x = torch.lerp(x0, noise, sigma.view(-1, 1, 1, 1))
        with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            embeds, pooled, text_ids = pipe.encode_prompt(texts, None, device="cpu", max_sequence_length=LENGTH)
            output = pipe.transformer(
                torch.cat([pack(x), pack(sources[rows])], dim=1),
                embeds,
                pooled,
                sigma,
                ids,
                text_ids,
                return_dict=False,
            )[0][:, : SIDE * SIDE // 4]
        loss = F.mse_loss(output.float(), pack(noise - x0))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        follow(average, parameters, step)
        step += 1
        if step % 50 == 0:
            print(f"step {step} loss {loss.item():.4f} {time.time() - started:.0f} s", flush=True)
        if step % args.export_every == 0 or share >= 1:
            ship(pipe, parameters, average, args)
            check(args)


def check(args: argparse.Namespace) -> None:
    """Print the share of correct edits of new scenes."""
    pipe = FluxKontextPipeline.from_pretrained(args.output_dir, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    rng = random.Random(args.seed + 1)
    drawn = [random_edit(rng) for _ in range(args.check)]
    sources, texts = render([before for before, _, _ in drawn]), [phrase(edit, rng) for _, edit, _ in drawn]
    size = {"height": 64, "width": 64, "max_area": 64 * 64, "_auto_resize": False}
    generator = torch.Generator().manual_seed(0)
    settings = {"num_inference_steps": 8, "max_sequence_length": LENGTH, "output_type": "pt", "generator": generator}
    images = pipe(sources, texts, **size, **settings).images
    verdicts = judge_edits(sources, images, [edit for _, edit, _ in drawn])
    kinds = [edit["kind"] for _, edit, _ in drawn]
    right = {
        kind: sum(v.correct for v, k in zip(verdicts, kinds, strict=True) if k == kind) / kinds.count(kind)
        for kind in sorted(set(kinds))
    }
    difference = sum(v.difference for v in verdicts) / len(verdicts)
    correct = sum(v.correct for v in verdicts) / len(verdicts)
    print(f"correct {correct:.3f} {right} difference {difference:.4f}", flush=True)


def write_prompts(args: argparse.Namespace) -> None:
    """Write edits of training, validation and test, of different scenes, as tables with a column of images."""
    rng = random.Random(args.seed + 2)
    for name, count in EDITS.items():
        rows = []
        for _ in range(count):
            before, edit, _ = random_edit(rng)
            pixels = (render([before])[0] * 255).round().byte().permute(1, 2, 0).numpy()
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
            image = {"bytes": buffer.getvalue(), "path": None}
            rows.append({"prompt": phrase(edit, rng), "image": image, "edit": edit})
        path = args.output_dir.parent / "prompts" / f"shapes_edit_{name}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path, compression="zstd")
        print(f"{path}: {len(rows)} edits, {path.stat().st_size / 1e3:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = {"denoiser": train_denoiser, "check": check, "prompts": write_prompts}
    parser.add_argument("stage", choices=stages)
    parser.add_argument("--work_dir", type=Path, default=Path("runs/shapes-edit-build"))
    parser.add_argument("--output_dir", type=Path, default=Path("assets/shapes-kontext"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=25_600)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--minutes", type=float, default=33.0)
    parser.add_argument("--go_on", action="store_true", help="start from the weights of an earlier call")
    parser.add_argument("--steps", type=int, default=20_000, help="end earlier, after this many")
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--wrong", type=float, default=0.2)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--export_every", type=int, default=500)
    parser.add_argument("--check", type=int, default=128)
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    stages[args.stage](args)


if __name__ == "__main__":
    main()
