"""List names and shapes of published weights, from the authors' own module code on the meta device.

Makes ``tests/rewards/published/NAME.txt``. Needs nothing of this package, but what the authors' code ran on: torch,
``transformers==4.45.2``, and for ImageReward ``timm==0.6.13`` and ``fairscale==0.4.13``. Get the code and list it:

    git clone https://github.com/linzhiqiu/t2v_metrics && git -C t2v_metrics checkout COMMIT  # as in ``SOURCES``
    python scripts/build/published_keys.py clip_flant5_xl t2v_metrics
    pip download --no-deps hpsv3==1.0.0 && unzip -d hpsv3_wheel hpsv3-1.0.0-py3-none-any.whl
    python scripts/build/published_keys.py hpsv3 hpsv3_wheel

Of each repository only the files that define the network are run; what their packages import besides is left out.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import math
import sys
import tempfile
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

T2V = "10d549b369861aab49e7dbe9f33a469a17ef1129"  # the last with CLIP-FlanT5
HPSV3 = "wheel, sha256 1a1b3ed1f538315ddf0e90c55b9f5c8ab3248d772cd713c11f7dfe35bf867ab3"
SOURCES = {
    "pickscore": "transformers 4.45.2, CLIPModel with the configuration of laion/CLIP-ViT-H-14-laion2B-s32B-b79K, "
    "as yuvalkirstain/PickScore loads it",
    "hpsv2": "tgxs002/HPSv2 @ 866735ecaae999fa714bd9edfa05aa2672669ee3, hpsv2/src/open_clip/model.py, CLIP of ViT-H-14",
    "hpsv3": f"hpsv3 1.0.0 of PyPI ({HPSV3}), hpsv3/model/qwen2vl_trainer.py, "
    "Qwen2VLRewardModelBT of HPSv3_7B.yaml on transformers 4.45.2",
    "image_reward": "THUDM/ImageReward @ c1392c6dd0fd6ecd6d416c96959ab744a6d0a8fb, ImageReward/ImageReward.py, "
    "ImageReward with its med_config.json",
    "aesthetic": "christophschuhmann/improved-aesthetic-predictor @ 6934dd81792f086e613a121dbce43082cb8be85e, "
    "simple_inference.py, MLP",
    "hp_scorer": "BarretBa/ICTHP @ e2aa72859e8a0a52afc95e693d40cae852ff8855, trainer/eval/eval.py, MLP",
    "dina_lrm_head": "HKUST-C4G/diffusion-rm @ af485b40312610d6b7e6a70efb8853248ff64b85, "
    "diffusion_rm/models/reward_head.py, RewardHead of config/sd3m/thurstone-12layer.yaml",
    "mps": "Kwai-Kolors/MPS @ be9027f3e9097a4a8b1e0be5991d0096aa8abc4b, trainer/models: clip_model.py, CLIPModel on "
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K, and cross_modeling.py",
    "deqa": "zhiyuanyou/DeQA-Score @ 8e4abc826ed84a15f7c0bc3ac119e8b9245c7b2f, src/model: visual_encoder.py, and "
    "modeling_llama2.py on Llama-2-7B",
    "clip_flant5_xl": f"linzhiqiu/t2v_metrics @ {T2V}, CLIPT5ForConditionalGeneration of FlanT5-XL",
    "clip_flant5_xxl": f"linzhiqiu/t2v_metrics @ {T2V}, CLIPT5ForConditionalGeneration of FlanT5-XXL",
}
FLAN_T5 = {"xl": (2048, 5120, 32), "xxl": (4096, 10240, 64)}  # width, inner width, heads
VIT_L_336 = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24,
    "patch_size": 14, "image_size": 336,
}  # fmt: skip
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
QWEN2_VL_7B = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 151658, "tie_word_embeddings": False,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": {
        "depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "hidden_size": 3584, "patch_size": 14,
        "spatial_merge_size": 2, "temporal_patch_size": 2,
    },
}  # fmt: skip
MED = {
    "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768,
    "intermediate_size": 3072, "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "num_attention_heads": 12,
    "num_hidden_layers": 12, "vocab_size": 30524, "encoder_width": 768, "add_cross_attention": True,
}  # fmt: skip


def class_of(file: Path, name: str, **names: Any) -> type:
    """One class of a file, without the imports of the rest; ``names``: what it refers to."""
    tree = ast.parse(file.read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    exec(compile(tree, str(file), "exec", flags=annotations.compiler_flag), names)
    return names[name]


def module_of(root: Path, name: str) -> types.ModuleType:
    """A module below ``root``, without the ``__init__`` of the packages around it."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        package = types.ModuleType(".".join(parts[:i]))
        package.__path__ = [str(root.joinpath(*parts[:i]))]
        sys.modules[package.__name__] = package
    return importlib.import_module(name)


