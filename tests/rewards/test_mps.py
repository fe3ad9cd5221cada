"""MPS against a literal transcription in float64, one image at a time, and its file, which is a whole pickle."""

import math
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from diffalign.rewards import get_reward
from diffalign.rewards.base import RewardUnavailable
from diffalign.rewards.mps import CONDITION, FILE
from diffalign.rewards.support.inert_pickle import tensors_of

PROMPTS = ["a red circle", "two squares and a triangle left of it", ""]
IMAGES = torch.randint(0, 256, (3, 3, 45, 61), generator=torch.Generator().manual_seed(0)).double() / 255


class Published:
    def __init__(self, folder):
        tensors = tensors_of(folder / FILE)
        self.w = {name: tensor.double() for name, tensor in tensors.items() if name.startswith("cross_model.")}
        self.clip = CLIPModel.from_pretrained(folder).double().eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def words(self, text):
        ids = self.tokenizer(text, max_length=16, padding="max_length", truncation=True, return_tensors="pt").input_ids
        found = self.clip.text_model(input_ids=ids)
        return self.clip.text_projection(found.last_hidden_state)[0], self.clip.text_projection(found.pooler_output)[0]

    def norm(self, name, x):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        return x * self.w[f"{name}.norm.weight"] + self.w[f"{name}.norm.bias"]

    def linear(self, name, x):
        return x @ self.w[f"{name}.weight"].T

    def attend(self, query, key, value, seen):
        found = []
        for start in range(0, query.shape[1], 64):
            logits = query[:, start : start + 64] @ key.T / 8
            found.append(logits.masked_fill(~seen, -math.inf).softmax(-1) @ value)
        return torch.cat(found, -1)

    def rotate(self, x):
        angles = torch.arange(len(x)).double()[:, None] / 10000 ** (torch.arange(0, 64, 2).double() / 64)
        blocks = []
        for start in range(0, x.shape[1], 64):
            first, second = x[:, start : start + 32], x[:, start + 32 : start + 64]
            blocks += [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()]
        return torch.cat(blocks, -1)

    @torch.no_grad()
    def score(self, picture, prompt, threshold):
        processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
        pixels = processor(picture, return_tensors="pt")["pixel_values"].double()
        x = self.clip.visual_projection(self.clip.vision_model(pixel_values=pixels).last_hidden_state)[0]
        (text, end), (condition, _) = self.words(prompt), self.words(CONDITION)
        similarity = torch.stack([max(word @ other for other in condition) for word in text])
        seen = similarity / similarity.max() > threshold
        for i in range(4):
            name = f"cross_model.layers.{i}.0.fn"
            y = self.norm(name, x)
            key, value = self.linear(f"{name}.to_kv", text).chunk(2, -1)
            a, gate = self.linear(f"{name}.ff.0", y).chunk(2, -1)
            found = self.attend(self.linear(f"{name}.to_q", y), key, value, seen)
            x = x + self.linear(f"{name}.to_out", found) + self.linear(f"{name}.ff.2", F.silu(gate) * a)
            name = f"cross_model.layers.{i}.1.fn"
            width = x.shape[1]
            q, key, value, inner = self.linear(f"{name}.fused_attn_ff_proj", self.norm(name, x)).split(
                (width, 64, 64, 8 * width), -1
            )
            found = self.attend(self.rotate(q), self.rotate(key), value, torch.ones(len(x), dtype=torch.bool))
            a, gate = inner.chunk(2, -1)
            x = x + self.linear(f"{name}.attn_out", found) + self.linear(f"{name}.ff_out.1", F.silu(gate) * a)
        cosine = x[0] @ end / x[0].norm() / end.norm()
        return (self.clip.logit_scale.exp() * cosine).item(), int(seen.sum())


