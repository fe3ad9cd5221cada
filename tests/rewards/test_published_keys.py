"""The names and shapes of published weights, each listed by its authors' own module code on the meta device.

``published/NAME.txt`` says where from; every line is a name and a shape. ``scripts/build/published_keys.py`` made them.
What is loaded here, by the loaders' own mapping, must want exactly these.
"""

from pathlib import Path

import open_clip
import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, Qwen2VLConfig

from diffalign.rewards import REWARDS
from diffalign.rewards.aesthetic import Head
from diffalign.rewards.hpsv3 import build as build_hpsv3
from diffalign.rewards.image_reward import Network as ImageRewardNetwork
from diffalign.rewards.image_reward import renamed, text_config, vision_config
from diffalign.rewards.mps import Network as MpsNetwork
from diffalign.rewards.support.mplug_owl2 import MplugOwl2, OwlConfig
from diffalign.rewards.support.reward_head import RewardHead
from diffalign.rewards.support.weights import Weights
from diffalign.rewards.vqascore import ClipT5Config
from diffalign.rewards.vqascore import build as build_clip_t5
from tests.rewards.tiny_checkpoints import MED

VIT_H = {
    "projection_dim": 1024,
    "text_config": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24,
    },
    "vision_config": {
        "hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 16, "num_hidden_layers": 32,
        "patch_size": 14,
    },
}  # fmt: skip
FLAN_T5 = {"xl": (2048, 5120, 32), "xxl": (4096, 10240, 64)}
MED_LARGE = {**MED, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
MED_LARGE |= {"max_position_embeddings": 512, "vocab_size": 30524}


def published(name):
    """Name -> a tensor of its shape that takes no memory."""
    lines = (Path(__file__).parent / "published" / f"{name}.txt").read_text().splitlines()
    assert lines[0].startswith("# "), "where the list is from"
    pairs = (line.rsplit(" ", 1) for line in lines[1:])
    return {
        key: torch.zeros((), dtype=torch.bfloat16).expand(
            [] if shape == "scalar" else [int(n) for n in shape.split("x")]
        )
        for key, shape in pairs
    }


def check(module, weights):
    """Nothing is missing, nothing is left over, every shape fits."""
    module.load_state_dict(weights, strict=True, assign=True)


# Not stored, stored twice, or not needed.
UNCOUNTED = ("embed_tokens.weight", "position_ids", "lm_head.weight", "blip.vision_proj", "blip.text_proj")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("pickscore", "pickscore"),
        ("hpsv2.1", "hpsv2"),
        ("hpsv3", "hpsv3"),
        ("image_reward", "image_reward"),
        ("deqa", "deqa"),
        ("mps", "mps"),
        ("vqascore", "clip_flant5_xxl"),
        ("vqascore_xl", "clip_flant5_xl"),
    ],
)
def test_the_number_of_parameters_is_as_stated(name, file):
    skipped = UNCOUNTED if file != "hpsv3" else ("lm_head.weight",)
    if file.startswith("clip_flant5"):
        skipped = ("embed_tokens.weight",)  # shared.weight, under further names
    skipped = () if file == "deqa" else skipped
    count = sum(t.numel() for key, t in published(file).items() if not any(part in key for part in skipped))
    assert REWARDS[name].facts.millions == pytest.approx(count / 1e6, rel=0.002)


@pytest.fixture
def on_meta():
    with torch.device("meta"):
        yield


@pytest.mark.usefixtures("on_meta")
def test_pickscore_ict_and_hp():
    check(CLIPModel(CLIPConfig(**VIT_H)), published("pickscore"))
    check(Head(1024), published("hp_scorer"))


@pytest.mark.usefixtures("on_meta")
def test_the_head_of_dina_lrm():
    check(RewardHead(1536, 3, 3, 4, 8), published("dina_lrm_head"))


@pytest.mark.usefixtures("on_meta")
def test_mps():
    check(MpsNetwork(CLIPConfig(**VIT_H)), published("mps"))


@pytest.mark.usefixtures("on_meta")
def test_deqa():
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    check(MplugOwl2(OwlConfig(**sizes, vocab_size=32000)), published("deqa"))


@pytest.mark.usefixtures("on_meta")
def test_the_aesthetic_predictor():
    check(Head(768), published("aesthetic"))


@pytest.mark.usefixtures("on_meta")
def test_hps():
    check(open_clip.CLIP(**open_clip.get_model_config("ViT-H-14")), published("hpsv2"))


@pytest.mark.usefixtures("on_meta")
def test_image_reward():
    weights = renamed(published("image_reward"))
    vision = vision_config(weights)
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads) == (1024, 24, 16)
    assert (vision.image_size, vision.patch_size) == (224, 16)
    check(ImageRewardNetwork(vision, text_config(MED_LARGE, vision.hidden_size)), weights)


@pytest.mark.parametrize("size", FLAN_T5)
def test_clip_flan_t5(size):
    width, inner, heads = FLAN_T5[size]
    config = ClipT5Config(
        vocab_size=32128, d_model=width, d_kv=64, d_ff=inner, num_layers=24, num_heads=heads,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=24, patch_size=14,
        image_size=336,
    )  # fmt: skip
    weights = published(f"clip_flant5_{size}")
    # Words and head are tied where their values are the same.
    weights["lm_head.weight"] = torch.ones((), dtype=torch.bfloat16).expand(32128, width)
    network = build_clip_t5(None, config, vision, state_dict=dict(weights), dtype=torch.bfloat16)
    assert network.shared.weight.shape == network.lm_head.weight.shape == (32128, width)
    if size == "xl":
        refuses_others(weights, config, vision)


def refuses_others(weights, config, vision):
    for wrong in ("mm_projector.2.bias", "vision_tower.vision_tower.vision_model.pre_layrnorm.bias"):
        left = {name: tensor for name, tensor in weights.items() if name != wrong}
        with pytest.raises(ValueError, match=rf"does not fit CLIP-FlanT5: .*missing_keys.*{wrong.split('.')[-2]}"):
            build_clip_t5(None, config, vision, state_dict=left, dtype=torch.bfloat16)
    more = {**weights, "mm_projector.4.bias": weights["mm_projector.2.bias"]}
    with pytest.raises(ValueError, match=r"does not fit CLIP-FlanT5: .*unexpected_keys.*mm_projector.4.bias"):
        build_clip_t5(None, config, vision, state_dict=more, dtype=torch.bfloat16)


def test_hpsv3():
    weights = published("hpsv3")
    config = Qwen2VLConfig(
        text_config={
            "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
            "num_key_value_heads": 4, "vocab_size": len(weights["model.embed_tokens.weight"]),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        vision_config={
            "depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "hidden_size": 3584, "patch_size": 14,
            "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
    )  # fmt: skip
    network = build_hpsv3(weights, config, Weights("HPSv3", precision="bf16"))
    assert network.head[0].weight.shape == (1024, 3584)
    more = {**weights, "visual.extra.weight": weights["model.norm.weight"]}
    with pytest.raises(ValueError, match=r"does not fit Qwen2-VL: .*unexpected_keys.*extra"):
        build_hpsv3(more, config, Weights("HPSv3", precision="bf16"))
