"""Networks of newer judges for the benchmark of rewards: DeQA-Score, MPS, aesthetic v2.5, Qwen-VL and DiNa-LRM.

Each is random, in its published layout; a direct call gets pixels, tokens and noise that are ready.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPConfig,
    CLIPModel,
    Qwen2VLImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from diffalign.rewards import get_reward
from diffalign.rewards.aesthetic_v25 import HALF
from diffalign.rewards.aesthetic_v25 import Head as HeadV25
from diffalign.rewards.base import Reward
from diffalign.rewards.deqa import LEVELS
from diffalign.rewards.dina_lrm import Network as DiNaNetwork
from diffalign.rewards.dina_lrm import _load as load_dina
from diffalign.rewards.dina_lrm import _load_text as load_text
from diffalign.rewards.evalmuse import _load as load_evalmuse
from diffalign.rewards.mps import FILE as MPS_FILE
from diffalign.rewards.mps import Network as MpsNetwork
from diffalign.rewards.prompt_echo import QUESTION
from diffalign.rewards.support.mplug_owl2 import MplugOwl2, OwlConfig
from diffalign.rewards.support.preprocess import Preprocess, stretch
from diffalign.rewards.support.qwen_vl import Patches, chat, load_with_own_limits
from diffalign.rewards.support.weights import Weights, load_once
from tests.rewards import tiny_checkpoints, tiny_judges

Made = tuple[Reward, Callable[[], Tensor]]
DATA = MappingProxyType({"vqa_list": [["How many circles are in the image?", "one"], ["Is the circle red?", "Yes"]]})


def owl(args: argparse.Namespace, folder: Path, images: Tensor, prompts: list[str]) -> dict[str, Made]:
    """Build DeQA-Score."""
    place = tiny_judges.deqa(folder / "deqa")
    width, heads = args.width, max(1, args.width // 64)
    both = {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": 4 * width}
    eyes = {**both, "num_hidden_layers": args.layers, "image_size": 448, "patch_size": args.patch}
    queries = {**both, "encoder_hidden_size": width, "num_hidden_layers": 2, "grid_size": 448 // args.patch}
    config = {**tiny_judges.DEQA, **both, "num_hidden_layers": args.layers, "num_key_value_heads": heads}
    config["visual_config"] = {"visual_model": eyes, "visual_abstractor": queries}
    model = MplugOwl2(OwlConfig(**config)).eval()
    model.save_pretrained(place)
    (place / "config.json").write_text(json.dumps(config))
    pixels, ids = Preprocess(goal=448, fit=stretch)(images, quantize=True), torch.arange(12) % len(LEVELS)
    reward = get_reward("deqa", path=str(place), precision="no")
    return {"deqa": (reward, lambda: model(pixels, ids, ids))}


def clip_layers(args: argparse.Namespace, folder: Path, images: Tensor, prompts: list[str]) -> dict[str, Made]:
    """Build MPS."""
    place = tiny_checkpoints.clip(folder / "mps")
    size = {"hidden_size": args.width, "intermediate_size": 4 * args.width, "num_hidden_layers": args.layers}
    size["num_attention_heads"] = max(1, args.width // 64)
    text = CLIPModel.from_pretrained(place).config.text_config.to_dict()
    config = CLIPConfig(
        vision_config={**size, "patch_size": args.patch},
        text_config={**text, **size, "max_position_embeddings": 77},
        projection_dim=args.width,
    )
    network = MpsNetwork(config).eval()
    config.save_pretrained(place)
    torch.save(network.state_dict(), place / MPS_FILE)
    reward = get_reward("mps", path=str(place), clip=str(place))
    pixels, ids = Preprocess()(images, quantize=True), torch.randint(0, 100, (len(images) + 1, 77))

    def direct() -> Tensor:
        words, end = network.words(ids)
        return network(pixels, words[:-1], end[:-1], torch.ones(len(images), 77, dtype=torch.bool))

    return {"mps": (reward, direct)}


def siglip(args: argparse.Namespace, folder: Path, images: Tensor, prompts: list[str]) -> dict[str, Made]:
    """Build the aesthetic predictor v2.5."""
    size = {"hidden_size": args.width, "intermediate_size": 4 * args.width, "num_hidden_layers": args.layers}
    heads = max(1, args.width // 64)
    config = SiglipVisionConfig(**size, num_attention_heads=heads, image_size=384, patch_size=args.patch)
    model, head = SiglipVisionModel(config).eval(), HeadV25(args.width).eval()
    model.save_pretrained(folder / "siglip")
    torch.save(head.state_dict(), folder / "v2.5.pth")
    pixels = Preprocess(goal=384, fit=stretch, mean=HALF, std=HALF)(images, quantize=True)
    reward = get_reward("aesthetic_v2.5", path=str(folder / "v2.5.pth"), encoder=str(folder / "siglip"))
    return {"aesthetic_v2.5": (reward, lambda: head(F.normalize(model(pixel_values=pixels).pooler_output, dim=-1)))}


def qwen(args: argparse.Namespace, folder: Path, images: Tensor, prompts: list[str]) -> dict[str, Made]:
    """Build Soft-TIFA, PromptEcho and Q-Eval-Score on one Qwen3-VL."""
    place = folder / "qwen"
    tokenizer, width, heads = tiny_checkpoints.qwen_tokenizer(), args.width, max(1, args.width // 64)
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{mark}|>")
        for name, mark in (("image", "image_pad"), ("vision_start", "vision_start"), ("vision_end", "vision_end"))
    }
    sizes = {"hidden_size": width, "intermediate_size": 4 * width}
    text = {**tiny_checkpoints.TEXT, **sizes, "num_hidden_layers": args.layers, "num_attention_heads": heads}
    text |= {"num_key_value_heads": heads, "head_dim": 64, "vocab_size": len(tokenizer)}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [12, 10, 10]}
    vision = {**sizes, "depth": args.layers, "num_heads": heads, "out_hidden_size": width, "patch_size": 16}
    vision |= {"num_position_embeddings": 1024, "deepstack_visual_indexes": [0], "spatial_merge_size": 2}
    config = AutoConfig.for_model("qwen3_vl", text_config=text, vision_config=vision, **ids)
    AutoModelForImageTextToText.from_config(config).save_pretrained(place)
    tokenizer.save_pretrained(place)
    size = {"shortest_edge": 56 * 56, "longest_edge": 256 * 256}
    Qwen2VLImageProcessor(patch_size=16, size=size).save_pretrained(place)

    loaded = load_once(load_with_own_limits, Weights(str(place)))
    made: dict[str, Made] = {}
    asked = [f"{question} Answer in one word." for question, _ in DATA["vqa_list"]]
    answers = [tokenizer(prompt).input_ids for prompt in prompts]
    for name, texts, rows, said in (
        ("soft_tifa", asked * len(images), [i for i in range(len(images)) for _ in asked], None),
        ("prompt_echo", [QUESTION] * len(images), list(range(len(images))), answers),
    ):
        reward = get_reward(name, path=str(place), precision="no")
        made[name] = (reward, _direct(loaded, images, texts, rows, said))
    return made


def _direct(loaded: Any, images: Tensor, texts: list[str], rows: list[int], answers: Any) -> Callable[[], Tensor]:
    model, tokenizer, patches = loaded
    assert isinstance(patches, Patches)
    pixels, grid = patches(images, quantize=True)
    count = len(pixels) // len(images) // patches.merge**2
    pixels = pixels.view(len(images), -1, pixels.shape[-1])[rows].flatten(0, 1)
    ids, mask = chat(tokenizer, texts, count, "left", images.device, answers)
    kinds = (ids == model.config.image_token_id).int()
    keep = 1 + max(map(len, answers or [()]))

    def direct() -> Tensor:
        given = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "image_grid_thw": grid[rows]}
        return model(**given, mm_token_type_ids=kinds, logits_to_keep=keep, use_cache=False).logits

    return direct


def diffusion(args: argparse.Namespace, folder: Path, images: Tensor, prompts: list[str]) -> dict[str, Made]:
    """Build DiNa-LRM on latents; prompts are encoded before, as they repeat within a group."""
    place = tiny_judges.dina(folder / "dina")
    base = folder / "base"
    base.mkdir()
    for part in tiny_checkpoints.PIPELINE.iterdir():
        if part.name != "transformer":
            (base / part.name).symlink_to(part)
    old = SD3Transformer2DModel.load_config(tiny_checkpoints.PIPELINE, subfolder="transformer")
    heads = max(1, args.width // 64)
    changes = {"num_layers": args.layers + 1, "num_attention_heads": heads, "attention_head_dim": 64}
    changes |= {"caption_projection_dim": args.width, "pos_embed_max_size": 64, "sample_size": 32}
    transformer = SD3Transformer2DModel.from_config({**old, **changes})
    transformer.save_pretrained(base / "transformer")
    config = json.loads((place / "config.json").read_text())
    read = [min(2, args.layers), min(4, args.layers)]
    config["model"] |= {"num_transformer_layers": args.layers, "visual_head_idx": read, "text_head_idx": read}
    (place / "config.json").write_text(json.dumps(config))
    tiny_judges.save_dina(place, DiNaNetwork(transformer, config["model"]))
    reward: Any = get_reward("dina_lrm", path=str(place), base=str(base), precision="no")
    network = load_once(load_dina, reward.weights, str(base))[0]  # its LoRA is merged
    latents = torch.randn(len(images), old["in_channels"], 32, 32)
    text = load_once(load_text, reward.weights, str(base), reward.max_sequence_length)
    embeds, pooled = text.encode(prompts, reward.weights, images.device)
    time = torch.full((len(images),), 400.0)

    class OnLatents:
        name = "dina_lrm"

        def __call__(self, unused: Tensor, prompts: list[str], metadata: Any) -> Tensor:
            return reward(latents, prompts, metadata)

    made: Any = OnLatents()
    return {"dina_lrm": (made, lambda: network(latents, time, embeds, pooled))}


def blip2(args: argparse.Namespace, folder: Path, images: Tensor, prompts: list[str]) -> dict[str, Made]:
    """Build EvalMuse's FGA-BLIP2."""
    width, side = 88 * max(1, args.width // 88), 22 * args.patch
    tiny_judges.EVA.update(width=width, inner=4 * width, depth=args.layers, patch=args.patch, side=side)
    words = tiny_checkpoints.image_reward(folder)
    place = tiny_judges.evalmuse(folder)
    reward: Any = get_reward("evalmuse", path=str(place), tokenizer=str(words))
    network, tokenizer = load_once(load_evalmuse, reward.weights, str(words))
    tokens = tokenizer(prompts, padding=True, return_tensors="pt")
    pixels = Preprocess(goal=side, fit=stretch)(images, quantize=True)
    return {"evalmuse": (reward, lambda: network(pixels, tokens.input_ids, tokens.attention_mask))}


MAKERS = (owl, clip_layers, siglip, qwen, diffusion, blip2)
