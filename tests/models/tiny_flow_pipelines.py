"""Small random pipelines in the layouts of the flow models: published settings, scaled down."""

from __future__ import annotations

import inspect
import json

from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DPMSolverMultistepScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    CLIPTextModel,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    GlmConfig,
    GlmModel,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessor,
    PixtralProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from tests.conftest import PIPELINE
from tests.models import published_flow_configs as published
from tests.models.tiny_unet_pipelines import clip, tokenizer

CAPTIONS = ["a red circle", "a blue square left of a yellow circle", "three triangles"]
TALK = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
# Words of what pipelines put around a prompt; an attribute of instances, so it is repeated.
DESCRIBE = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:"
)
INSTRUCTION = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
# The layout of Mistral Small's own template.
INST = (
    "{{ bos_token }}{% for message in messages %}{% set text = message.content[0].text %}"
    "{% if message.role == 'system' %}[SYSTEM_PROMPT]{{ text }}[/SYSTEM_PROMPT]{% else %}[INST]{{ text }}[/INST]"
    "{% endif %}{% endfor %}"
)


def _learned(texts, alphabet, special, *, normalizer=None, splitter=None) -> tuple[dict, list]:
    """The vocabulary and merges of a byte-pair encoding in which frequent words are one token."""
    learned = Tokenizer(BPE())
    if normalizer is not None:
        learned.normalizer = normalizer
    learned.pre_tokenizer = splitter
    trainer = BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    learned.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(learned.to_str())["model"]["merges"]]
    return learned.get_vocab(), merges


def qwen_tokenizer() -> Qwen2Tokenizer:
    talk = ["<|im_start|>", "<|im_end|>"]
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    texts = [*CAPTIONS, *[DESCRIBE, "system\n", "user\n", "assistant\n"] * 20]
    vocab, merges = _learned(texts, pre_tokenizers.ByteLevel.alphabet(), ["<|endoftext|>", *talk], splitter=splitter)
    words = Qwen2Tokenizer(vocab=vocab, merges=merges, extra_special_tokens=talk)
    words.chat_template = CHAT
    return words


def gemma_tokenizer(*more: str) -> GemmaTokenizer:
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    texts = [*CAPTIONS, *INSTRUCTION, *more]
    vocab, merges = _learned(
        texts,
        sorted(set("".join(texts).replace(" ", "▁")) | {"▁", "\n"}),
        special,
        normalizer=normalizers.Replace(" ", "▁"),
        splitter=pre_tokenizers.Split("▁", "merged_with_next"),
    )
    return GemmaTokenizer(vocab=vocab, merges=merges)


def t5() -> tuple[T5EncoderModel, T5TokenizerFast]:
    words = T5TokenizerFast.from_pretrained(PIPELINE / "tokenizer_3")
    small = {"d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": len(words)}
    return T5EncoderModel(T5Config(**published.T5_XXL | small)), words


def sd35_medium() -> StableDiffusion3Pipeline:
    """The embedded pipeline with a transformer whose first layers have a second attention, as SD3.5-medium's."""
    parts = StableDiffusion3Pipeline.from_pretrained(PIPELINE).components
    config = {**parts["transformer"].config, "dual_attention_layers": (0, 1), "num_layers": 3}
    return StableDiffusion3Pipeline(**{**parts, "transformer": SD3Transformer2DModel.from_config(config)})


def flux_vae(blocks: int = 2) -> AutoencoderKL:
    small = {
        "block_out_channels": (8, 16, 16, 16)[:blocks],
        "down_block_types": ("DownEncoderBlock2D",) * blocks,
        "up_block_types": ("UpDecoderBlock2D",) * blocks,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 16,
    }
    return AutoencoderKL(**published.FLUX_VAE | small)


def _flux(guidance: bool, scheduler: dict) -> FluxPipeline:
    small = {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 24,
        "guidance_embeds": guidance,
        "axes_dims_rope": (4, 6, 6),
    }
    encoder, words = t5()
    return FluxPipeline(
        transformer=FluxTransformer2DModel(**published.FLUX_TRANSFORMER | small),
        vae=flux_vae(),
        text_encoder=clip(CLIPTextModel, 24),
        tokenizer=tokenizer(),
        text_encoder_2=encoder,
        tokenizer_2=words,
        scheduler=published.flow_scheduler(scheduler),
    )


