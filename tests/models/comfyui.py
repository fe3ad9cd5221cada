"""ComfyUI's key maps, transcribed in ``comfyui_key_maps.json``, and how it adds a LoRA to its weights."""

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

FILE = Path(__file__).with_name("comfyui_key_maps.json")


@dataclass(frozen=True)
class Target:
    """What a key of a LoRA file changes: rows ``start`` to ``start + rows`` of ``weight``; all of them if rows is 0."""

    weight: str
    start: int = 0
    rows: int = 0
    swapped: bool = False


@lru_cache
def key_map(family: str) -> dict[str, Target]:
    """Key of a LoRA file, without its last parts -> target."""
    found = {}
    for name, text in json.loads(FILE.read_text())["maps"][family].items():
        weight, *more = text.split(" ")
        start, rows = next(([int(n) for n in one.split("+")] for one in more if "+" in one), (0, 0))
        numbers = re.search(r"\[(\d+)-(\d+)\]", name)
        for i in range(int(numbers[1]), int(numbers[2]) + 1) if numbers else [0]:
            key = name.replace(numbers[0], str(i)) if numbers else name
            found[key] = Target(weight.replace("{}", str(i)), start, rows, "swapped" in more)
    if family == "sd21":
        found |= {key: target for key, target in key_map("sd15").items() if key.startswith("lora_unet_")}
    return found


def deltas(family: str, tensors: dict[str, torch.Tensor], rows: dict[str, int]) -> dict[str, torch.Tensor]:
    """What a file in kohya's or diffusers' format adds to each weight's output for two fixed inputs, in float64.

    KeyError: a key that is in no map.
    """
    found = {}
    for name in (n for n in tensors if n.endswith((".lora_down.weight", ".lora_A.weight"))):
        key = re.sub(r"\.lora_(down|A)\.weight$", "", name)
        up = tensors[name.replace("lora_down", "lora_up").replace("lora_A", "lora_B")].double()
        down = tensors[name].double()
        alpha = float(tensors.get(f"{key}.alpha", len(down)))
        target = key_map(family)[key]
        inputs = torch.randn(down[0].numel(), 2, generator=torch.Generator().manual_seed(0)).double()
        update = up.flatten(1) @ (down.flatten(1) @ inputs) * (alpha / len(down))
        if target.swapped:
            update = torch.cat(update.chunk(2)[::-1])
        whole = found.setdefault(target.weight, torch.zeros(rows[target.weight], 2).double())
        part = whole[target.start : target.start + (target.rows or len(whole))]
        part += update
    return found
