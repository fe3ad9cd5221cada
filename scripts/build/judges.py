"""Train the small reward models of the embedded world, and export them in the published layouts.

    python scripts/build/judges.py data         # images of the pipeline and of the renderer, with the verifier's word
    python scripts/build/judges.py pickscore    # transformers' CLIPModel
    python scripts/build/judges.py hps          # open_clip's CLIP, configuration and .pt
    python scripts/build/judges.py aesthetic    # a head on PickScore's image embedding
    python scripts/build/judges.py vqascore --steps 6000 --lr 3e-4     # CLIP-FlanT5
    python scripts/build/judges.py vqascore --steps 2600 --lr 2e-4 --go_on    # on harder questions
    python scripts/build/judges.py check        # agreement with the verifier on held-out pairs and questions

PickScore and HPS learn from preferences: which of two images shows a caption, and which of two captions an image shows.
VQAScore learns to answer, and starts with PickScore's eyes, as the paper's model does with CLIP's. ``check`` asks about
images that no judge has seen, and captions of the held-out side, which PickScore and HPS have not read: VQAScore, which
does not recombine words as they do, learns from captions of both sides. Writes ``assets/results/judges.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, T5TokenizerFast

sys.path.insert(0, str(Path(__file__).parents[2]))  # a clone needs no installation

from diffalign.cli import use_all_cores
from diffalign.rewards import get_reward
from diffalign.rewards.aesthetic import Head
from diffalign.rewards.base import Reward
from diffalign.rewards.clip import image_features
from diffalign.rewards.support.preprocess import CLIP_MEAN, CLIP_STD
from diffalign.rewards.vqascore import AFTER, BEFORE, QUESTION, ClipT5, ClipT5Config, build
from diffalign.shapes import TAGS
from diffalign.shapes.captions import vocabulary
from diffalign.shapes.verifier import find_objects, nearest_colors
from scripts import ROOT
from scripts.build.judges_data import EVERY, PIPELINE, Data, Sampler, make_data, wording


def normalised(pixels: Tensor) -> Tensor:
    """Normalise 64 x 64 pixels for a reward network; they need no resizing."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (pixels.float() / 255 - mean) / std


# Beside its questions of yes and no, VQAScore learns to answer this one.
TELL = "What does this figure show?"
Encoder = Callable[[Tensor], Tensor]


