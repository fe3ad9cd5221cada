"""Small random networks, saved in the layouts of the published ones."""

import json
import math
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    SwinConfig,
)

from diffalign.rewards.aesthetic import Head
from diffalign.rewards.hpsv3 import FILE as HPSV3_FILE
from diffalign.rewards.hpsv3 import TOKEN as REWARD_TOKEN
from diffalign.rewards.ict_hp import HEAD_FILE, HP_FILE, ICT_FILE
from diffalign.rewards.image_reward import FILE as IMAGE_REWARD_FILE
from diffalign.rewards.image_reward import TEXT_CONFIG
from diffalign.rewards.vqascore import ClipT5, ClipT5Config

PIPELINE = Path(__file__).parents[2] / "assets/shapes-sd3"
OPEN_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def clip(folder, seed=0, width=16):
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(PIPELINE / "tokenizer")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = {**sizes, **special, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def hps(folder):
    torch.manual_seed(2)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP, "preprocess_cfg": {}}))
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    for version in ("v2", "v2.1"):
        torch.save({"epoch": 10, "state_dict": model.state_dict()}, folder / f"HPS_{version}_compressed.pt")
    return folder


def clip_t5(folder):
    """As CLIP-FlanT5 is published: CLIP's weights among T5's, its configuration elsewhere."""
    torch.manual_seed(3)
    tokenizer = AutoTokenizer.from_pretrained(PIPELINE / "tokenizer_3")
    tokenizer.save_pretrained(folder)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
    )
    vision.save_pretrained(folder / "vision_tower")
    t5 = ClipT5Config(
        vocab_size=len(tokenizer), d_model=24, d_kv=8, d_ff=48, num_layers=2, num_heads=3,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0,
    )  # fmt: skip
    model = ClipT5(t5, vision).eval()
    for parameter in model.parameters():  # T5 starts with heads so small that every answer is as likely
        parameter.data.normal_(0, 0.3)
    renamed = {
        name.replace("vision_tower.", "vision_tower.vision_tower.vision_model."): tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if not name.endswith("embed_tokens.weight")
    }
    # FlanT5's head is its own, though transformers' configuration of T5 always says that it is tied.
    renamed["lm_head.weight"] = torch.randn(len(tokenizer), 24) * 0.3
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    extra = {"mm_vision_tower": "vision_tower", "mm_vision_select_layer": -2}
    config = {
        **t5.to_dict(),
        **extra,
        "tie_word_embeddings": False,
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": 32,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen_tokenizer():
    """Bytes as words, Qwen's special tokens, and its way to write a turn."""
    special = [f"<|{name}|>" for name in ("im_start", "im_end", "vision_start", "vision_end", "image_pad", "endoftext")]
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {word: len(vocabulary) + i for i, word in enumerate(("Ye", "Yes", "No"))}
    model = models.BPE(vocabulary, [("Y", "e"), ("Ye", "s"), ("N", "o")])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>", chat_template=CHAT
    )


TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 8192,
    "bos_token_id": None,
    "eos_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
}


def qwen(kind, folder):
    """A small random model of the family, saved as the published ones are."""
    torch.manual_seed(4)
    tokenizer = qwen_tokenizer()
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{mark}|>")
        for name, mark in (("image", "image_pad"), ("vision_start", "vision_start"), ("vision_end", "vision_end"))
    }
    shared = {"num_heads": 2, "spatial_merge_size": 2, "temporal_patch_size": 2}
    vision = {
        "qwen2_vl": {"depth": 2, "embed_dim": 32, "mlp_ratio": 2, "hidden_size": 32, "patch_size": 14},
        "qwen2_5_vl": {
            "depth": 2, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "patch_size": 14,
            "window_size": 56, "fullatt_block_indexes": [1],
        },
        "qwen3_vl": {
            "depth": 2, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "patch_size": 16,
            "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
        },
    }[kind]  # fmt: skip
    text = {**TEXT, "vocab_size": len(tokenizer), **({"head_dim": 16} if kind == "qwen3_vl" else {})}
    config = AutoConfig.for_model(kind, text_config=text, vision_config={**shared, **vision}, **ids)
    model = AutoModelForImageTextToText.from_config(config)
    for parameter in model.parameters():  # so that answers differ
        parameter.data.normal_(0, 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    statistics = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3} if kind == "qwen3_vl" else {}
    size = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
    Qwen2VLImageProcessor(patch_size=vision["patch_size"], size=size, **statistics).save_pretrained(folder)
    return folder


VISION, DEPTH, PATCH, SIDE = 128, 2, 16, 32  # two heads of 64
WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "red", "circle", "two", "squares", "and"]
MED = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 24,
    "initializer_range": 0.02,
    "intermediate_size": 40,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 64,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "add_type_embeddings": False,
    "vocab_size": len(WORDS) + 2,
    "encoder_width": 768,  # as published: it is not what counts
    "add_cross_attention": True,
}


def linear(weights, name, *shape):
    weights[f"{name}.weight"], weights[f"{name}.bias"] = (
        torch.randn(*shape) / math.sqrt(shape[1]),
        torch.randn(shape[0]),
    )


