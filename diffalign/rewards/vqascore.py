"""VQAScore (arXiv 2404.01291): how likely a model that sees the image is to answer "Yes" to whether it shows the text.

The paper's model, CLIP-FlanT5: patches of CLIP ViT-L/14-336, through two linear layers, take the place of the image in
the words of a FlanT5 encoder. Checkpoints: ``zhiqiulin/clip-flant5-xxl`` (the paper's) and ``-xl``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoTokenizer, CLIPVisionModel, T5Config, T5ForConditionalGeneration

from diffalign.rewards.base import Metadata, RewardCard, register
from diffalign.rewards.support.preprocess import (
    CLIP_MEAN,
    Preprocess,
    at_least_float32,
    on_images,
    should_quantize,
    stretch,
)
from diffalign.rewards.support.prompts import check_question
from diffalign.rewards.support.weights import Weights, check_report, frozen, load_once, on_device, pinned

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
QUESTION = 'Does this figure show "{}"? Please answer yes or no.'
BEFORE, AFTER = SYSTEM + " USER: ", "\n{} ASSISTANT: "
# Tokens that are read, the image counting as one; a longer prompt is cut, and its question's end with it.
LONGEST = 2048
# Padding takes the colour that the processor's mean has in 8 bits.
PAD = tuple(int(255 * mean) / 255 for mean in CLIP_MEAN)


class ClipT5Config(T5Config):
    """T5's, and which CLIP model stands in front: ``mm_vision_tower`` and ``mm_vision_select_layer``."""

    model_type = "clip_t5"


class ClipT5(T5ForConditionalGeneration):
    """T5 that reads an image among its words."""

    config_class = ClipT5Config
    # The encoder's words under a further name.
    _keys_to_ignore_on_load_unexpected = (r"^embed_tokens\.weight$",)

    def __init__(self, config: ClipT5Config, vision: Any) -> None:
        super().__init__(config)
        self.vision_tower = CLIPVisionModel(vision)
        width = config.d_model
        self.mm_projector = nn.Sequential(nn.Linear(vision.hidden_size, width), nn.GELU(), nn.Linear(width, width))

    def patches(self, pixels: Tensor) -> Tensor:
        """Images (B, 3, S, S) as (B, patches, d_model): the last layer but one, without the class token."""
        hidden = self.vision_tower(pixel_values=pixels, output_hidden_states=True).hidden_states
        return self.mm_projector(hidden[self.config.mm_vision_select_layer][:, 1:])

    def answer(self, images: Tensor, before: Tensor, questions: Sequence[Tensor], answer: Tensor) -> Tensor:
        """Log-probabilities (B, answer tokens, vocabulary), teacher-forced, of images (B, patches, d_model).

        before: token ids in front of the image, the same for all. questions: ids behind it, one row per image. answer:
        ids, (tokens,) for all or (B, tokens).
        """
        padded = pad_sequence(list(questions), batch_first=True, padding_value=self.config.pad_token_id)
        lengths = torch.tensor([len(q) for q in questions], device=padded.device)
        front = self.shared(before)[None].expand(len(images), -1, -1)
        embeddings = torch.cat([front, images, self.shared(padded)], 1)
        mask = torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
        mask = torch.cat([mask.new_ones(len(images), front.shape[1] + images.shape[1]), mask], 1)
        given = self._shift_right(answer.expand(len(images), -1))
        logits = self(inputs_embeds=embeddings, attention_mask=mask, decoder_input_ids=given, use_cache=False).logits
        return at_least_float32(logits).log_softmax(-1)


def build(path: str | None, config: ClipT5Config, vision: Any, **source: Any) -> ClipT5:
    """The network of published weights: those at ``path``, or of a ``state_dict``.

    ValueError: weights are missing, too many, or of another shape.
    """
    model, report = ClipT5.from_pretrained(
        path,
        config=config,
        vision=vision,
        output_loading_info=True,
        # The published file keeps CLIP's model inside a tower inside the model.
        key_mapping={r"^vision_tower\.vision_tower\.vision_model\.": "vision_tower."},
        **source,
    )
    check_report(report, str(path), "CLIP-FlanT5")
    return model


def _load(weights: Weights, tokenizer: str, tower: str | None) -> tuple[ClipT5, Any]:
    config = ClipT5Config.from_pretrained(weights.path, revision=weights.revision)
    inside = Path(weights.path) / config.mm_vision_tower
    vision = AutoConfig.from_pretrained(
        **pinned(tower or str(inside if inside.is_dir() else config.mm_vision_tower)), trust_remote_code=False
    )
    model = build(weights.path, config, getattr(vision, "vision_config", vision), revision=weights.revision)
    words = AutoTokenizer.from_pretrained(**pinned(tokenizer), trust_remote_code=False)
    _cut_head(model, len(words))
    return frozen(model, weights), words