def rate(step: int, total: int, warmup: int = 100) -> float:
    """Learning rate: warm-up, then a cosine to 0."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / total))


def train_clip(
    args: argparse.Namespace, network: nn.Module, see: Encoder, read: Callable[[list[str]], Tensor], scale: nn.Parameter
) -> None:
    """Train on preferences between images and between captions, and on every caption and image of a batch."""
    data = Data.read(args, "train")
    sampler = Sampler(data, random.Random(args.seed))
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, args.steps))
    network.train()
    bar = tqdm(range(args.steps))
    for _ in bar:
        drawn = [sampler.preference() for _ in range(args.batch)]
        place, good, bad, wrong = (list(part) for part in zip(*drawn, strict=True))
        texts = [wording(i, sampler.rng) for i in (*place, *wrong)]
        with torch.autocast("cpu", torch.bfloat16):
            images = F.normalize(see(normalised(data.pixels[good + bad])).float(), dim=-1)
            words = F.normalize(read(texts).float(), dim=-1)
        table = scale.exp() * words @ images.T  # captions, images
        truth = data.truth[good + bad][:, place + wrong].T
        n = args.batch
        own = torch.arange(n)
        between_images = -F.logsigmoid(table[own, own] - table[own, own + n])
        between_captions = -F.logsigmoid(table[own, own] - table[own + n, own])
        loss = between_images.mean() + between_captions.mean() + contrast(table, truth) + contrast(table.T, truth.T)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            scale.clamp_(max=math.log(100))
            right = (table[own, own] > table[own, own + n]).float().mean()
        bar.set_postfix(loss=f"{loss.item():.3f}", pairs=f"{right.item():.2f}")
    network.eval()


def contrast(table: Tensor, truth: Tensor) -> Tensor:
    """Compute a contrastive loss: -log of the probability of the true columns, over rows that have one."""
    some = truth.any(1)
    share = table.masked_fill(~truth, -torch.inf).logsumexp(1) - table.logsumexp(1)
    return -share[some].mean()


def train_pickscore(args: argparse.Namespace) -> None:
    """Train PickScore in transformers' layout: ``config.json``, ``model.safetensors`` in float16, the tokenizer."""
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(PIPELINE / "tokenizer")
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 3}
    text |= {**special, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    vision = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 3}
    vision |= {"image_size": 64, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=96))

    def read(texts: list[str]) -> Tensor:
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=16, return_tensors="pt")
        return model.get_text_features(**tokens).pooler_output

    train_clip(args, model, lambda x: model.get_image_features(pixel_values=x).pooler_output, read, model.logit_scale)
    folder = args.output_dir / "pickscore"
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_hps(args: argparse.Namespace) -> None:
    """open_clip's layout: ``open_clip_config.json`` and the published file, ``{"state_dict": ...}``, in float16."""
    torch.manual_seed(args.seed + 1)
    folder = args.output_dir / "hps"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(PIPELINE / "tokenizer")
    tokenizer.save_pretrained(folder)
    config = {
        "embed_dim": 96,
        "vision_cfg": {"image_size": 64, "layers": 4, "width": 96, "head_width": 32, "patch_size": 8},
        "text_cfg": {
            "context_length": 16,
            "vocab_size": len(tokenizer),
            "width": 96,
            "heads": 3,
            "layers": 3,
            "hf_tokenizer_name": "shapes",  # open_clip then reads the tokenizer of this folder
        },
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}, indent=1))
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    words = open_clip.get_tokenizer(f"local-dir:{folder}")
    train_clip(args, model, model.encode_image, lambda texts: model.encode_text(words(texts)), model.logit_scale)
    torch.save({"state_dict": model.half().state_dict()}, folder / "HPS_v2.1_compressed.pt")


def train_aesthetic(args: argparse.Namespace) -> None:
    """The published head, on PickScore's embedding: how neat the shapes are, from 1 to 10."""
    torch.manual_seed(args.seed + 2)
    data = Data.read(args, "train")
    model = CLIPModel.from_pretrained(args.output_dir / "pickscore").float().eval()
    with torch.no_grad():
        embeddings = [image_features(model, part.float() / 255, quantize=True) for part in data.pixels.split(512)]
    inputs, target = F.normalize(torch.cat(embeddings), dim=-1), neatness(data.pixels)
    head = Head(inputs.shape[1])
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=1e-4)
    for _ in tqdm(range(2000)):
        rows = torch.randint(len(inputs), (512,))
        loss = (head(inputs[rows]) - target[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = args.output_dir / "aesthetic"
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(head.half().state_dict(), folder / "aesthetic-model.pth")


def neatness(pixels: Tensor) -> Tensor:
    """Score how close the worst object is to a shape, up to 10; 1 for an image without objects."""
    values = []
    for part in pixels.split(512):
        for plane in nearest_colors(part.float() / 255):
            found = find_objects(plane)
            values.append(1 + 9 * min((thing.overlap for thing in found), default=0.0))
    return torch.tensor(values)


def vqa_tokenizer() -> T5TokenizerFast:
    """Build a Unigram vocabulary of the words of questions and captions, and single characters."""
    words = {*BEFORE.split(), *AFTER.format(QUESTION).split(), *TELL.split(), "Yes", "No"}
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0), ('▁"', -3.0)]
    pieces += [(f"▁{word}", -3.0) for word in sorted({*words, *vocabulary()})]
    pieces += [(word, -3.0) for word in vocabulary() if len(word) > 1]  # behind the quotation mark
    pieces += [(chr(i), -10.0) for i in range(33, 127)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)