@pytest.mark.parametrize("threshold", [0.3, 0.9])
def test_the_score_is_the_published_formula(threshold, mps_folder, small):
    published = Published(mps_folder)
    pictures = [Image.fromarray((i.permute(1, 2, 0) * 255).round().byte().numpy()) for i in IMAGES]
    expected = [published.score(*pair, threshold) for pair in zip(pictures, PROMPTS, strict=True)]
    reward = get_reward("mps", **small["mps"], precision="fp64", threshold=threshold)
    found = reward(IMAGES, PROMPTS, [{}] * 3)
    np.testing.assert_allclose(found, [score for score, _ in expected], rtol=1e-5, atol=1e-5)
    if threshold == 0.9:
        assert min(count for _, count in expected) < 16, "the condition leaves words out"
        alone = torch.cat([reward(IMAGES[i : i + 1], PROMPTS[i : i + 1], [{}]) for i in range(3)])
        torch.testing.assert_close(alone, found)  # the published mask depends on the batch


def test_a_file_is_asked_for_and_its_source_named():
    with pytest.raises(RewardUnavailable, match=r"in no hub repository: download MPS_overall_checkpoint.pth .*path"):
        get_reward("mps")(IMAGES.float(), PROMPTS, [{}] * 3)


def test_a_state_dict_is_read_as_well(mps_folder, small, tmp_path):
    torch.save({"state_dict": tensors_of(mps_folder / FILE)}, tmp_path / FILE)
    scores = [
        get_reward("mps", **{**small["mps"], "path": path})(IMAGES.float(), PROMPTS, [{}] * 3)
        for path in (str(tmp_path), small["mps"]["path"])
    ]
    assert torch.equal(*scores)


# The pickle -----------------------------------------------------------------------------------------------------------


class Bomb:
    """What a hostile file does when it is unpickled."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


class Setter(nn.Module):
    def __setstate__(self, state):
        raise SystemExit("ran")


@pytest.mark.parametrize("kind", ["exec", "os", "open", "nested", "state"])
def test_nothing_that_a_file_names_runs(kind, tmp_path):
    trace = tmp_path / "trace"
    bombs = {
        "exec": Bomb(exec, f"open({str(trace)!r}, 'w')"),
        "os": Bomb(os.system, f"touch {trace}"),
        "open": Bomb(open, str(trace), "w"),
    }
    module = Setter() if kind == "state" else nn.Linear(2, 2)
    module.register_buffer("extra", torch.ones(3))
    if kind == "nested":
        module.hook = Bomb(map, bombs["exec"], [1])
    elif kind != "state":
        module.hook = bombs[kind]
    torch.save(module, tmp_path / "file.pth")
    try:
        found = tensors_of(tmp_path / "file.pth")
        assert torch.equal(found["extra"], torch.ones(3))
    except (pickle.UnpicklingError, ValueError, RuntimeError):
        pass  # refused
    assert not trace.exists()


def test_tensors_of_a_module_are_its_state_dict(tmp_path):
    module = nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.ModuleDict({"a": nn.LSTM(3, 2)}))
    module[0].register_buffer("temporary", torch.ones(1), persistent=False)
    torch.save(module, tmp_path / "module.pth")
    found, expected = tensors_of(tmp_path / "module.pth"), module.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("content", [[torch.ones(1)], {}, {"a": 1}, "text", {"state_dict": 3}], ids=range(5))
def test_a_file_of_something_else_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(ValueError, match="holds neither a state dict nor a module"):
        tensors_of(tmp_path / "file.pth")


@pytest.mark.parametrize("spoil", ["cut", "lost", "more", "missing"])
def test_files_that_do_not_fit_are_refused(spoil, small, mps_folder, tmp_path):
    shutil.copy(mps_folder / FILE, tmp_path)
    tensors = tensors_of(mps_folder / FILE)
    if spoil == "cut":
        (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:5000])
    elif spoil == "missing":
        (tmp_path / FILE).unlink()
    else:
        changed = {"lost": lambda: tensors.pop("cross_model.layers.0.0.fn.to_q.weight"),
                   "more": lambda: tensors.update(other=torch.ones(1))}  # fmt: skip
        changed[spoil]()
        torch.save(tensors, tmp_path / FILE)
    with pytest.raises(RewardUnavailable, match=r"cannot be loaded|there is no file") as caught:
        get_reward("mps", **{**small["mps"], "path": str(tmp_path)})(IMAGES.float(), PROMPTS, [{}] * 3)
    assert len(str(caught.value)) < 2000
