"""Rewards that are networks: parity with literal transcriptions of how they were published, and the contract."""

import contextlib
import importlib
import json
import shutil
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.transforms import v2
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from diffalign.rewards.aesthetic import aesthetic
from diffalign.rewards.base import RECIPE, RewardUnavailable, get_reward
from diffalign.rewards.clip import clip_reward
from diffalign.rewards.hps import hps
from diffalign.rewards.support import weights
from diffalign.rewards.support.preprocess import CLIP_MEAN, CLIP_STD
from diffalign.rewards.vqascore import vqascore
from tests.rewards import tiny_checkpoints

PROMPTS = ["a red circle", "two squares", "a red circle", ""]
# Levels of 8 bits, so that turning them into PIL images loses nothing.
IMAGES = torch.randint(0, 256, (4, 3, 45, 61), generator=torch.Generator().manual_seed(0)).float() / 255


def pictures():
    return [Image.fromarray((i.permute(1, 2, 0) * 255).round().byte().numpy()) for i in IMAGES]


def cosines(image, text):
    image, text = (x.double().numpy() for x in (image, text))
    return (image * text).sum(1) / np.linalg.norm(image, axis=1) / np.linalg.norm(text, axis=1)


@torch.no_grad()
def published_clip(folder, prompts=PROMPTS, by_torchvision=False):
    """(image embeddings, text embeddings, exp(logit_scale)), one image at a time, through PIL."""
    model, tokenizer = CLIPModel.from_pretrained(folder).double().eval(), AutoTokenizer.from_pretrained(folder)
    size = {"shortest_edge": 32}
    processor = CLIPImageProcessorPil(size=size, crop_size={"height": 32, "width": 32})
    if by_torchvision:
        steps = [v2.Resize(32, v2.InterpolationMode.BICUBIC), v2.CenterCrop(32), v2.PILToTensor()]
        recipe = v2.Compose([*steps, v2.ToDtype(torch.float64, scale=True), v2.Normalize(CLIP_MEAN, CLIP_STD)])
        pixels = [recipe(p)[None] for p in pictures()]
    else:
        pixels = [processor(p, return_tensors="pt")["pixel_values"].double() for p in pictures()]
    image = torch.cat([model.get_image_features(p).pooler_output for p in pixels])
    tokens = [tokenizer(p, truncation=True, max_length=16, return_tensors="pt") for p in prompts]
    text = torch.cat([model.get_text_features(**t).pooler_output for t in tokens])
    return image, text, model.logit_scale.exp().item()


@pytest.fixture
def rewards(clip_folder, hps_folder, aesthetic_file, clip_t5_folder):
    return {
        "pickscore": clip_reward("pickscore", str(clip_folder), "logit"),
        "clipscore": clip_reward("clipscore", str(clip_folder), "cosine"),
        "hpsv2.1": hps("hpsv2.1", "HPS_v2.1_compressed.pt", str(hps_folder)),
        "aesthetic": aesthetic("aesthetic", str(aesthetic_file), "", clip=str(clip_folder)),
        "vqascore": vqascore("vqascore", str(clip_t5_folder)),
    }


def exact(reward):
    """The reward in float64."""
    return replace(reward, weights=replace(reward.weights, precision="fp64"))(IMAGES.double(), PROMPTS, [{}] * 4)


