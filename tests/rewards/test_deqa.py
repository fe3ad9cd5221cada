"""DeQA-Score against a literal transcription of its network in float64: one image at a time, without modules."""

import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPImageProcessorPil

from diffalign.rewards import get_reward
from diffalign.rewards.base import RewardUnavailable
from diffalign.rewards.deqa import AFTER, BEFORE, LEVELS
from diffalign.rewards.support.preprocess import CLIP_MEAN
from tests.rewards.tiny_judges import DEQA

IMAGES = torch.randint(0, 256, (3, 3, 22, 17), generator=torch.Generator().manual_seed(0)).double() / 255
VISION, QUERIES = DEQA["visual_config"]["visual_model"], DEQA["visual_config"]["visual_abstractor"]


class Published:
    """The published forward passes, written with matrix products and loops over heads and tokens."""

    def __init__(self, folder):
        self.w = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}

    def linear(self, name, x):
        bias = self.w.get(f"{name}.bias")
        x = x @ self.w[f"{name}.weight"].T
        return x if bias is None else x + bias

    def norm(self, name, x, eps):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + eps).sqrt()
        return x * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def rms(self, name, x):
        return x / (x.square().mean(-1, keepdim=True) + DEQA["rms_norm_eps"]).sqrt() * self.w[f"{name}.weight"]

    def vision(self, pixels):
        patch, start = VISION["patch_size"], "model.vision_model."
        kernel = self.w[f"{start}embeddings.patch_embed.weight"].flatten(1)
        rows = [
            kernel @ pixels[:, y : y + patch, x : x + patch].flatten()
            for y in range(0, VISION["image_size"], patch)
            for x in range(0, VISION["image_size"], patch)
        ]
        x = torch.stack([self.w[f"{start}embeddings.cls_token"][0, 0], *rows])
        x = self.norm(f"{start}embeddings.pre_layernorm", x + self.w[f"{start}embeddings.position_embedding"][0], 1e-6)
        for i in range(VISION["num_hidden_layers"]):
            name = f"{start}encoder.layers.{i}."
            mixed = self.linear(f"{name}self_attn.query_key_value", self.norm(f"{name}input_layernorm", x, 1e-6))
            size, heads = VISION["hidden_size"] // VISION["num_attention_heads"], []
            for head in range(VISION["num_attention_heads"]):
                q, k, v = (mixed[:, (3 * head + j) * size : (3 * head + j + 1) * size] for j in range(3))
                heads.append((q @ k.T / math.sqrt(size)).softmax(-1) @ v)
            x = x + self.linear(f"{name}self_attn.dense", torch.cat(heads, -1))
            inner = self.linear(f"{name}mlp.fc1", self.norm(f"{name}post_attention_layernorm", x, 1e-6))
            x = x + self.linear(f"{name}mlp.fc2", inner / (1 + (-1.702 * inner).exp()))
        return self.norm(f"{start}post_layernorm", x, 1e-6)

    def abstract(self, image):
        start = "model.visual_abstractor."
        x = self.w[f"{start}query_embeds"][0]
        for i in range(QUERIES["num_hidden_layers"]):
            name = f"{start}encoder.layers.{i}.crossattention."
            x = self.norm(f"{name}norm1", x, 1e-5)
            both = torch.cat([x, self.norm(f"{name}normk", image, 1e-5)])
            own, other = (self.w[f"{name}attention.{part}_pos_embed"] for part in "qk")
            q, k = self.linear(f"{name}attention.query", x + own), torch.cat([own, other])
            k, v = self.linear(f"{name}attention.key", both + k), self.linear(f"{name}attention.value", both)
            size, heads = QUERIES["hidden_size"] // QUERIES["num_attention_heads"], []
            for head in range(QUERIES["num_attention_heads"]):
                part = slice(head * size, (head + 1) * size)
                heads.append((q[:, part] @ k[:, part].T / math.sqrt(size)).softmax(-1) @ v[:, part])
            x = x + self.linear(f"{name}output.out_proj", torch.cat(heads, -1))
            y, mlp = self.norm(f"{name}output.norm2", x, 1e-5), f"{name}output.mlp."
            y = F.silu(self.linear(f"{mlp}w1", y)) * self.linear(f"{mlp}w3", y)
            x = x + self.linear(f"{mlp}w2", self.norm(f"{mlp}ffn_ln", y, 1e-6))
        return torch.cat([self.linear(f"{start}visual_fc", x), self.w[f"{start}vit_eos"][0]])

    def way(self, function, name, x, kinds):
        return torch.stack([function(f"{name}.multiway.{kind}", row) for kind, row in zip(kinds, x, strict=True)])

    def rotate(self, x, position):
        half = len(x) // 2
        angles = position / 10000.0 ** (torch.arange(half).double() / half)
        first, second = x[:half], x[half:]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin])

    def language(self, x, kinds):
        heads, groups, length = DEQA["num_attention_heads"], DEQA["num_key_value_heads"], len(x)
        size = DEQA["hidden_size"] // heads
        for i in range(DEQA["num_hidden_layers"]):
            name = f"model.layers.{i}."
            normed = self.way(self.rms, f"{name}input_layernorm", x, kinds)
            q = self.linear(f"{name}self_attn.q_proj", normed).view(length, heads, size)
            k, v = (
                self.way(self.linear, f"{name}self_attn.{part}_proj", normed, kinds).view(length, groups, size)
                for part in "kv"
            )
            found = torch.zeros(length, heads, size, dtype=torch.float64)
            for head in range(heads):
                group = head // (heads // groups)
                for at in range(length):
                    query = self.rotate(q[at, head], at)
                    logits = [query @ self.rotate(k[j, group], j) / math.sqrt(size) for j in range(at + 1)]
                    found[at, head] = torch.stack(logits).softmax(0) @ v[: at + 1, group]
            x = x + self.linear(f"{name}self_attn.o_proj", found.flatten(1))
            y = self.way(self.rms, f"{name}post_attention_layernorm", x, kinds)
            y = F.silu(self.linear(f"{name}mlp.gate_proj", y)) * self.linear(f"{name}mlp.up_proj", y)
            x = x + self.linear(f"{name}mlp.down_proj", y)
        return self.linear("lm_head", self.rms("model.norm", x))

    def score(self, picture, tokenizer):
        side, colour = max(picture.size), tuple(int(255 * value) for value in CLIP_MEAN)
        square = Image.new("RGB", (side, side), colour)
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        size = VISION["image_size"]
        processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
        image = self.abstract(self.vision(processor(square, return_tensors="pt")["pixel_values"][0].double()))
        before, after = tokenizer(BEFORE).input_ids, tokenizer(AFTER).input_ids[1:]
        words = self.w["model.embed_tokens.weight"]
        x = torch.cat([words[before], image, words[after]])
        kinds = [0] * len(before) + [1] * len(image) + [0] * len(after)
        ids = [own[1] for own in tokenizer(list(LEVELS)).input_ids]
        return self.language(x, kinds)[-1, ids].softmax(-1) @ torch.tensor([5.0, 4, 3, 2, 1], dtype=torch.float64)


