"""FGA-BLIP2 against a literal transcription in float64, from LAVIS's names, one image at a time."""

import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms import v2
from transformers import AutoTokenizer

from diffalign.rewards import get_reward
from diffalign.rewards.base import RewardUnavailable
from diffalign.rewards.evalmuse import FILE, caption
from diffalign.rewards.support.preprocess import CLIP_MEAN, CLIP_STD
from tests.rewards.test_mps import IMAGES
from tests.rewards.tiny_judges import EVA, QFORMER

PROMPTS = ["A red circle!", "two squares (and a circle)", ""]
DATA = [{}] * 3


class Published:
    def __init__(self, folder, tokenizer):
        self.w = {name: t.double() for name, t in torch.load(folder / FILE, weights_only=True)["model"].items()}
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)

    def linear(self, name, x, bias=None):
        return x @ self.w[f"{name}.weight"].T + (self.w[f"{name}.bias"] if bias is None else bias)

    def norm(self, name, x, eps):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + eps).sqrt()
        return x * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def attend(self, q, k, v, size):
        heads = [slice(i, i + size) for i in range(0, q.shape[1], size)]
        return torch.cat([(q[:, h] @ k[:, h].T / math.sqrt(size)).softmax(-1) @ v[:, h] for h in heads], -1)

    def vision(self, pixels):
        x = F.conv2d(
            pixels, self.w["visual_encoder.patch_embed.proj.weight"], self.w["visual_encoder.patch_embed.proj.bias"],
            stride=EVA["patch"],
        )[0].flatten(1).T  # fmt: skip
        x = torch.cat([self.w["visual_encoder.cls_token"][0], x]) + self.w["visual_encoder.pos_embed"][0]
        for i in range(EVA["depth"]):
            name = f"visual_encoder.blocks.{i}."
            q_bias, v_bias = (self.w[f"{name}attn.{part}_bias"] for part in "qv")
            bias = torch.cat([q_bias, 0 * q_bias, v_bias])
            q, k, v = self.linear(f"{name}attn.qkv", self.norm(f"{name}norm1", x, 1e-6), bias).chunk(3, -1)
            x = x + self.linear(f"{name}attn.proj", self.attend(q, k, v, 88))
            inner = F.gelu(self.linear(f"{name}mlp.fc1", self.norm(f"{name}norm2", x, 1e-6)))
            x = x + self.linear(f"{name}mlp.fc2", inner)
        return self.norm("ln_vision", x, 1e-5)

    def block(self, name, x, source):
        q = self.linear(f"{name}self.query", x)
        k, v = (self.linear(f"{name}self.{part}", source) for part in ("key", "value"))
        found = self.linear(f"{name}output.dense", self.attend(q, k, v, 64))
        return self.norm(f"{name}output.LayerNorm", found + x, 1e-12)

    def inner(self, layer, kind, x):
        y = F.gelu(self.linear(f"{layer}intermediate{kind}.dense", x))
        return self.norm(f"{layer}output{kind}.LayerNorm", self.linear(f"{layer}output{kind}.dense", y) + x, 1e-12)

    def score(self, picture, prompt):
        side, count, bert = EVA["side"], QFORMER["queries"], "Qformer.bert."
        steps = [v2.Resize((side, side), v2.InterpolationMode.BICUBIC), v2.PILToTensor()]
        recipe = v2.Compose([*steps, v2.ToDtype(torch.float64, scale=True), v2.Normalize(CLIP_MEAN, CLIP_STD)])
        image = self.vision(recipe(picture)[None])
        ids = self.tokenizer(caption(prompt)).input_ids
        words = self.w[f"{bert}embeddings.word_embeddings.weight"][ids]
        words = words + self.w[f"{bert}embeddings.position_embeddings.weight"][: len(ids)]
        x = self.norm(f"{bert}embeddings.LayerNorm", torch.cat([self.w["query_tokens"][0], words]), 1e-12)
        for i in range(QFORMER["depth"]):
            layer = f"{bert}encoder.layer.{i}."
            x = self.block(f"{layer}attention.", x, x)
            queries, text = x[:count], x[count:]
            if i % 2 == 0:
                queries = self.block(f"{layer}crossattention.", queries, image)
            x = torch.cat([self.inner(layer, "_query", queries), self.inner(layer, "", text)])
        return (self.linear("itm_head", x[:count]).softmax(-1)[:, 1].mean() * 4 + 1).item()


def test_the_score_is_the_published_formula(evalmuse_folder, image_reward_folder, small):
    published = Published(evalmuse_folder, image_reward_folder)
    pictures = [Image.fromarray((i.permute(1, 2, 0) * 255).round().byte().numpy()) for i in IMAGES]
    expected = [published.score(*pair) for pair in zip(pictures, PROMPTS, strict=True)]
    found = get_reward("evalmuse", **small["evalmuse"], precision="fp64")(IMAGES, PROMPTS, DATA)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found.std() > 1e-3


def test_captions_are_prepared_as_lavis_does():
    assert caption('A "Red"  Circle; (big)!\n') == "a red circle big"
    assert caption("word " * 60) == " ".join(["word"] * 50)
    assert caption("") == ""


@pytest.mark.parametrize("spoil", ["lost", "more", "cut", "missing"])
def test_files_that_do_not_fit_are_refused(spoil, evalmuse_folder, small, tmp_path):
    shutil.copy(evalmuse_folder / FILE, tmp_path)
    file, tensors = tmp_path / FILE, torch.load(evalmuse_folder / FILE, weights_only=True)["model"]
    if spoil == "cut":
        file.write_bytes(file.read_bytes()[:5000])
    elif spoil == "missing":
        file.unlink()
    else:
        tensors |= {"other.weight": torch.ones(1)} if spoil == "more" else {}
        tensors.pop("itm_head.bias" if spoil == "lost" else "temp")
        torch.save({"model": tensors}, file)
    with pytest.raises(RewardUnavailable, match=r"cannot be loaded") as caught:
        get_reward("evalmuse", **{**small["evalmuse"], "path": str(tmp_path)})(IMAGES.float(), PROMPTS, DATA)
    assert len(str(caught.value)) < 2000