def pickscore(root: Path) -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    return CLIPModel(CLIPConfig(**VIT_H))


def mlp(file: str, width: int) -> Callable[[Path], nn.Module]:
    """The head that a script of the authors defines."""
    lightning = types.SimpleNamespace(LightningModule=nn.Module)
    return lambda root: class_of(root / file, "MLP", nn=nn, torch=torch, pl=lightning)(width)


def hpsv2(root: Path) -> nn.Module:
    model = module_of(root, "hpsv2.src.open_clip.model")
    config = json.loads((root / "hpsv2/src/open_clip/model_configs/ViT-H-14.json").read_text())
    return model.CLIP(**config)


def hpsv3(root: Path) -> nn.Module:
    import transformers

    file = root / "hpsv3/model/qwen2vl_trainer.py"
    names = {"Qwen2VLForConditionalGeneration": transformers.Qwen2VLForConditionalGeneration, "nn": nn, "torch": torch}
    config = transformers.Qwen2VLConfig(**QWEN2_VL_7B)
    return class_of(file, "Qwen2VLRewardModelBT", **names)(config, output_dim=2, rm_head_type="ranknet")


def image_reward(root: Path) -> nn.Module:
    folder = root / "ImageReward"
    tokenizer = types.SimpleNamespace(
        add_special_tokens=lambda _: None, additional_special_tokens_ids=[0], bos_token="[DEC]", enc_token_id=0
    )
    blip = module_of(root, "ImageReward.models.BLIP.blip_pretrain")
    blip.init_tokenizer = lambda: tokenizer
    names = {"MLP": class_of(folder / "ImageReward.py", "MLP", nn=nn, torch=torch)}
    names |= {"BLIP_Pretrain": blip.BLIP_Pretrain, "_transform": lambda size: None, "nn": nn, "torch": torch}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as config:
        json.dump(MED, config)
        config.flush()
        # It reads numbers off a tensor, which one of the meta device does not have.
        with patch.object(torch, "linspace", partial(torch.linspace, device="cpu")):
            return class_of(folder / "ImageReward.py", "ImageReward", **names)(config.name)


def clip_flant5(size: str) -> Callable[[Path], nn.Module]:
    """CLIP-FlanT5 of one size."""

    def build(root: Path) -> nn.Module:
        import transformers

        vision = transformers.CLIPVisionConfig(**VIT_L_336)
        # Configurations instead of downloads: only names and shapes are asked for.
        transformers.CLIPVisionModel.from_pretrained = lambda *_, **__: transformers.CLIPVisionModel(vision)
        transformers.CLIPImageProcessor.from_pretrained = lambda *_, **__: None
        name = "t2v_metrics.models.vqascore_models.clip_t5.model.language_model.clip_t5"
        width, inner, heads = FLAN_T5[size]
        module = module_of(root, name)
        config = module.CLIPT5Config(
            vocab_size=32128, d_model=width, d_kv=64, d_ff=inner, num_layers=24, num_heads=heads,
            feed_forward_proj="gated-gelu", tie_word_embeddings=False, mm_vision_tower="openai/clip",
            mm_hidden_size=1024, mm_vision_select_layer=-2, mm_projector_type="mlp2x_gelu",
        )  # fmt: skip
        return module.CLIPT5ForConditionalGeneration(config)

    return build


def dina_lrm_head(root: Path) -> nn.Module:
    module = module_of(root, "diffusion_rm.models.reward_head")
    sizes = {"token_dim": 1536, "t_embed_dim": 1536, "n_visual_heads": 3, "n_text_heads": 3}
    return module.RewardHead(**sizes, num_queries=4, num_attn_heads=8, use_proj_in=False)