@torch.no_grad()
def test_the_score_is_the_published_formula(deqa_folder):
    published, tokenizer = Published(deqa_folder), AutoTokenizer.from_pretrained(deqa_folder)
    pictures = [Image.fromarray((i.permute(1, 2, 0) * 255).round().byte().numpy()) for i in IMAGES]
    expected = torch.stack([published.score(picture, tokenizer) for picture in pictures])
    found = get_reward("deqa", path=str(deqa_folder), precision="fp64")(IMAGES, ["a", "b", "c"], [{}] * 3)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found.std() > 1e-4


def test_weights_in_half_precision_are_close(deqa_folder):
    scores = [
        get_reward("deqa", path=str(deqa_folder), precision=precision)(IMAGES.float(), ["a"] * 3, [{}] * 3)
        for precision in ("fp16", "no")
    ]
    torch.testing.assert_close(*scores, rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.visual_abstractor.vit_eos"), r"does not fit mPLUG-Owl2.*missing_keys.*vit_eos"),
        (lambda t: t.update({"model.extra": torch.ones(1)}), r"does not fit mPLUG-Owl2.*unexpected_keys.*extra"),
        (
            lambda t: t.update({"lm_head.weight": torch.ones(3, 3)}),
            r"does not fit mPLUG-Owl2.*mismatched_keys.*lm_head",
        ),
        (lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}), None),
    ],
)
def test_files_that_do_not_fit_are_refused(change, message, deqa_folder, tmp_path):
    shutil.copytree(deqa_folder, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    reward = get_reward("deqa", path=str(tmp_path))
    if message is None:
        assert reward(IMAGES.float(), ["a"] * 3, [{}] * 3).isfinite().all()
        return
    with pytest.raises(RewardUnavailable, match=message) as caught:
        reward(IMAGES.float(), ["a"] * 3, [{}] * 3)
    assert len(str(caught.value)) < 2000
