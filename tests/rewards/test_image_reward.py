"""ImageReward against a transcription of BLIP's maths over the published names, one image at a time."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms import v2
from transformers import PreTrainedTokenizerFast

from diffalign.rewards.image_reward import FILE, TEXT_CONFIG, TOKENS, image_reward
from diffalign.rewards.support import weights
from diffalign.rewards.support.preprocess import CLIP_MEAN, CLIP_STD
from tests.rewards.tiny_checkpoints import DEPTH, MED, PATCH, SIDE, VISION

PROMPTS = ["a red circle", "two squares and a circle", ""]
IMAGES = torch.randint(0, 256, (3, 3, 45, 61), generator=torch.Generator().manual_seed(0)).double() / 255


def attend(q, k, v, heads, mask=None):
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (q, k, v))
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores + torch.where(mask.bool(), 0.0, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


def transcription(w, pixels, ids, mask):
    """The score of one image (3, S, S) for tokens (L,), in the dtype of the weights."""

    def lin(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def ln(x, name, eps):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)

    eyes, text = "blip.visual_encoder.", "blip.text_encoder."
    patches = F.conv2d(pixels[None], w[f"{eyes}patch_embed.proj.weight"], w[f"{eyes}patch_embed.proj.bias"], PATCH)
    x = torch.cat([w[f"{eyes}cls_token"][0], patches[0].flatten(1).T]) + w[f"{eyes}pos_embed"][0]
    for i in range(DEPTH):
        block = f"{eyes}blocks.{i}."
        q, k, v = lin(ln(x, f"{block}norm1", 1e-6), f"{block}attn.qkv").chunk(3, -1)
        x = x + lin(attend(q, k, v, VISION // 64), f"{block}attn.proj")
        x = x + lin(F.gelu(lin(ln(x, f"{block}norm2", 1e-6), f"{block}mlp.fc1")), f"{block}mlp.fc2")
    seen = ln(x, f"{eyes}norm", 1e-6)
    h = w[f"{text}embeddings.word_embeddings.weight"][ids]
    h = h + w[f"{text}embeddings.position_embeddings.weight"][: len(ids)]
    h = ln(h, f"{text}embeddings.LayerNorm", 1e-12)
    for i in range(MED["num_hidden_layers"]):
        for part in ("attention", "crossattention"):
            own, source = f"{text}encoder.layer.{i}.{part}.", h if part == "attention" else seen
            q, k, v = lin(h, f"{own}self.query"), lin(source, f"{own}self.key"), lin(source, f"{own}self.value")
            found = attend(q, k, v, MED["num_attention_heads"], mask if part == "attention" else None)
            h = ln(lin(found, f"{own}output.dense") + h, f"{own}output.LayerNorm", 1e-12)
        own = f"{text}encoder.layer.{i}."
        h = ln(
            lin(F.gelu(lin(h, f"{own}intermediate.dense")), f"{own}output.dense") + h, f"{own}output.LayerNorm", 1e-12
        )
    score = h[0]
    for layer in (0, 2, 4, 6, 7):
        score = lin(score, f"mlp.layers.{layer}")
    return (score.item() - 0.16717362830052426) / 1.0333394966054072


def test_the_score_is_the_published_formula(image_reward_folder):
    weights = {
        name: t.double() if t.is_floating_point() else t for name, t in torch.load(image_reward_folder / FILE).items()
    }
    tokenizer = PreTrainedTokenizerFast.from_pretrained(image_reward_folder)
    steps = [v2.Resize(SIDE, v2.InterpolationMode.BICUBIC), v2.CenterCrop(SIDE), v2.PILToTensor()]
    prepare = v2.Compose([*steps, v2.ToDtype(torch.float64, scale=True), v2.Normalize(CLIP_MEAN, CLIP_STD)])
    expected = []
    for image, prompt in zip(IMAGES, PROMPTS, strict=True):
        picture = Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy())
        tokens = tokenizer(prompt, padding="max_length", truncation=True, max_length=TOKENS)
        ids, mask = (torch.tensor(tokens[name]) for name in ("input_ids", "attention_mask"))
        expected.append(transcription(weights, prepare(picture), ids, mask))
    reward = image_reward("image_reward", str(image_reward_folder), str(image_reward_folder), precision="fp64")
    found = reward(IMAGES, PROMPTS, [{}] * 3)
    assert np.std(expected) > 1e-4
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_a_checkpoint_that_lacks_a_weight_is_refused(image_reward_folder, tmp_path):
    state = torch.load(image_reward_folder / FILE)
    del state["blip.visual_encoder.norm.weight"]
    torch.save(state, tmp_path / FILE)
    (tmp_path / TEXT_CONFIG).write_text(json.dumps(MED))
    weights._LOADED.clear()
    with pytest.raises(ValueError, match=r"Missing key.*vision.post_layernorm.weight"):
        image_reward("image_reward", str(tmp_path), str(image_reward_folder))(IMAGES.float(), PROMPTS, [{}] * 3)
