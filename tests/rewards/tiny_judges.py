"""Small random networks of newer judges, saved in the layouts of the published ones."""

import json
import math
import sys
import types

import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from diffalign.rewards.aesthetic_v25 import Head as HeadV25
from diffalign.rewards.dina_lrm import Network
from diffalign.rewards.evalmuse import FILE as EVALMUSE_FILE
from diffalign.rewards.mps import Network as MpsNetwork
from diffalign.rewards.support.judge_files import About, load_backbone, load_tokenizer, save_judge
from diffalign.rewards.support.judge_raters import NETWORKS
from diffalign.rewards.support.mplug_owl2 import MplugOwl2, OwlConfig
from tests.rewards.tiny_checkpoints import PIPELINE, WORDS, clip, linear, norm


def dina(folder):
    """DiNa-LRM's files for the embedded SD3 pipeline: an adapter as PEFT saves it, a head, and a configuration."""
    torch.manual_seed(8)
    transformer = SD3Transformer2DModel.from_pretrained(PIPELINE, subfolder="transformer")
    head = {"use_proj_in": False, "width": -1, "out_dim": 1, "num_queries": 4, "num_attn_heads": 8, "dropout": 0.0}
    config = {"num_transformer_layers": 2, "visual_head_idx": [1, 2], "text_head_idx": [1, 2], "use_lora": True}
    config |= {"use_logistic": False, "reward_head": head}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model": config}))
    network = Network(transformer, config)
    for parameter in network.reward_head.parameters():
        parameter.data.normal_(0, 0.3)
    return save_dina(folder, network)


def save_dina(folder, network):
    """The head, and an adapter of the blocks, which get PEFT's layers."""
    adapter = folder / "checkpoint/backbone_lora"
    adapter.mkdir(parents=True, exist_ok=True)
    torch.save(network.reward_head.state_dict(), folder / "checkpoint/rm_head.pt")
    targets = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    lora = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=targets)
    backbone = torch.nn.ModuleDict({"transformer_blocks": network.transformer_blocks})
    get_peft_model(backbone, lora).save_pretrained(adapter)
    return folder


DEQA_WORDS = ["<s>", "</s>", "<unk>", "USER", "ASSISTANT", ":", "The", "quality", "of", "the", "image", "is", "How"]
DEQA_WORDS += ["would", "you", "rate", "this", "?", "excellent", "good", "fair", "poor", "bad"]
DEQA = {
    "model_type": "mplug_owl2", "vocab_size": len(DEQA_WORDS), "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
    "visual_config": {
        "visual_model": {
            "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3,
            "image_size": 28, "patch_size": 7, "layer_norm_eps": 1e-6,
        },
        "visual_abstractor": {
            "num_learnable_queries": 5, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
            "intermediate_size": 20, "encoder_hidden_size": 24, "grid_size": 4, "layer_norm_eps": 1e-6,
        },
    },
}  # fmt: skip


def deqa(folder):
    """mPLUG-Owl2's files, small, with a tokenizer that begins with <s> as Llama's does."""
    torch.manual_seed(9)
    folder.mkdir(exist_ok=True)
    model = MplugOwl2(OwlConfig(**DEQA))
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.normal_(0, 0.3)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(DEQA))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(DEQA_WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def mps(folder):
    """MPS's file: a module pickled whole, of classes that cannot be imported where it is read."""
    clip(folder, seed=10, width=128)
    network = MpsNetwork(CLIPConfig.from_pretrained(folder))
    network.model.load_state_dict(CLIPModel.from_pretrained(folder).state_dict())
    for parameter in network.cross_model.parameters():
        parameter.data.normal_(0, 0.15)
    module = types.ModuleType("trainer_of_mps")
    kinds: dict[type, type] = {}
    for part in network.modules():
        kind = type(part)
        if not kind.__module__.startswith("torch.") and kind not in kinds:
            kinds[kind] = type(f"{kind.__name__}Published", (torch.nn.Module,), {"__module__": module.__name__})
            setattr(module, kinds[kind].__name__, kinds[kind])
    sys.modules[module.__name__] = module
    try:
        for part in network.modules():
            part.__class__ = kinds.get(type(part), type(part))
        torch.save(network, folder / "MPS_overall_checkpoint.pth")
    finally:
        del sys.modules[module.__name__]
    return folder


def aesthetic_v25(folder):
    torch.manual_seed(11)
    config = SiglipVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=3, image_size=28, patch_size=7
    )
    SiglipVisionModel(config).save_pretrained(folder)
    torch.save(HeadV25(24).state_dict(), folder / "head.pth")
    return folder


