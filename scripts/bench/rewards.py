"""Benchmark rewards against direct calls of their networks, in images per second.

    python scripts/bench/rewards.py --only clip
    python scripts/bench/rewards.py --images 32 --side 1024 --layers 24 --width 1024

The networks are random, in the published layouts, as wide and deep as asked. A direct call gets pixels and tokens that
are ready; a reward starts from images and prompts. Both alternate, and medians are compared, so that a busy machine
slows both. Writes ``assets/results/bench_rewards.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from torch import Tensor
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, CLIPVisionConfig

sys.path.insert(0, str(Path(__file__).parents[2]))  # a clone needs no installation

from diffalign.cli import use_all_cores
from diffalign.rewards import get_reward
from diffalign.rewards.aesthetic import Head
from diffalign.rewards.base import Reward
from diffalign.rewards.support.preprocess import Preprocess, stretch
from diffalign.rewards.vqascore import AFTER, BEFORE, QUESTION, ClipT5, ClipT5Config, yes_eos
from scripts import ROOT
from scripts.bench import judges
from scripts.build.judges import save_vqascore, vqa_tokenizer

TOKENIZER = ROOT / "assets/shapes-sd3/tokenizer"
PROMPTS = ["a red circle", "two squares", "a triangle left of a square", "a blue circle and a red square"]


@dataclass(frozen=True)
class Case:
    """A reward, and a direct call of its network on prepared inputs."""

    reward: Reward
    direct: Callable[[], Tensor]


def clip_cases(args: argparse.Namespace, folder: Path, images: Tensor, prompts: list[str]) -> dict[str, Case]:
    """Build PickScore and the aesthetic predictor on one CLIP."""
    heads = max(1, args.width // 64)
    size = {"hidden_size": args.width, "intermediate_size": 4 * args.width, "num_attention_heads": heads}
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    vision = {**size, "num_hidden_layers": args.layers, "patch_size": args.patch}
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = {**size, **special, "num_hidden_layers": args.layers, "vocab_size": len(tokenizer)}
    config = CLIPConfig(vision_config=vision, text_config=text, projection_dim=args.width)
    CLIPModel(config).save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    torch.save(Head(args.width).state_dict(), folder / "head.pth")
    model = CLIPModel.from_pretrained(folder / "clip").eval().to(images.device)
    head = Head(args.width).eval().to(images.device)
    pixels = Preprocess()(images, quantize=True)
    tokens = tokenizer(prompts, padding=True, return_tensors="pt").to(images.device)
    path = str(folder / "clip")

    def pickscore() -> Tensor:
        output = model(pixel_values=pixels, **tokens)
        return output.logits_per_image.diagonal()

    return {
        "pickscore": Case(get_reward("pickscore", path=path, tokenizer=path), pickscore),
        "aesthetic": Case(
            get_reward("aesthetic", path=str(folder / "head.pth"), clip=path),
            lambda: head(model.get_image_features(pixel_values=pixels).pooler_output),
        ),
    }


def hps_case(args: argparse.Namespace, folder: Path, images: Tensor, prompts: list[str]) -> dict[str, Case]:
    """Build HPS on open_clip."""
    place = folder / "hps"
    place.mkdir()
    size = {"layers": args.layers, "width": args.width}
    config = {
        "embed_dim": args.width,
        "vision_cfg": {**size, "image_size": 224, "patch_size": args.patch, "head_width": 64},
        "text_cfg": {**size, "context_length": 77, "vocab_size": 49408, "heads": max(1, args.width // 64)},
    }
    (place / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    model = open_clip.create_model(f"local-dir:{place}", load_weights=False).eval()
    torch.save({"state_dict": model.state_dict()}, place / "HPS_v2.1_compressed.pt")
    model = model.to(images.device)
    pixels = Preprocess(through_pil=False)(images, quantize=True)
    tokens = open_clip.tokenize(prompts).to(images.device)

    def direct() -> Tensor:
        image, text = model.encode_image(pixels, normalize=True), model.encode_text(tokens, normalize=True)
        return (image * text).sum(-1)

    return {"hpsv2.1": Case(get_reward("hpsv2.1", path=str(place)), direct)}


def vqa_case(args: argparse.Namespace, folder: Path, images: Tensor, prompts: list[str]) -> dict[str, Case]:
    """Build VQAScore: CLIP's patches in front of a T5."""
    place, heads = str(folder / "vqascore"), max(1, args.width // 64)
    tokenizer = vqa_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=args.width,
        intermediate_size=4 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        patch_size=args.patch,
    )
    config = ClipT5Config(
        vocab_size=len(tokenizer),
        d_model=args.width,
        d_ff=4 * args.width,
        num_layers=args.layers // 2,
        num_decoder_layers=args.layers // 2,
        num_heads=heads,
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    )
    config.mm_vision_select_layer, config.mm_vision_tower = -2, "vision_tower"
    model = ClipT5(config, vision).eval()
    save_vqascore(model, tokenizer, Path(place))
    model = model.to(images.device)
    pixels = Preprocess(fit=stretch)(images, quantize=True)

    def ids(text: str) -> Tensor:
        return torch.tensor(tokenizer(text).input_ids, device=images.device)

    before, yes = ids(BEFORE), ids("Yes")
    questions = [ids(AFTER.format(QUESTION.format(prompt))) for prompt in prompts]

    def direct() -> Tensor:
        return yes_eos(model.answer(model.patches(pixels), before, questions, yes), yes, yes)

    return {"vqascore": Case(get_reward("vqascore", path=place, tokenizer=place, precision="no"), direct)}