def norm(weights, name, width):
    weights[f"{name}.weight"], weights[f"{name}.bias"] = 1 + torch.randn(width) / 4, torch.randn(width) / 4


def image_reward(folder):
    """The published names and shapes, small: ``model.state_dict()`` of its authors' classes, position ids included."""
    torch.manual_seed(0)
    w, width = {}, MED["hidden_size"]
    eyes, text = "blip.visual_encoder.", "blip.text_encoder."
    w[f"{eyes}cls_token"] = torch.randn(1, 1, VISION)
    w[f"{eyes}pos_embed"] = torch.randn(1, (SIDE // PATCH) ** 2 + 1, VISION)
    w[f"{eyes}patch_embed.proj.weight"] = torch.randn(VISION, 3, PATCH, PATCH) / 30
    w[f"{eyes}patch_embed.proj.bias"] = torch.randn(VISION)
    for i in range(DEPTH):
        block = f"{eyes}blocks.{i}."
        norm(w, f"{block}norm1", VISION), norm(w, f"{block}norm2", VISION)
        linear(w, f"{block}attn.qkv", 3 * VISION, VISION), linear(w, f"{block}attn.proj", VISION, VISION)
        linear(w, f"{block}mlp.fc1", 2 * VISION, VISION), linear(w, f"{block}mlp.fc2", VISION, 2 * VISION)
    norm(w, f"{eyes}norm", VISION)
    w[f"{text}embeddings.position_ids"] = torch.arange(MED["max_position_embeddings"])[None]
    w[f"{text}embeddings.word_embeddings.weight"] = torch.randn(MED["vocab_size"], width)
    w[f"{text}embeddings.position_embeddings.weight"] = torch.randn(MED["max_position_embeddings"], width)
    norm(w, f"{text}embeddings.LayerNorm", width)
    for i in range(MED["num_hidden_layers"]):
        for part, source in (("attention", width), ("crossattention", VISION)):
            own = f"{text}encoder.layer.{i}.{part}."
            linear(w, f"{own}self.query", width, width)
            linear(w, f"{own}self.key", width, source), linear(w, f"{own}self.value", width, source)
            linear(w, f"{own}output.dense", width, width), norm(w, f"{own}output.LayerNorm", width)
        own = f"{text}encoder.layer.{i}."
        linear(w, f"{own}intermediate.dense", MED["intermediate_size"], width)
        linear(w, f"{own}output.dense", width, MED["intermediate_size"]), norm(w, f"{own}output.LayerNorm", width)
    linear(w, "blip.vision_proj", 8, VISION), linear(w, "blip.text_proj", 8, width)
    w |= {f"mlp.{name}": tensor for name, tensor in Head(width).state_dict().items()}
    torch.save(w, folder / IMAGE_REWARD_FILE)
    (folder / TEXT_CONFIG).write_text(json.dumps(MED))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 1), ("[SEP]", 2)])
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def ict_hp(clip_folder, root):
    """Fine-tuned weights as ``torch.save`` files, with the buffer that older versions of transformers stored."""
    torch.manual_seed(6)
    folders = {}
    for name, file in (("ict", ICT_FILE), ("hp", HP_FILE)):
        folders[name] = root / name
        model = CLIPModel.from_pretrained(clip_folder)
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        state = {**model.state_dict(), "text_model.embeddings.position_ids": torch.arange(16)[None]}
        (folders[name] / file).parent.mkdir(parents=True)
        torch.save(state, folders[name] / file)
    (folders["hp"] / HEAD_FILE).parent.mkdir()
    torch.save(Head(16).state_dict(), folders["hp"] / HEAD_FILE)
    return {name: str(folder) for name, folder in folders.items()}


def hpsv3(base, folder):
    """A checkpoint with the names of transformers 4.45, and what it should score."""
    model = AutoModelForImageTextToText.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": [REWARD_TOKEN]})
    model.resize_token_embeddings(len(tokenizer))
    torch.manual_seed(5)
    head = torch.nn.ModuleDict({"0": torch.nn.Linear(32, 1024), "3": torch.nn.Linear(1024, 16)})
    head["5"] = torch.nn.Linear(16, 2)
    for parameter in head.parameters():
        parameter.data.normal_(0, 0.3)
    tensors = {}
    for name, tensor in model.state_dict().items():
        old = name.removeprefix("model.")
        old = old if old.startswith(("visual.", "lm_head.")) else old.replace("language_model.", "model.", 1)
        tensors[old] = tensor.clone().contiguous()
    tensors |= {f"rm_head.{name}": tensor for name, tensor in head.state_dict().items()}
    save_file(tensors, folder / HPSV3_FILE)
    return folder, model, tokenizer, head


def detector(folder):
    torch.manual_seed(7)
    backbone = SwinConfig(
        image_size=64, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=32, num_queries=8,
        id2label={0: "cat", 1: "mouse", 2: "circle"}, label2id={"cat": 0, "mouse": 1, "circle": 2},
    )  # fmt: skip
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder
