"""DiNa-LRM against a literal transcription in float64, and what it promises about noise, latents and files."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import SD3Transformer2DModel
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from diffalign.models import load_model
from diffalign.rewards import get_reward
from diffalign.rewards.base import RewardUnavailable, check_latents
from diffalign.rewards.dina_lrm import prompt_key
from diffalign.rng import KeyedRNG
from tests.rewards.tiny_checkpoints import PIPELINE

PROMPTS = ["a red circle", "two squares", "a red circle"]
LATENTS = torch.randn(3, 8, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
DATA = [{}] * 3


@pytest.fixture
def exact(small):
    return get_reward("dina_lrm", **small["dina_lrm"], precision="fp64")


def norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt() * weight


class Head:
    """The published head, written as sums over heads of eight."""

    def __init__(self, tensors):
        self.tensors = {name: tensor.double() for name, tensor in tensors.items()}

    def linear(self, name, x):
        return x @ self.tensors[f"{name}.weight"].T + self.tensors[f"{name}.bias"]

    def adapted(self, kind, i, tokens, time):
        name = f"layer_adapters_{kind}.{i}"
        gamma, beta = self.linear(f"{name}.cond_mlp.2", F.silu(self.linear(f"{name}.cond_mlp.0", time))).chunk(2, -1)
        tokens = tokens * (1 + gamma[:, None]) + beta[:, None] + self.tensors[f"{name}.layer_embed"]
        return self.linear(f"{name}.proj", tokens)

    def branch(self, block, kind, short, query, tokens, gated):
        tokens = norm(tokens, self.tensors[f"{block}.norm_{short}.weight"])
        key, value = (self.linear(f"{block}.to_{part}_{kind}", tokens) for part in "kv")
        if gated:
            gate = self.linear(f"{block}.gate_{kind}.2", F.silu(self.linear(f"{block}.gate_{kind}.0", tokens)))
            value = value / (1 + (-gate).exp())
        width = query.shape[-1] // 8
        parts = []
        for head in range(8):
            own = slice(head * width, (head + 1) * width)
            logits = query[..., own] @ key[..., own].mT / math.sqrt(width)
            parts.append(logits.softmax(-1) @ value[..., own])
        return torch.cat(parts, -1)

    def __call__(self, visual, text, time):
        seen, read = (
            self.linear(f"agg_{kind}", torch.cat([self.adapted(kind, i, x, time) for i, x in enumerate(parts)], -1))
            for kind, parts in (("visual", visual), ("text", text))
        )
        x = self.tensors["query_tokens"].expand(len(seen), -1, -1)
        query = self.linear("attn1.to_q", norm(x, self.tensors["attn1.norm_q.weight"]))
        seeing = self.branch("attn1", "vis", "v", query, seen, True)
        x = x + self.linear("attn1.to_out.0", seeing + self.branch("attn1", "text", "t", query, read, True))
        query = self.linear("attn2.to_q", norm(x, self.tensors["attn2.norm_q.weight"]))
        x = x + self.linear("attn2.to_out.0", self.branch("attn2", "vis", "v", query, seen, False))
        inner = self.linear("ff.0", norm(x, self.tensors["norm_ff.weight"]))
        x = x + self.linear("ff.2", F.gelu(inner))
        return self.linear("head", x)[..., 0].mean(1)


@torch.no_grad()
def published(folder, latents, prompts, level):
    """Unmerged adapter, diffusers' blocks, the head above; noise as documented."""
    transformer = SD3Transformer2DModel.from_pretrained(PIPELINE, subfolder="transformer").double()
    blocks = torch.nn.ModuleDict({"transformer_blocks": transformer.transformer_blocks[:2]})
    PeftModel.from_pretrained(blocks, folder / "checkpoint/backbone_lora").double()
    model = load_model(str(PIPELINE))
    for encoder in (model.pipeline.text_encoder, model.pipeline.text_encoder_2, model.pipeline.text_encoder_3):
        encoder.double()
    encoded = model.encode(prompts).tensors
    # The scheduler's own table of a thousand levels, shifted by its shift.
    shift = model.pipeline.scheduler.config.shift
    table = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000
    table = shift * table / (1 + (shift - 1) * table)
    sigma = table[(table - level).abs().argmin()].float().double()
    noise = torch.stack([KeyedRNG(0).normal((8, 8, 8), "dina_lrm/noise", prompt_key(p)) for p in prompts]).double()
    image, text = transformer.pos_embed((1 - sigma) * latents + sigma * noise), None
    text = transformer.context_embedder(encoded["embeds"].double())
    time = transformer.time_text_embed((1000 * sigma).float().expand(len(prompts)), encoded["pooled"].double())
    images, texts = [], []
    for block in transformer.transformer_blocks[:2]:
        text, image = block(hidden_states=image, encoder_hidden_states=text, temb=time)
        images.append(image)
        texts.append(text)
    head = Head(torch.load(folder / "checkpoint/rm_head.pt", weights_only=True))
    return (head(images, texts, time) + 10) / 10