def flux_dev() -> FluxPipeline:
    return _flux(True, published.FLUX_SCHEDULER)


def flux_schnell() -> FluxPipeline:
    return _flux(False, published.SCHNELL_SCHEDULER)


def qwen_image() -> QwenImagePipeline:
    small = {
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "axes_dims_rope": (4, 6, 6),
    }
    small_vae = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [False]}
    statistics = {"latents_mean": [-0.7, 0.1, 0.4, -0.2], "latents_std": [2.8, 1.4, 2.3, 1.9]}
    words = qwen_tokenizer()
    text = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": len(words),
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [1, 1, 2]},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = Qwen2_5_VLConfig(
        text_config=published.QWEN_VL_TEXT | text, vision_config=published.QWEN_VL_VISION | vision
    )
    return QwenImagePipeline(
        transformer=QwenImageTransformer2DModel(**published.QWEN_TRANSFORMER | small),
        vae=AutoencoderKLQwenImage(**published.QWEN_VAE | small_vae | statistics),
        text_encoder=Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=words,
        scheduler=published.flow_scheduler(published.QWEN_SCHEDULER),
    )


def sana() -> SanaPipeline:
    small = {
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": 16,
        "sample_size": 8,
    }
    blocks = ("ResBlock", "ResBlock", "EfficientViTBlock")
    small_vae = {
        "latent_channels": 4,
        "attention_head_dim": 4,
        "encoder_block_types": blocks,
        "decoder_block_types": blocks,
        "encoder_block_out_channels": (8, 8, 16),
        "decoder_block_out_channels": (8, 8, 16),
        "encoder_layers_per_block": (1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1),
        "encoder_qkv_multiscales": ((), (), (5,)),
        "decoder_qkv_multiscales": ((), (), (5,)),
    }
    words = gemma_tokenizer()
    gemma = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": len(words),
    }
    return SanaPipeline(
        transformer=SanaTransformer2DModel(**published.SANA_TRANSFORMER | small),
        vae=AutoencoderDC(**published.SANA_VAE | small_vae),
        text_encoder=Gemma2Model(Gemma2Config(**published.GEMMA_2B | gemma)),
        tokenizer=words,
        scheduler=DPMSolverMultistepScheduler.from_config(published.SANA_SCHEDULER),
    )


def z_image() -> ZImagePipeline:
    small = {
        "in_channels": 4,
        "dim": 32,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 16,
        "axes_dims": [4, 6, 6],
        "axes_lens": [128, 32, 32],
    }
    words = qwen_tokenizer()
    qwen = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": len(words),
    }
    return ZImagePipeline(
        transformer=ZImageTransformer2DModel(**published.Z_IMAGE_TRANSFORMER | small),
        vae=flux_vae(),
        text_encoder=Qwen3Model(Qwen3Config(**published.QWEN3_4B | qwen)),
        tokenizer=words,
        scheduler=published.flow_scheduler(published.Z_IMAGE_SCHEDULER),
    )


def _flux2(kind, text_encoder, words, name, width, **more):
    small = {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 3 * width,
        "timestep_guidance_channels": 16,
        "axes_dims_rope": (4, 4, 4, 4),
    }
    small_vae = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 16,
    }
    hub = published.HUB[name]
    vae = AutoencoderKLFlux2(**published.settings(hub, "vae") | small_vae)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    return kind(
        transformer=Flux2Transformer2DModel(**published.settings(hub, "transformer") | small),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=words,
        scheduler=published.flow_scheduler(published.SCHEDULERS[name]),
        **more,
    )


def mistral_processor() -> PixtralProcessor:
    special = ["<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
    special += ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    texts = [*CAPTIONS, *[SYSTEM_MESSAGE] * 20]
    vocab, merges = _learned(texts, pre_tokenizers.ByteLevel.alphabet(), special, splitter=splitter)
    learned = Tokenizer(BPE(vocab, merges))
    learned.pre_tokenizer, learned.decoder = splitter, decoders.ByteLevel()
    words = PreTrainedTokenizerFast(
        tokenizer_object=learned,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens=special[4:],
        padding_side="left",
    )
    return PixtralProcessor(PixtralImageProcessor(), words, patch_size=14, spatial_merge_size=2, chat_template=INST)


def flux2_dev() -> Flux2Pipeline:
    words = mistral_processor()
    text = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 31,  # the pipeline reads layers 10, 20 and 30
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": len(words.tokenizer),
    }
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    found = published.settings(published.HUB["flux2_dev"], "text_encoder")
    found["text_config"] = found["text_config"] | text
    found["vision_config"] = found["vision_config"] | vision | {"head_dim": 8}
    encoder = Mistral3ForConditionalGeneration(Mistral3Config(**found))
    return _flux2(Flux2Pipeline, encoder, words, "flux2_dev", 16)


