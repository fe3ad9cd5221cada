"""Train the embedded StableDiffusionPipeline from scratch and writes it to ``assets/shapes-sd``.

    python scripts/build/shapes_sd.py latents    # about 4 minutes on 1 core
    python scripts/build/shapes_sd.py train      # about 45 minutes; goes on from its last checkpoint

A UNet that predicts epsilon, one CLIP text encoder trained with it, and the VAE and the tokenizer of
``assets/shapes-sd3``. As there, the last steps see captions of which one in twelve is wrong in one word. ``train``
stops after ``--minutes``, if given, and started again with the same arguments takes the very same steps from there on.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel, CLIPTokenizer

sys.path.insert(0, str(Path(__file__).parents[2]))  # a clone needs no installation

from scripts.build.shapes_training import clip_config, cosine, encode_latents, follow, report, ship, wording

WIDTH = 80
BATCH = 256
# The error of epsilon, weighted by 1 + sigma^2 / alpha^2, is that of v: what is noisiest, where the layout is decided,
# counts as much as the rest. Without a bound the last levels, 200 times as heavy, would drown the others.
MAX_WEIGHT = 20.0


# --- models -----------------------------------------------------------------------------------------------------------


def make_unet() -> UNet2DConditionModel:
    """Convolutions at 8 x 8 latent positions, attention at 4 x 4."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        block_out_channels=(32, WIDTH),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,  # for this class, of the time of SD 1.5, the number of heads
        cross_attention_dim=WIDTH,
        norm_num_groups=8,
        use_linear_projection=True,
    ).to(memory_format=torch.channels_last)


def make_clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(clip_config(tokenizer, WIDTH))


