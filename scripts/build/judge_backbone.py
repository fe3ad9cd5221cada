"""Make the embedded CLIP that judges of one's own start from: it has seen pictures and captions, and no preference.

    python scripts/build/judge_backbone.py --minutes 4.5
    python scripts/build/judge_backbone.py --minutes 4.5 --go_on --seed 1 --lr 1.5e-3

Symmetric contrastive learning (arXiv 2103.00020) of the renderer's pictures and their captions; half of a batch are
captions that differ from another one in a word. Writes ``assets/shapes-clip`` in float16.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

sys.path.insert(0, str(Path(__file__).parents[2]))  # a clone needs no installation

from diffalign.cli import use_all_cores
from diffalign.rewards.support.judge_network import preprocess_of
from diffalign.shapes import render, scene_for
from diffalign.shapes.captions import TAGS, Spec, neighbours
from scripts import ROOT
from scripts.build.judges_data import EVERY, PIPELINE, PLACE, TRAINABLE, wording

SIZES = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 2}


def make_model(seed: int) -> tuple[CLIPModel, AutoTokenizer]:
    """Return a small CLIP and the pipeline's tokenizer."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(PIPELINE / "tokenizer")
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = {**SIZES, **special, "num_hidden_layers": 2, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    vision = {**SIZES, "num_hidden_layers": 3, "image_size": 64, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64)), tokenizer


def draw(rng: random.Random, batch: int) -> tuple[Tensor, list[str], Tensor]:
    """Draw (pictures (B, 3, 64, 64), captions, specifications (B,)): specifications, and neighbours of each."""
    places: list[int] = []
    of_tag = {tag: [i for i in TRAINABLE if EVERY[i]["tag"] == tag] for tag in TAGS}
    known = set(TRAINABLE)
    while len(places) < batch:
        place = rng.choice(of_tag[rng.choice(TAGS)])
        near = [i for spec in neighbours(EVERY[place]) if (i := PLACE[json.dumps(spec)]) in known]
        places += [place, rng.choice(near)] if near else [place]
    places = places[:batch]
    specs: list[Spec] = [EVERY[place] for place in places]
    pictures = render([scene_for(spec, rng) for spec in specs])
    return pictures, [wording(place, rng) for place in places], torch.tensor(places)


def contrast(logits: Tensor, same: Tensor) -> Tensor:
    """Return the mean of -log of the share of matching captions per picture, and of pictures per caption."""
    parts = [table.masked_fill(~same, -torch.inf).logsumexp(1) - table.logsumexp(1) for table in (logits, logits.T)]
    return -torch.stack(parts).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "assets/shapes-clip")
    parser.add_argument("--minutes", type=float, default=5, help="the learning rate falls to 0 by then")
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--go_on", action="store_true", help="from the weights that are there")
    args = parser.parse_args()
    use_all_cores()

    model, tokenizer = make_model(args.seed)
    if args.go_on:
        model = CLIPModel.from_pretrained(args.output_dir).float()
    rng, step_of = random.Random(args.seed), preprocess_of(model.config)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.01, betas=(0.9, 0.98))
    start, steps = time.perf_counter(), 0
    with tqdm() as bar:
        while (spent := (time.perf_counter() - start) / 60 / args.minutes) < 1:
            optimizer.param_groups[0]["lr"] = args.lr * min(1, (steps + 1) / 50) * (1 - spent)
            pictures, captions, places = draw(rng, args.batch)
            tokens = tokenizer(captions, padding=True, truncation=True, max_length=16, return_tensors="pt")
            image = F.normalize(model.get_image_features(step_of(pictures, quantize=False)).pooler_output, dim=-1)
            text = F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)
            logits = model.logit_scale.clamp(max=4).exp() * image @ text.T
            loss = contrast(logits, places[:, None] == places[None])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            steps += 1
            right = (logits.argmax(1)[:, None] == torch.arange(len(places))).float() @ (
                (places[:, None] == places[None]).float()
            )
            found = right.gather(1, torch.arange(len(places))[:, None]).mean().item()
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}", found=f"{found:.2f}")
    model.half().save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    print(f"{steps} steps: {args.output_dir}")


if __name__ == "__main__":
    main()
