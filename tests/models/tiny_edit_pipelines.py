"""Small random pipelines that edit, in the layouts of FLUX.1 Kontext and Qwen-Image-Edit, and source images."""

from __future__ import annotations

from pathlib import Path

from diffusers import FluxKontextPipeline, QwenImageEditPipeline
from PIL import Image
from tokenizers import pre_tokenizers
from transformers import Qwen2Tokenizer, Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

from tests.models import tiny_flow_pipelines as tiny

EDITING = (
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain how "
    "the user's text instruction should alter or modify the image. Generate a new image that meets the user's "
    "requirements while maintaining consistency with the original input where appropriate."
)
VISION = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def flux_kontext() -> FluxKontextPipeline:
    return FluxKontextPipeline(**{name: part for name, part in tiny.flux_dev().components.items() if part is not None})


def _words() -> Qwen2Tokenizer:
    special = ["<|im_start|>", "<|im_end|>", *VISION]
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    texts = [*tiny.CAPTIONS, *[EDITING, "system\n", "user\n", "assistant\n"] * 20]
    vocab, merges = tiny._learned(
        texts, pre_tokenizers.ByteLevel.alphabet(), ["<|endoftext|>", *special], splitter=splitter
    )
    words = Qwen2Tokenizer(vocab=vocab, merges=merges, extra_special_tokens=special)
    words.chat_template = tiny.CHAT
    return words


def qwen_image_edit() -> QwenImageEditPipeline:
    parts, words = tiny.qwen_image().components, _words()
    encoder = parts["text_encoder"]
    config = encoder.config
    for name, token in {
        "vision_start": VISION[0],
        "vision_end": VISION[1],
        "image": VISION[2],
        "video": VISION[3],
    }.items():
        setattr(config, f"{name}_token_id", words.convert_tokens_to_ids(token))
    config.text_config.vocab_size = len(words)
    encoder = type(encoder)(config)
    images = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=28 * 28 * 4)
    processor = Qwen2VLProcessor(images, words, Qwen2VLVideoProcessor(), chat_template=tiny.CHAT)
    return QwenImageEditPipeline(**{**parts, "text_encoder": encoder, "tokenizer": words}, processor=processor)


FAMILIES = {"flux_kontext": flux_kontext, "qwen_image_edit": qwen_image_edit}


def write_sources(folder: Path, size: tuple[int, int] = (16, 16)) -> list[Path]:
    """Write three images of (width, height)."""
    paths = [folder / f"{name}.png" for name in ("red", "noise", "blue")]
    for path, image in zip(
        paths,
        (Image.new("RGB", size, "red"), Image.effect_noise(size, 90).convert("RGB"), Image.new("RGB", size, "blue")),
        strict=True,
    ):
        image.save(path)
    return paths
