"""Compare the scores of published weights with those of their authors' code; needs the weights.

    python scripts/studies/check_rewards.py pickscore clipscore hpsv2.1 aesthetic
    python scripts/studies/check_rewards.py image_reward vqascore --images my/pictures --prompt "a cat"
    python scripts/studies/check_rewards.py pickscore --options '{"path": "my/weights", "tokenizer": "my/weights"}'

PickScore, CLIPScore, HPS and the aesthetic predictor are computed a second time with plain transformers and open_clip,
picture by picture through PIL. ImageReward, HPSv3 and VQAScore are compared with their authors' packages where these
are installed (image-reward, hpsv3, t2v-metrics 3.0, each in an environment of its own: ``--save`` there and here, then
compare the files). Exit 1 where scores differ by more than a thousandth of the reward's scale.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms import v2
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

sys.path.insert(0, str(Path(__file__).parents[2]))  # a clone needs no installation

from diffalign import score_images
from diffalign.rewards import get_reward
from diffalign.rewards.aesthetic import AestheticReward
from diffalign.rewards.base import REWARDS, Reward
from diffalign.rewards.clip import ClipReward
from diffalign.rewards.hps import HpsReward
from diffalign.rewards.support.preprocess import CLIP_MEAN, CLIP_STD
from diffalign.rewards.support.weights import state_dict
from scripts import ROOT

Scores = list[float]


def processor(model: CLIPModel) -> CLIPImageProcessorPil:
    side = model.config.vision_config.image_size
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def torchvision_recipe(side: int, *, resize_pil: bool) -> v2.Compose:
    """torchvision's resize and crop, of a PIL image or of a float tensor."""
    steps = [v2.Resize(side, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(side)]
    as_tensor = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    order = [*steps, *as_tensor] if resize_pil else [*as_tensor, *steps]
    return v2.Compose([*order, v2.Normalize(CLIP_MEAN, CLIP_STD)])


def by_transformers(reward: ClipReward, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Scores:
    """PickScore and CLIPScore as their model cards have it, or as the paper of CLIPScore."""
    model = CLIPModel.from_pretrained(reward.weights.path, revision=reward.weights.revision).eval()
    tokenizer, prepare = AutoTokenizer.from_pretrained(reward.tokenizer or reward.weights.path), processor(model)
    length = min(77, model.config.text_config.max_position_embeddings)
    scores = []
    for picture, prompt in zip(pictures, prompts, strict=True):
        pixels = prepare(picture, return_tensors="pt")["pixel_values"]
        if reward.form == "clipscore":
            prompt = f"A photo depicts {prompt}"
            pixels = torchvision_recipe(model.config.vision_config.image_size, resize_pil=True)(picture)[None]
        tokens = tokenizer(prompt, truncation=True, max_length=length, return_tensors="pt")
        output = model(**tokens, pixel_values=pixels)
        logit = output.logits_per_image.item()
        cosine = logit / model.logit_scale.exp().item()
        scores.append({"logit": logit, "cosine": cosine, "clipscore": 2.5 * max(cosine, 0)}[reward.form])
    return scores


def by_open_clip(reward: HpsReward, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Scores:
    """HPSv2 as its package has it: to a tensor first, then resized."""
    local = (Path(reward.weights.path) / "open_clip_config.json").is_file()
    name = f"local-dir:{reward.weights.path}" if local else reward.architecture
    model = open_clip.create_model(name, load_weights=False).eval()
    model.load_state_dict({key: tensor.float() for key, tensor in state_dict(reward.weights, reward.file).items()})
    side, words = model.visual.image_size[0], open_clip.get_tokenizer(name)
    prepare = torchvision_recipe(side, resize_pil=False)
    scores = []
    for picture, prompt in zip(pictures, prompts, strict=True):
        image = model.encode_image(prepare(picture)[None], normalize=True)
        scores.append((image @ model.encode_text(words([prompt]), normalize=True).T).item())
    return scores


def by_predictor(reward: AestheticReward, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Scores:
    """The aesthetic predictor, layer by layer."""
    model = CLIPModel.from_pretrained(reward.clip).eval()
    prepare = torchvision_recipe(model.config.vision_config.image_size, resize_pil=True)
    weights = state_dict(reward.weights, reward.file)
    scores = []
    for picture in pictures:
        hidden = F.normalize(model.get_image_features(prepare(picture)[None]).pooler_output, dim=-1)
        for layer in (0, 2, 4, 6, 7):
            weight, bias = (weights[f"layers.{layer}.{part}"].float() for part in ("weight", "bias"))
            hidden = F.linear(hidden, weight, bias)
        scores.append(hidden.item())
    return scores


def by_image_reward(reward: Reward, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Scores:
    """The package image-reward."""
    import ImageReward

    model = ImageReward.load("ImageReward-v1.0", device="cpu")
    return [model.score(prompt, picture) for picture, prompt in zip(pictures, prompts, strict=True)]


def by_hpsv3(reward: Reward, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Scores:
    """The package hpsv3; needs a GPU."""
    from hpsv3 import HPSv3RewardInferencer

    return HPSv3RewardInferencer(device="cuda").reward(list(pictures), list(prompts))[:, 0].tolist()


def by_t2v_metrics(reward: Reward, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Scores:
    """The package t2v-metrics 3.0, which reads files."""
    import tempfile

    import t2v_metrics

    model = t2v_metrics.VQAScore(model="clip-flant5-xl" if reward.name == "vqascore_xl" else "clip-flant5-xxl")
    scores = []
    with tempfile.TemporaryDirectory() as folder:
        for picture, prompt in zip(pictures, prompts, strict=True):
            picture.save(f"{folder}/picture.png")
            scores.append(model(images=[f"{folder}/picture.png"], texts=[prompt]).item())
    return scores


ORACLES: dict[str, Callable[[Any, Sequence[Image.Image], Sequence[str]], Scores]] = {
    "pickscore": by_transformers,
    "clipscore": by_transformers,
    "hpsv2": by_open_clip,
    "hpsv2.1": by_open_clip,
    "aesthetic": by_predictor,
    "image_reward": by_image_reward,
    "hpsv3": by_hpsv3,
    "vqascore": by_t2v_metrics,
    "vqascore_xl": by_t2v_metrics,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rewards", nargs="+", choices=ORACLES)
    parser.add_argument("--images", type=Path, default=ROOT / "assets/pictures", help="a folder of pictures")
    parser.add_argument("--prompt", default="a red circle left of a blue square")
    parser.add_argument("--options", type=json.loads, default={}, help="JSON, passed to every reward")
    parser.add_argument("--save", type=Path, help="where the scores go, as JSON")
    args = parser.parse_args()
    pictures = [Image.open(path).convert("RGB") for path in sorted(args.images.glob("*.png"))]
    prompts = [args.prompt] * len(pictures)
    found, differs = {}, False
    for name in args.rewards:
        reward = get_reward(name, **args.options)
        own = score_images(pictures, prompts, reward)[name].tolist()
        found[name] = {"own": own}
        try:
            with torch.no_grad():
                theirs = ORACLES[name](reward, pictures, prompts)
        except ImportError as error:
            print(f"{name}: {own}; not compared, {error}")
            continue
        gap = max(abs(a - b) for a, b in zip(own, theirs, strict=True))
        differs |= gap > 1e-3 * REWARDS[name].facts.scale
        found[name] |= {"published": theirs}
        print(f"{name}: {own}; published recipe {theirs}; they differ by at most {gap:.2g}")
    if args.save:
        args.save.write_text(json.dumps(found, indent=1) + "\n")
    return int(differs)


if __name__ == "__main__":
    sys.exit(main())