def deqa(root: Path) -> nn.Module:
    """The classes of mPLUG-Owl2 without their bases, which need transformers 4.36; Llama's parts are as they were."""
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP, LlamaRMSNorm

    folder = root / "src/model"
    names: dict[str, Any] = {"nn": nn, "torch": torch, "np": __import__("numpy"), "partial": partial, **vars(math)}
    names["PreTrainedModel"] = type("Base", (nn.Module,), {"__init__": plain_init, "post_init": lambda self: None})
    for file in ("visual_encoder.py", "modeling_llama2.py"):
        tree = ast.parse((folder / file).read_text())
        tree.body = [node for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
        tree.body = [node for node in tree.body if not node.name.startswith(("LlamaFlash", "LlamaSdpa"))]
        names |= {"LlamaMLP": LlamaMLP, "LlamaRMSNorm": LlamaRMSNorm, "LlamaConfig": LlamaConfig, "Cache": object}
        names["logger"] = types.SimpleNamespace(warning_once=lambda text: None)
        exec(compile(tree, file, "exec", flags=annotations.compiler_flag), names)
    names["LlamaAttention"]._init_rope = lambda self: None  # its frequencies are not stored
    names["LLAMA_ATTENTION_CLASSES"] = {"eager": names["LlamaAttention"]}
    llama = LlamaConfig(attn_implementation="eager", vocab_size=32000)
    llama.rope_theta = 10000.0
    sizes = {"hidden_size": 1024, "num_attention_heads": 16, "layer_norm_eps": 1e-6, "chunk_size_feed_forward": 0}
    sizes |= {"attention_dropout": 0.0, "attention_probs_dropout_prob": 0.0, "encoder_hidden_size": 1024}
    eyes = types.SimpleNamespace(
        **sizes, intermediate_size=4096, num_hidden_layers=24, image_size=448, patch_size=14, use_flash_attn=False
    )
    queries = types.SimpleNamespace(
        **sizes, intermediate_size=2816, num_hidden_layers=6, num_learnable_queries=64, grid_size=32
    )
    model = {
        "embed_tokens": nn.Embedding(32000, 4096),
        "layers": nn.ModuleList(names["LlamaDecoderLayer"](llama, i) for i in range(32)),
        "norm": LlamaRMSNorm(4096),
        "vision_model": names["MplugOwlVisionModel"](eyes),
        "visual_abstractor": names["MplugOwlVisualAbstractorModel"](queries, 4096),
    }
    return nn.ModuleDict({"model": nn.ModuleDict(model), "lm_head": nn.Linear(4096, 32000, bias=False)})


def mps(root: Path) -> nn.Module:
    """CLIP, as loaded, and the authors' layers; einops, which they import, is not used by constructors."""
    from transformers import CLIPConfig, CLIPModel

    names = {"nn": nn, "torch": torch, "einsum": torch.einsum}
    tree = ast.parse((root / "trainer/models/cross_modeling.py").read_text())
    tree.body = [node for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    exec(compile(tree, "cross_modeling.py", "exec", flags=annotations.compiler_flag), names)
    layers: Any = names["Cross_model"]
    parts = {"model": CLIPModel(CLIPConfig(**VIT_H)), "cross_model": layers(dim=1024, layer_num=4, heads=16)}
    return nn.ModuleDict(parts)


def plain_init(self: nn.Module, config: Any) -> None:
    nn.Module.__init__(self)


BUILDERS: dict[str, Callable[[Path], nn.Module]] = {
    "pickscore": pickscore,
    "hpsv2": hpsv2,
    "hpsv3": hpsv3,
    "image_reward": image_reward,
    "aesthetic": mlp("simple_inference.py", 768),
    "hp_scorer": mlp("trainer/eval/eval.py", 1024),
    "dina_lrm_head": dina_lrm_head,
    "deqa": deqa,
    "mps": mps,
    "clip_flant5_xl": clip_flant5("xl"),
    "clip_flant5_xxl": clip_flant5("xxl"),
}


def listed(name: str, root: Path) -> str:
    """The whole file: where it is from, then a name and a shape per line."""
    with torch.device("meta"):
        state = BUILDERS[name](root).state_dict()
    shapes = ("x".join(map(str, tensor.shape)) or "scalar" for tensor in state.values())
    return "\n".join([f"# {SOURCES[name]}", *map(" ".join, zip(state, shapes, strict=True))]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=BUILDERS)
    parser.add_argument("root", type=Path, help="the authors' code at its commit; any folder for pickscore")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parents[2] / "tests/rewards/published")
    args = parser.parse_args()
    sys.path.insert(0, str(args.root))
    (args.output_dir / f"{args.name}.txt").write_text(listed(args.name, args.root.resolve()))


if __name__ == "__main__":
    main()