def make_scheduler() -> DDIMScheduler:
    """SD 1.5's schedule, in DDIM's form; so that few steps are enough, the first of them is at the most noise."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def make_pipeline(args: argparse.Namespace) -> StableDiffusionPipeline:
    tokenizer = CLIPTokenizer.from_pretrained(args.parts / "tokenizer")
    vae = AutoencoderKL.from_pretrained(args.work_dir / "vae")
    vae.register_to_config(shift_factor=None)
    pipe = StableDiffusionPipeline(
        unet=make_unet(),
        scheduler=make_scheduler(),
        vae=vae,
        text_encoder=make_clip(tokenizer),
        tokenizer=tokenizer,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


# --- stages -----------------------------------------------------------------------------------------------------------


def make_latents(args: argparse.Namespace) -> None:
    """Latents without a shift, which StableDiffusionPipeline does not know."""
    vae = AutoencoderKL.from_pretrained(args.parts / "vae", torch_dtype=torch.float32)
    vae.register_to_config(shift_factor=0.0)
    vae.save_pretrained(args.work_dir / "vae")
    encode_latents(args)


def matrix(kernel: Tensor) -> Tensor:
    """A view of (out, in) as it is, of (out, in, h, w) in channels-last layout as (out, h * w * in)."""
    return kernel if kernel.ndim == 2 else kernel.permute(0, 2, 3, 1).flatten(1)


class Muon(torch.optim.Muon):
    """Muon of matrices and of convolution kernels, which it sees as matrices on the same storage."""

    def __init__(self, parameters: list[torch.nn.Parameter], **options: object) -> None:
        self.parameters = parameters
        views = [torch.nn.Parameter(matrix(p.data)) for p in parameters]
        assert all(v.data_ptr() == p.data_ptr() for v, p in zip(views, parameters, strict=True))
        super().__init__(views, **options)

    def step(self) -> None:
        for view, parameter in zip(self.param_groups[0]["params"], self.parameters, strict=True):
            view.grad, parameter.grad = matrix(parameter.grad), None
        super().step()


def make_optimizers(modules: torch.nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for matrices and kernels inside blocks, AdamW for embeddings, norms, biases and the outer layers."""
    inside = ("attentions.", "resnets.", "samplers.", "encoder.layers.")
    named = list(modules.named_parameters())
    weights = [p for n, p in named if p.ndim in (2, 4) and any(i in n for i in inside)]
    chosen = {id(p) for p in weights}
    others = [p for _, p in named if id(p) not in chosen]
    return [
        Muon(weights, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def rate(step: int, args: argparse.Namespace) -> float:
    """Half of a cosine on right captions, then the other half, shorter, on captions of which some are wrong."""
    if step < args.steps:
        return cosine(step, 2 * args.steps, args.warmup)
    return cosine(args.web_steps + step - args.steps, 2 * args.web_steps, 1)


def loss_of_batch(pipe: StableDiffusionPipeline, x0: Tensor, texts: list[str], generator: torch.Generator) -> Tensor:
    """The weighted squared error of epsilon, at timesteps drawn as the flow pipeline's are: by their noise ratio."""
    ratios = (1 / pipe.scheduler.alphas_cumprod - 1).sqrt()  # sigma / alpha of each timestep
    wanted = torch.exp(torch.randn(len(x0), generator=generator) * 1.1 + 0.4)
    t = torch.searchsorted(ratios, wanted).clamp_max(len(ratios) - 1)
    noise = torch.randn(x0.shape, generator=generator)
    x = pipe.scheduler.add_noise(x0, noise, t).contiguous(memory_format=torch.channels_last)
    # On CPUs the fused attention's backward pass is about ten times slower in bfloat16 than three plain matmuls.
    with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16):
        embeds, _ = pipe.encode_prompt(texts, "cpu", 1, False)
        output = pipe.unet(x, t, embeds, return_dict=False)[0]
    weight = (1 + ratios[t].square()).clamp_max(MAX_WEIGHT)
    return ((output.float() - noise).square().mean((1, 2, 3)) * weight).mean()


def draw_batch(specs: list[dict], step: int, args: argparse.Namespace) -> tuple[list[int], list[str], torch.Generator]:
    """The rows, captions and noise of a step are a function of seed and step, so that a training can go on."""
    rng = random.Random(f"{args.seed} {step}")
    rows = rng.sample(range(len(specs)), BATCH)
    wrong = args.wrong if step >= args.steps else 0.0
    texts = [wording(specs[row], wrong, rng) for row in rows]
    return rows, texts, torch.Generator().manual_seed(rng.getrandbits(60))


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    pipe = make_pipeline(args)
    data = load_file(args.work_dir / "latents.safetensors")["latents"]
    specs = json.loads((args.work_dir / "specs.json").read_text())
    modules = torch.nn.ModuleList([pipe.unet, pipe.text_encoder])
    parameters = list(modules.parameters())
    print(f"{sum(p.numel() for p in parameters) / 1e6:.2f} M trained parameters")
    average = [p.detach().clone() for p in parameters]
    optimizers = make_optimizers(modules, args.lr)
    started, step = time.time(), restore(args, modules, average, optimizers)
    while step < args.steps + args.web_steps:
        rows, texts, generator = draw_batch(specs, step, args)
        loss = loss_of_batch(pipe, data[rows], texts, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = args.lr * rate(step, args)
            optimizer.step()
            optimizer.zero_grad()
        follow(average, parameters, step)
        if step % 50 == 0:
            clocks = f"{time.time() - started:.0f} s, {time.process_time():.0f} s of a core"
            print(f"step {step} loss {loss.item():.4f} {clocks}", flush=True)
        step += 1
        late = args.minutes is not None and time.time() - started > 60 * args.minutes
        if late or step % args.save_every == 0 or step == args.steps + args.web_steps:
            save(args, step, modules, average, optimizers)
        if step % args.export_every == 0 or step == args.steps + args.web_steps:
            export(pipe, parameters, average, args)
        if late:
            return print(f"stopped at step {step}: start again with the same arguments to go on")
    return None


def save(args: argparse.Namespace, step: int, modules: torch.nn.Module, average: list, optimizers: list) -> None:
    state = {
        "step": step,
        "modules": modules.state_dict(),
        "average": average,
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    torch.save(state, args.work_dir / "state.tmp")
    (args.work_dir / "state.tmp").replace(args.work_dir / "state.pt")


def restore(args: argparse.Namespace, modules: torch.nn.Module, average: list, optimizers: list) -> int:
    """Restore the last checkpoint, and return the step to resume from."""
    path = args.work_dir / "state.pt"
    if not path.is_file():
        return 0
    state = torch.load(path, weights_only=True)
    modules.load_state_dict(state["modules"])
    torch._foreach_copy_(average, state["average"])
    for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(kept)
    return state["step"]


def export(pipe: StableDiffusionPipeline, parameters: list, average: list, args: argparse.Namespace) -> None:
    """Write the averaged weights in fp16 and print their accuracy on held-out prompts."""
    ship(pipe, parameters, average, args)
    check(args)


def check(args: argparse.Namespace) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(args.output_dir, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for guidance, steps, spacing in ((1.0, 8, "leading"), (1.0, 8, "trailing"), (2.0, 8, "trailing")):
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing=spacing)
        settings = {"guidance_scale": guidance, "num_inference_steps": steps}
        report(pipe, args.check_per_tag, f"guidance {guidance} steps {steps} {spacing}", **settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = {"latents": make_latents, "train": train, "check": check}
    parser.add_argument("stage", choices=stages)
    parser.add_argument("--work_dir", type=Path, default=Path("runs/shapes-sd-build"))
    parser.add_argument("--parts", type=Path, default=Path("assets/shapes-sd3"), help="where VAE and tokenizer are")
    parser.add_argument("--output_dir", type=Path, default=Path("assets/shapes-sd"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=150_000)
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--web_steps", type=int, default=600)
    parser.add_argument("--wrong", type=float, default=0.08)
    parser.add_argument("--warmup", type=int, default=150)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--minutes", type=float, default=None, help="stop, to be continued, after so many")
    parser.add_argument("--save_every", type=int, default=100)
    parser.add_argument("--export_every", type=int, default=1200)
    parser.add_argument("--check_per_tag", type=int, default=20)
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    stages[args.stage](args)


if __name__ == "__main__":
    main()