def test_the_score_is_the_published_formula(exact, dina_folder):
    found = exact(LATENTS, PROMPTS, DATA)
    torch.testing.assert_close(found, published(dina_folder, LATENTS, PROMPTS, 0.4), rtol=1e-5, atol=1e-6)
    assert found.std() > 1e-3


def test_noise_is_a_function_of_seed_and_prompt(exact, small):
    again = exact(LATENTS.flip(0), PROMPTS[::-1], DATA).flip(0)
    torch.testing.assert_close(again, exact(LATENTS, PROMPTS, DATA), rtol=1e-9, atol=1e-9)
    same = LATENTS[:1].expand(3, -1, -1, -1)
    scores = exact(same, PROMPTS, DATA)
    assert scores[0] == pytest.approx(scores[2].item(), abs=1e-12)
    other = get_reward("dina_lrm", **small["dina_lrm"], precision="fp64", seed=1)(same, PROMPTS, DATA)
    assert (other - scores).abs().max() > 1e-4


def test_the_gradient_reaches_latents(exact):
    x = LATENTS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(exact(x, PROMPTS, DATA).sum(), x)
    direction = gradient / gradient.norm()

    @torch.no_grad()
    def slope(step):
        up, down = (exact(LATENTS + s * step * direction, PROMPTS, DATA).sum() for s in (1, -1))
        return ((up - down) / (2 * step)).item()

    # diffusers computes some norms in float32, so the steps are wide.
    assert (4 * slope(0.01) - slope(0.02)) / 3 == pytest.approx(gradient.norm().item(), rel=1e-3)


def test_images_are_encoded_by_the_vae_of_the_base(exact):
    model = load_model(str(PIPELINE))
    model.pipeline.vae.double()
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise = [KeyedRNG(0).normal((8, 8, 8), "dina_lrm/vae", prompt_key(p)) for p in PROMPTS]
    with torch.no_grad():
        latents = model.encode_images(images, torch.stack(noise).double())
    found = replace(exact, noise=0.1)(latents, PROMPTS, DATA)  # the published level of images
    torch.testing.assert_close(exact(images, PROMPTS, DATA), found, rtol=1e-6, atol=1e-7)


def test_latents_of_another_vae_are_refused(exact):
    own = json.loads((PIPELINE / "vae/config.json").read_text())
    check_latents({"dina": exact}, own)
    for key, value in (("latent_channels", 4), ("scaling_factor", 0.18215), ("shift_factor", None)):
        with pytest.raises(ValueError, match=f"reward 'dina': it scores latents of .*{key}.*choose a reward of images"):
            check_latents({"dina": exact}, {**own, key: value})


def drop(name):
    return lambda folder: (folder / name).unlink()


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:100])


def change(edit):
    def apply(folder):
        file = folder / "checkpoint/backbone_lora/adapter_model.safetensors"
        tensors = load_file(file)
        edit(tensors)
        save_file(tensors, file)

    return apply


def rename_head(folder):
    file = folder / "checkpoint/rm_head.pt"
    tensors = torch.load(file, weights_only=True)
    tensors["head.other"] = tensors.pop("head.weight")
    torch.save(tensors, file)


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('ran')",))


def evil(folder):
    torch.save({"head": Evil()}, folder / "checkpoint/rm_head.pt")


def another_kind(folder):
    file = folder / "config.json"
    file.write_text(file.read_text().replace('"use_logistic": false', '"use_logistic": true'))


FIRST = "base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop("checkpoint/rm_head.pt"), r"lacks checkpoint/rm_head.pt"),
        (drop("config.json"), r"lacks config.json"),
        (cut("checkpoint/rm_head.pt"), "cannot be loaded"),
        (cut("checkpoint/backbone_lora/adapter_model.safetensors"), "cannot be loaded"),
        (change(lambda t: t.pop(FIRST)), r"does not fit the network: 1 weights are missing or unexpected"),
        (change(lambda t: t.update(extra=t[FIRST].clone())), r"does not fit the network"),
        (change(lambda t: t.update({FIRST: t[FIRST][:, :5].clone()})), r"has another shape"),
        (rename_head, r"head\.other"),
        (evil, "cannot be loaded"),
        (another_kind, "describes another kind of network"),
    ],
)
def test_files_that_do_not_fit_are_refused(spoil, message, dina_folder, small, tmp_path):
    shutil.copytree(dina_folder, tmp_path, dirs_exist_ok=True)
    spoil(tmp_path)
    reward = get_reward("dina_lrm", **{**small["dina_lrm"], "path": str(tmp_path)})
    with pytest.raises(RewardUnavailable, match=message) as caught:
        reward(LATENTS.float(), PROMPTS, DATA)
    assert len(str(caught.value)) < 2000


def test_a_noise_level_outside_of_0_to_1_is_refused():
    with pytest.raises(ValueError, match=r"noise is 1.5; write a level between 0 and 1"):
        get_reward("dina_lrm", noise=1.5)