def train_vqascore(args: argparse.Namespace) -> None:
    """CLIP-FlanT5's layout: CLIP's weights inside T5's, its configuration beside them, the tokenizer."""
    torch.manual_seed(args.seed + 3)
    data, rng = Data.read(args, "train"), random.Random(args.seed + 3 + args.go_on)
    tokenizer = vqa_tokenizer()
    eyes = CLIPModel.from_pretrained(args.output_dir / "pickscore").float().vision_model
    config = ClipT5Config(
        vocab_size=len(tokenizer),
        d_model=96,
        d_kv=32,
        d_ff=256,
        num_layers=3,
        num_decoder_layers=2,
        num_heads=3,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    )
    config.mm_vision_select_layer, config.mm_vision_tower = -2, "vision_tower"
    model = ClipT5(config, eyes.config)
    model.vision_tower.load_state_dict(eyes.state_dict())
    if args.go_on:
        model = build(str(args.output_dir / "vqascore"), model.config, eyes.config).float()
    else:
        nn.init.normal_(model.lm_head.weight, std=config.d_model**-0.5)  # T5's own would begin with a loss of 40
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, args.steps))

    def ids(text: str) -> Tensor:
        return torch.tensor(tokenizer(text).input_ids)

    before, answers, sampler = ids(BEFORE), [ids("No"), ids("Yes")], Sampler(data, rng, range(len(EVERY)))
    sampler.hardness = 0.85 if args.go_on else 0.5
    bar = tqdm(range(args.steps))
    for step in bar:
        if not args.go_on:
            sampler.ease = max(0.0, 1 - 3 * step / args.steps)
        rows, places, truth = [], [], []
        for _ in range(args.batch // 4):
            place, good, bad, wrong = sampler.preference()
            rows += [good, bad]
            places += [place, place, wrong, wrong]
            truth += [True, False, False, bool(data.truth[bad, wrong])]
        questions = [ids(AFTER.format(QUESTION.format(wording(place, rng, every=True)))) for place in places]
        captions = pad_sequence([ids(wording(place, rng, every=True)) for place in places[::4]], True, -100)
        with torch.autocast("cpu", torch.bfloat16):
            patches = model.patches(normalised(data.pixels[rows]))
            several = patches.unflatten(0, (-1, 2)).repeat(1, 2, 1, 1).flatten(0, 1)  # each for two questions
            log_probs = model.answer(several, before, questions, answers[1]).float()
            tell = [ids(AFTER.format(TELL))] * len(captions)
            predicted = model.answer(patches[::2], before, tell, captions.clamp(min=0))
        labels = torch.stack([answers[t] for t in truth])
        # What an image shows, said in words, teaches more than whether it shows something.
        telling = F.nll_loss(predicted.float().flatten(0, 1), captions.flatten(), ignore_index=-100)
        loss = -log_probs.gather(-1, labels[..., None]).mean() + telling
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        right = ((log_probs[:, 0, answers[1][0]] > log_probs[:, 0, answers[0][0]]) == torch.tensor(truth)).float()
        bar.set_postfix(telling=f"{telling.item():.3f}", loss=f"{loss.item():.3f}", right=f"{right.mean().item():.2f}")
    save_vqascore(model, tokenizer, args.output_dir / "vqascore")


def save_vqascore(model: ClipT5, tokenizer: T5TokenizerFast, folder: Path) -> None:
    """Save with the published names, in float16."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    vision = model.vision_tower.config
    vision.save_pretrained(folder / "vision_tower")
    tensors = {
        name.replace("vision_tower.", "vision_tower.vision_tower.vision_model."): tensor.half().contiguous()
        for name, tensor in model.state_dict().items()
        if not name.endswith("embed_tokens.weight")
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    extra = {"mm_projector_type": "mlp2x_gelu", "mm_hidden_size": vision.hidden_size, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps({**model.config.to_dict(), **extra}, indent=1) + "\n")


def check(args: argparse.Namespace) -> None:
    """Evaluate on held-out captions: preference between two images of a caption, and yes or no per image."""
    data = Data.read(args, "held_out")
    right = data.truth[torch.arange(len(data.asked)), data.asked]
    pairs = [
        (a, b)
        for place in data.asked.unique().tolist()
        for a in ((data.asked == place) & right).nonzero()[:, 0].tolist()
        for b in ((data.asked == place) & ~right).nonzero()[:8, 0].tolist()
    ]
    first, second = (list(part) for part in zip(*pairs, strict=True))
    of_tag = [EVERY[data.asked[a]]["tag"] for a in first]
    result: dict[str, object] = {"images": len(right), "pairs": len(pairs), "shown": right.float().mean().item()}
    folder = args.output_dir
    judges = {
        "pickscore": {"path": str(folder / "pickscore"), "tokenizer": str(folder / "pickscore")},
        "hpsv2.1": {"path": str(folder / "hps")},
        "vqascore": {
            "path": str(folder / "vqascore"),
            "tokenizer": str(folder / "vqascore"),
            "answer": "yes_no",
            "precision": "no",
        },
        "aesthetic": {"path": str(folder / "aesthetic/aesthetic-model.pth"), "clip": str(folder / "pickscore")},
    }
    for name, options in judges.items():
        reward = get_reward(name, **options)
        captions = [data.texts[a] for a in first]
        won = scored(reward, data.pixels[first], captions) > scored(reward, data.pixels[second], captions)
        found = {"pairs": won.float().mean().item()}
        for tag in TAGS:
            found[f"pairs/{tag}"] = won[[own == tag for own in of_tag]].float().mean().item()
        if name == "vqascore":
            found["answers"] = ((scored(reward, data.pixels, data.texts) > 0.5) == right).float().mean().item()
        if name == "aesthetic":
            table = torch.stack([scored(reward, data.pixels, data.texts), neatness(data.pixels)])
            found["correlation with neatness"] = torch.corrcoef(table)[0, 1].item()
        result[name] = found | rounding(reward, data)
    result["bytes"] = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    path = ROOT / "assets/results/judges.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


@torch.no_grad()
def rounding(reward: Reward, data: Data, images: int = 500, side: int = 150) -> dict[str, float]:
    """What rounding to 8 bits changes of the scores of smooth pictures of ``side`` pixels, in their deviations."""
    pixels = data.pixels[:images].float() / 255
    large = F.interpolate(pixels, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
    rounded, smooth = (
        replace(reward, quantize=quantize)(large, data.texts[:images], [{}] * images) for quantize in (True, False)
    )
    gap = (rounded - smooth).abs() / smooth.std()
    return {"rounding, mean": gap.mean().item(), "rounding, largest": gap.max().item()}


@torch.no_grad()
def scored(reward: Reward, pixels: Tensor, texts: list[str]) -> Tensor:
    """Score 8-bit images, each with its caption."""
    parts = [slice(i, i + 256) for i in range(0, len(texts), 256)]
    return torch.cat([reward(pixels[p].float() / 255, texts[p], [{}] * len(texts[p])) for p in parts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = {
        "data": make_data,
        "pickscore": train_pickscore,
        "hps": train_hps,
        "aesthetic": train_aesthetic,
        "vqascore": train_vqascore,
        "check": check,
    }
    parser.add_argument("stage", choices=stages)
    parser.add_argument("--work_dir", type=Path, default=Path("runs/judges-build"))
    parser.add_argument("--output_dir", type=Path, default=ROOT / "assets/judges")
    parser.add_argument("--images", type=int, default=24_000)
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--go_on", action="store_true", help="vqascore: from the weights that are there")
    args = parser.parse_args()
    use_all_cores()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    stages[args.stage](args)


if __name__ == "__main__":
    main()