def test_pickscore_and_clipscore_are_the_published_formulas(clip_folder, rewards):
    image, text, scale = published_clip(clip_folder)
    expected = cosines(image, text)
    np.testing.assert_allclose(exact(rewards["pickscore"]), scale * expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(exact(rewards["clipscore"]), expected, rtol=1e-5, atol=1e-6)


def test_clipscore_of_the_paper_is_of_a_caption_and_never_negative(tmp_path):
    folder = tiny_checkpoints.clip(tmp_path, seed=5)
    image, text, _ = published_clip(folder, [f"A photo depicts {prompt}" for prompt in PROMPTS], True)
    expected = cosines(image, text)
    assert (expected > 1e-3).any()
    assert (expected < -1e-3).any()
    scored = exact(clip_reward("c", str(folder), "clipscore"))
    np.testing.assert_allclose(scored, 2.5 * np.maximum(expected, 0), rtol=1e-5, atol=1e-6)


def test_the_aesthetic_score_is_the_published_formula(clip_folder, aesthetic_file, rewards):
    image = published_clip(clip_folder, by_torchvision=True)[0].numpy()
    hidden = image / np.linalg.norm(image, axis=1, keepdims=True)
    state = torch.load(aesthetic_file)
    for layer in (0, 2, 4, 6, 7):
        weight, bias = (state[f"layers.{layer}.{part}"].double().numpy() for part in ("weight", "bias"))
        hidden = hidden @ weight.T + bias
    np.testing.assert_allclose(exact(rewards["aesthetic"]), hidden[:, 0], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_hps_is_the_published_formula(hps_folder, rewards):
    model = open_clip.create_model(f"local-dir:{hps_folder}", load_weights=False)
    model.load_state_dict(torch.load(hps_folder / "HPS_v2.1_compressed.pt")["state_dict"])
    model.double().eval()
    steps = [v2.Resize(32, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(32)]
    recipe = v2.Compose(
        [v2.PILToTensor(), v2.ToDtype(torch.float64, scale=True), *steps, v2.Normalize(CLIP_MEAN, CLIP_STD)]
    )
    tokens = open_clip.tokenize(PROMPTS)
    image = torch.cat([model.encode_image(recipe(p)[None]) for p in pictures()])
    expected = cosines(image, model.encode_text(tokens))
    np.testing.assert_allclose(exact(rewards["hpsv2.1"]), expected, rtol=1e-5, atol=1e-6)


def test_clip_weights_that_are_left_over_or_missing_are_refused(clip_folder, tmp_path):
    """Counts of positions are let pass: older versions of transformers stored them, PickScore's file holds them."""
    shutil.copytree(clip_folder, tmp_path, dirs_exist_ok=True)
    tensors = load_file(clip_folder / "model.safetensors")
    counts = {"text_model.embeddings.position_ids": torch.arange(16)[None]}
    bias = tensors["visual_projection.weight"][0].clone()
    for change, message in (
        (counts, None),
        ({"visual_projection.bias": bias}, "unexpected_keys.*visual_projection.bias"),
    ):
        save_file({**tensors, **change}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        reward = clip_reward("c", str(tmp_path), "logit")
        with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
            assert reward(IMAGES, PROMPTS, [{}] * 4).isfinite().all()
        weights._LOADED.clear()


@pytest.mark.parametrize(
    ("name", "option", "tensor"),
    [
        ("f_clipscore", "path", "visual_projection.weight"),
        ("aesthetic", "clip", "visual_projection.weight"),
        ("geneval", "clip", "visual_projection.weight"),
        ("geneval", "path", "class_predictor.weight"),
    ],
)
def test_weights_that_lack_a_part_are_refused_not_drawn_at_random(name, option, tensor, small, tmp_path):
    shutil.copytree(small[name][option], tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[tensor]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    spec = {"include": [{"class": "bench", "count": 1}]}
    with pytest.raises(ValueError, match=f"does not fit .*missing_keys.*{tensor}"):
        get_reward(name, **{**small[name], option: str(tmp_path)})(IMAGES, PROMPTS, [spec] * 4)


@pytest.mark.parametrize("name", ["pickscore", "hpsv2.1", "vqascore", "image_reward"])
def test_a_path_that_is_not_there_is_said_to_be_none_and_not_looked_for_on_the_hub(name, small, tmp_path):
    options = {**small[name], "path": str(tmp_path / "nothing")}
    with pytest.raises(RewardUnavailable, match=r"there is no file or folder .*nothing: check the path"):
        get_reward(name, **options)(IMAGES, PROMPTS, [{}] * 4)


@torch.no_grad()
def test_rounding_to_8_bits_moves_a_score_by_far_less_than_another_picture_does(rewards):
    """The gap between the published score and the smooth one, of pictures that need not be at 8 bits."""
    images = torch.rand(8, 3, 45, 61, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for name, reward in rewards.items():
        reward = replace(reward, weights=replace(reward.weights, precision="fp64"))
        rounded, smooth = (replace(reward, quantize=q)(images, ["a circle"] * 8, [{}] * 8) for q in (True, False))
        gap = (rounded - smooth).abs().max() / smooth.std()
        assert 0 < gap < 0.1, (name, gap)


@pytest.mark.parametrize("name", ["pickscore", "clipscore", "hpsv2.1", "aesthetic"])
def test_the_check_for_published_weights_finds_no_difference_and_a_planted_one(
    name, small, tmp_path, monkeypatch, capsys
):
    check = importlib.import_module("scripts.studies.check_rewards")
    for i, picture in enumerate(pictures()[:2]):
        picture.save(tmp_path / f"{i}.png")
    argv = ["check_rewards.py", name, "--images", str(tmp_path), "--options", json.dumps(small[name])]
    monkeypatch.setattr("sys.argv", [*argv, "--save", str(tmp_path / "scores.json")])
    assert check.main() == 0
    assert "they differ by at most" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "scores.json").read_text())[name]["published"]) == 2
    real = check.ORACLES[name]
    monkeypatch.setitem(check.ORACLES, name, lambda *arguments: [score + 0.01 for score in real(*arguments)])
    assert check.main() == 1


def test_offloaded_networks_leave_after_gradients_too(clip_folder, monkeypatch):
    """Scores without gradients move them at once; those with gradients at the next ``unload``."""
    plain = get_reward("pickscore", path=str(clip_folder), tokenizer=str(clip_folder))
    reward = weights.offloaded(plain)
    assert reward.weights.offload
    assert not plain.weights.offload
    assert vars(reward)[RECIPE] == vars(plain)[RECIPE]  # as it is recorded
    images = IMAGES.clone().requires_grad_()
    reward(images, PROMPTS, [{}] * 4).sum().backward()
    moved = []
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: moved.append((type(self).__name__, device)))
    weights.unload()
    assert ("CLIPModel", "cpu") in moved