EVA = {"width": 176, "depth": 2, "patch": 7, "side": 28, "inner": 96}
QFORMER = {"width": 128, "depth": 3, "inner": 64, "queries": 4, "positions": 24}


def evalmuse(folder):
    """FGA-BLIP2's file, small: LAVIS's names, the parts that its score does not use included."""
    torch.manual_seed(12)
    w, width, wide = {}, QFORMER["width"], EVA["width"]
    eyes, bert = "visual_encoder.", "Qformer.bert."
    w["query_tokens"] = torch.randn(1, QFORMER["queries"], width)
    w[f"{eyes}cls_token"] = torch.randn(1, 1, wide)
    w[f"{eyes}pos_embed"] = torch.randn(1, (EVA["side"] // EVA["patch"]) ** 2 + 1, wide)
    w[f"{eyes}patch_embed.proj.weight"] = torch.randn(wide, 3, EVA["patch"], EVA["patch"]) / 12
    w[f"{eyes}patch_embed.proj.bias"] = torch.randn(wide)
    for i in range(EVA["depth"]):
        block = f"{eyes}blocks.{i}."
        norm(w, f"{block}norm1", wide), norm(w, f"{block}norm2", wide)
        w[f"{block}attn.q_bias"], w[f"{block}attn.v_bias"] = torch.randn(2, wide)
        w[f"{block}attn.qkv.weight"] = torch.randn(3 * wide, wide) / math.sqrt(wide)
        linear(w, f"{block}attn.proj", wide, wide)
        linear(w, f"{block}mlp.fc1", EVA["inner"], wide), linear(w, f"{block}mlp.fc2", wide, EVA["inner"])
    norm(w, "ln_vision", wide)
    w[f"{bert}embeddings.word_embeddings.weight"] = torch.randn(len(WORDS) + 1, width)
    w[f"{bert}embeddings.position_embeddings.weight"] = torch.randn(QFORMER["positions"], width)
    w[f"{bert}embeddings.position_ids"] = torch.arange(QFORMER["positions"])[None]
    norm(w, f"{bert}embeddings.LayerNorm", width)
    for i in range(QFORMER["depth"]):
        layer = f"{bert}encoder.layer.{i}."
        for part, source in (("attention", width), ("crossattention", wide))[: 1 + (i % 2 == 0)]:
            linear(w, f"{layer}{part}.self.query", width, width)
            linear(w, f"{layer}{part}.self.key", width, source), linear(w, f"{layer}{part}.self.value", width, source)
            linear(w, f"{layer}{part}.output.dense", width, width), norm(w, f"{layer}{part}.output.LayerNorm", width)
        for kind in ("", "_query"):
            linear(w, f"{layer}intermediate{kind}.dense", QFORMER["inner"], width)
            linear(w, f"{layer}output{kind}.dense", width, QFORMER["inner"])
            norm(w, f"{layer}output{kind}.LayerNorm", width)
    linear(w, "itm_head", 2, width), linear(w, "vision_proj", 8, width), linear(w, "text_proj", 8, width)
    linear(w, "mask_proj.layers.0", 256, width)
    linear(w, "Qformer.cls.predictions.transform.dense", width, width)
    w["temp"] = torch.ones(())
    torch.save({"model": w}, folder / EVALMUSE_FILE)
    return folder


def own_judge(folder, backbone, kind="pal_b"):
    """A judge of three raters, mixtures of two prototypes that differ."""
    network = NETWORKS[kind](load_backbone(str(backbone)), raters=3, prototypes=2)
    with torch.no_grad():
        if kind == "pal_a":
            network.points.mul_(20)
        else:
            network.prototypes[1].weight.copy_(network.prototypes[1].weight.flip(0))
        network.rater_logits.copy_(torch.tensor([[3.0, -3.0], [-3.0, 3.0], [0.0, 0.0]]))
    save_judge(network, load_tokenizer(str(backbone)), folder, About(str(backbone), ("ann", "bob", "carl")))
    return folder


def siglip(folder):
    """A SigLIP model with both towers."""
    torch.manual_seed(9)
    tokenizer = AutoTokenizer.from_pretrained(PIPELINE / "tokenizer")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": 16, "projection_size": 32}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 8}))
    with torch.no_grad():
        model.logit_scale.fill_(2.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