def judge_cases(args: argparse.Namespace, folder: Path, images: Tensor, prompts: list[str]) -> dict[str, Case]:
    """Build the rewards of ``scripts/bench/judges.py``."""
    return {name: Case(*made) for make in judges.MAKERS for name, made in make(args, folder, images, prompts).items()}


def measure(case: Case, images: Tensor, prompts: list[str], repeats: int) -> dict[str, float]:
    """Return medians of alternating calls. The first call of each warms up, and loads the reward."""

    def seconds(call: Callable[[], object]) -> float:
        started = now(images.device)
        call()
        return now(images.device) - started

    def reward() -> object:
        return case.reward(images, prompts, [judges.DATA] * len(prompts))

    with torch.no_grad():
        reward(), case.direct()
        own, bare = zip(*[(seconds(reward), seconds(case.direct)) for _ in range(repeats)], strict=True)
    ratios = [a / b for a, b in zip(own, bare, strict=True)]
    return {
        "images_per_second": len(images) / statistics.median(own),
        "direct_images_per_second": len(images) / statistics.median(bare),
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
    }


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()  # of one thread, whatever else the machine does
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--patch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--only", choices=["clip", "judges"], help="measure one of the two halves")
    parser.add_argument("--write", type=Path, default=ROOT / "assets/results/bench_rewards.json")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    else:
        use_all_cores()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = torch.rand(args.images, 3, args.side, args.side, device=device)
    prompts = [f"{PROMPTS[i % len(PROMPTS)]} {i}" for i in range(args.images)]  # distinct: none is read only once
    with tempfile.TemporaryDirectory() as folder:
        cases = {}
        halves = {"clip": (clip_cases, hps_case, vqa_case), "judges": (judge_cases,)}
        for make in halves.get(args.only, (*halves["clip"], *halves["judges"])):
            cases |= make(args, Path(folder), images, prompts)
        found = {name: measure(case, images, prompts, args.repeats) for name, case in cases.items()}
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    shape = {key: getattr(args, key) for key in ("images", "side", "layers", "width", "patch", "repeats")}
    result = {"device": name, **shape, "rewards": found}
    args.write.parent.mkdir(parents=True, exist_ok=True)
    args.write.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