def _cut_head(model: ClipT5, count: int) -> None:
    """Drop the rows of the words' head that stand for no word, as the published code does when it loads the model.

    FlanT5's head has 32,128 rows for the 32,100 words of its tokenizer; the others would take part in the softmax.
    """
    head = model.lm_head
    if head.out_features > count:
        head.weight = nn.Parameter(head.weight.detach()[:count].clone())
        head.out_features = count


def yes_eos(log_probs: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """exp of the mean log-likelihood of the answer's tokens, end-of-sequence included: as published."""
    return log_probs.gather(-1, yes[None, :, None].expand(len(log_probs), -1, 1)).mean((1, 2)).exp()


def yes(log_probs: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """The probability of the answer's first token."""
    return log_probs[:, 0, yes[0]].exp()


def yes_no(log_probs: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """That probability, among "Yes" and "No" alone."""
    return torch.sigmoid(log_probs[:, 0, yes[0]] - log_probs[:, 0, no[0]])


ANSWERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"yes_eos": yes_eos, "yes": yes, "yes_no": yes_no}


@dataclass(frozen=True)
class VqaScore:
    """The probability, in [0, 1], that the image shows what the prompt says.

    answer: how the answer's likelihood becomes a score, a key of ``ANSWERS``. question: with one ``{}`` for the prompt.
    tokenizer, tower: folder, or hub id with or without @revision, of the tokenizer, and of CLIP's configuration; None
    for what the weights bring or name.

    Departure from the published code: it converts the weights to bfloat16 and computes under autocast, which keeps
    softmax, norms and the loss in float32; here all is in the precision of ``weights`` (bfloat16 unless said otherwise)
    but the answer's log-softmax.
    """

    name: str
    weights: Weights
    tokenizer: str | None = None
    answer: str = "yes_eos"
    question: str = QUESTION
    quantize: bool | None = None
    tower: str | None = None
    differentiable: bool = True
    range: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        """ValueError for an unknown answer, or a question without a place for the prompt."""
        if self.answer not in ANSWERS:
            raise ValueError(f"reward {self.name!r}: answer must be one of {', '.join(ANSWERS)}, got {self.answer!r}")
        check_question(self.name, self.question)

    @on_images()
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """Images (B, 3, H, W), float, [0, 1]: (B,), float32 or wider, on their device."""
        model, tokenizer = load_once(_load, self.weights, self.tokenizer or self.weights.spec, self.tower)
        quantize = should_quantize(self.quantize, images)
        step = Preprocess(goal=model.vision_tower.config.image_size, fit=stretch, pad=PAD)

        def ids(text: str) -> Tensor:
            return torch.tensor(tokenizer(text).input_ids, device=images.device)

        with on_device(model, self.weights, images.device):
            patches = model.patches(step(images, quantize=quantize).to(model.dtype))
            before = ids(BEFORE)
            after = LONGEST - len(before) - 1
            questions = [ids(AFTER.format(self.question.format(prompt)))[:after] for prompt in prompts]
            log_probs = model.answer(patches, before, questions, ids("Yes"))
            return ANSWERS[self.answer](log_probs, ids("Yes"), ids("No"))


PAPER = "arXiv 2404.01291"
XXL = RewardCard("whether the image shows the text", 0.05, PAPER, "zhiqiulin/clip-flant5-xxl", "Apache-2.0", 11460)
XL = RewardCard("whether the image shows the text", 0.05, PAPER, "zhiqiulin/clip-flant5-xl", "Apache-2.0", 3160)


@register("vqascore", XXL, path=XXL.weights, tokenizer="google/flan-t5-xxl")
@register("vqascore_xl", XL, path=XL.weights, tokenizer="google/flan-t5-xl")
def vqascore(
    name: str,
    path: str,
    tokenizer: str | None = None,
    answer: str = "yes_eos",
    question: str = QUESTION,
    revision: str | None = None,
    precision: str = "bf16",
    offload: bool = False,
    quantize: bool | None = None,
    tower: str | None = None,
) -> VqaScore:
    """The published models, or the same layout under ``path``."""
    return VqaScore(name, Weights(path, revision, precision, offload), tokenizer, answer, question, quantize, tower)