def flux2_klein() -> Flux2KleinPipeline:
    words = qwen_tokenizer()
    qwen = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 28,  # the pipeline reads layers 9, 18 and 27
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": len(words),
    }
    encoder = Qwen3ForCausalLM(Qwen3Config(**published.QWEN3_4B | qwen))
    return _flux2(Flux2KleinPipeline, encoder, words, "flux2_klein", 16, is_distilled=False)


def lumina2() -> Lumina2Pipeline:
    small = {
        "in_channels": 4,
        "hidden_size": 32,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "num_attention_heads": 2,
        "num_kv_heads": 1,
        "multiple_of": 16,
        "axes_dim_rope": (4, 6, 6),
        "axes_lens": (300, 32, 32),
        "cap_feat_dim": 16,
        "sample_size": 4,
    }
    system = inspect.getsource(Lumina2Pipeline.__init__).split('self.system_prompt = "')[1].split('"')[0]
    words = gemma_tokenizer(*[f"{system} <Prompt Start>"] * 20)
    words._tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    gemma = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": len(words),
    }
    hub = published.HUB["lumina2"]
    return Lumina2Pipeline(
        transformer=Lumina2Transformer2DModel(**published.settings(hub, "transformer") | small),
        vae=flux_vae(blocks=4),  # the pipeline takes it to scale by 8
        text_encoder=Gemma2Model(Gemma2Config(**published.GEMMA_2B | gemma)),
        tokenizer=words,
        scheduler=published.flow_scheduler(published.SCHEDULERS["lumina2"]),
    )


def chroma() -> ChromaPipeline:
    small = {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "axes_dims_rope": (4, 6, 6),
        "approximator_num_channels": 16,
        "approximator_hidden_dim": 16,
        "approximator_layers": 1,
    }
    encoder, words = t5()
    return ChromaPipeline(
        transformer=ChromaTransformer2DModel(**published.settings(published.HUB["chroma"], "transformer") | small),
        vae=flux_vae(),
        text_encoder=encoder,
        tokenizer=words,
        scheduler=published.flow_scheduler(published.SCHEDULERS["chroma"]),
    )


def glm_tokenizer() -> PreTrainedTokenizerFast:
    special = ["<|endoftext|>", "[gMASK]", "<sop>"]
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocab, merges = _learned(CAPTIONS * 20, pre_tokenizers.ByteLevel.alphabet(), special, splitter=splitter)
    learned = Tokenizer(BPE(vocab, merges))
    learned.pre_tokenizer, learned.decoder = splitter, decoders.ByteLevel()
    learned.post_processor = processors.TemplateProcessing(
        single="[gMASK] <sop> $A", special_tokens=[(token, vocab[token]) for token in special[1:]]
    )
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=learned, pad_token=end, eos_token=end, padding_side="left")


def cogview4() -> CogView4Pipeline:
    small = {
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "text_embed_dim": 16,
        "time_embed_dim": 16,
        "condition_dim": 8,
        "sample_size": 16,
        "rope_axes_dim": (16, 16),
    }
    words = glm_tokenizer()
    glm = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": len(words),
        "pad_token_id": words.pad_token_id,
    }
    hub = published.HUB["cogview4"]
    vae = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 32,
    }
    transformer = CogView4Transformer2DModel(**published.settings(hub, "transformer") | small)
    for block in transformer.transformer_blocks:
        block.attn1.to_out[0].weight.data *= 8  # or its few tokens of text would hardly matter
    return CogView4Pipeline(
        transformer=transformer,
        vae=AutoencoderKL(**published.settings(hub, "vae") | vae),
        text_encoder=GlmModel(GlmConfig(**published.settings(hub, "text_encoder") | glm)),
        tokenizer=words,
        scheduler=published.flow_scheduler(published.SCHEDULERS["cogview4"]),
    )
