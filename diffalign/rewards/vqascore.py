"""VQAScore (arXiv 2404.01291): probability of the answer "Yes" to the question whether the image shows the text.

The paper's model, CLIP-FlanT5, projects patches of CLIP ViT-L/14-336 through two linear layers into the input sequence
of a FlanT5 encoder. Checkpoints: ``zhiqiulin/clip-flant5-xxl`` (the paper's) and ``-xl``.
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
# Input tokens, the image counting as one; truncation of a long prompt also removes the end of the question.
MAX_TOKENS = 2048
# The published padding colour is the processor's mean, rounded down to 8 bits.
PAD = (int(255 * CLIP_MEAN[0]) / 255, int(255 * CLIP_MEAN[1]) / 255, int(255 * CLIP_MEAN[2]) / 255)


class ClipT5Config(T5Config):  # type: ignore[misc]  # transformers is not followed, so its classes are Any
    """T5's configuration, plus the CLIP model: ``mm_vision_tower`` and ``mm_vision_select_layer``."""

    model_type = "clip_t5"


class ClipT5(T5ForConditionalGeneration):  # type: ignore[misc]  # likewise
    """T5 with image patches in its encoder input."""

    config_class = ClipT5Config
    # A duplicate of the shared token embedding.
    _keys_to_ignore_on_load_unexpected = (r"^embed_tokens\.weight$",)

    def __init__(self, config: ClipT5Config, vision: Any) -> None:
        super().__init__(config)
        self.vision_tower = CLIPVisionModel(vision)
        width = config.d_model
        self.mm_projector = nn.Sequential(nn.Linear(vision.hidden_size, width), nn.GELU(), nn.Linear(width, width))

    def patches(self, pixels: Tensor) -> Tensor:
        """Embed images (B, 3, S, S): (B, patches, d_model), of the second-to-last layer, without the class token."""
        hidden = self.vision_tower(pixel_values=pixels, output_hidden_states=True).hidden_states
        return self.mm_projector(hidden[self.config.mm_vision_select_layer][:, 1:])

    def answer(self, images: Tensor, before: Tensor, questions: Sequence[Tensor], answer: Tensor) -> Tensor:
        """Compute teacher-forced log-probabilities of an answer.

        Args:
            images: patch embeddings (B, patches, d_model).
            before: token ids before the image, shared by all rows.
            questions: token ids after the image, one tensor per row.
            answer: token ids, (tokens,) shared by all rows, or (B, tokens).

        Returns:
            (B, answer tokens, vocabulary).
        """
        padded = pad_sequence(list(questions), batch_first=True, padding_value=self.config.pad_token_id)
        lengths = torch.tensor([len(q) for q in questions], device=padded.device)
        front = self.shared(before)[None].expand(len(images), -1, -1)
        embeddings = torch.cat([front, images, self.shared(padded)], 1)

        mask = torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
        mask = torch.cat([mask.new_ones(len(images), front.shape[1] + images.shape[1]), mask], 1)
        target = self._shift_right(answer.expand(len(images), -1))
        logits = self(inputs_embeds=embeddings, attention_mask=mask, decoder_input_ids=target, use_cache=False).logits
        return at_least_float32(logits).log_softmax(-1)


def build(path: str | None, config: ClipT5Config, vision: Any, **source: Any) -> ClipT5:
    """Build the network from weights at ``path``, or from a ``state_dict`` in ``source``.

    Raises ValueError if weights are missing, unexpected or of another shape.
    """
    model, report = ClipT5.from_pretrained(
        path,
        config=config,
        vision=vision,
        output_loading_info=True,
        # The published names nest the CLIP model in a second vision_tower.
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
    """Truncate the language-model head to ``count`` tokens, as the published code does when it loads the model.

    FlanT5's head has 32,128 rows for a vocabulary of 32,100 tokens; the softmax would include the surplus rows.
    """
    head = model.lm_head
    if head.out_features > count:
        head.weight = nn.Parameter(head.weight.detach()[:count].clone())
        head.out_features = count


def yes_eos(log_probs: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """exp(mean log p) over the answer's tokens including end-of-sequence, as published."""
    return log_probs.gather(-1, yes[None, :, None].expand(len(log_probs), -1, 1)).mean((1, 2)).exp()


def yes(log_probs: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Probability of the answer's first token."""
    return log_probs[:, 0, yes[0]].exp()


def yes_no(log_probs: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Probability of the answer's first token, normalized over "Yes" and "No"."""
    return torch.sigmoid(log_probs[:, 0, yes[0]] - log_probs[:, 0, no[0]])


ANSWERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"yes_eos": yes_eos, "yes": yes, "yes_no": yes_no}


@dataclass(frozen=True)
class VqaScore:
    """Probability, in [0, 1], that the image shows the prompt.

    Departure from the published code: it converts the weights to bfloat16 and computes under autocast, which keeps
    softmax, norms and the loss in float32; this computes in the precision of ``weights`` (bfloat16 by default), except
    for the answer's log-softmax.

    Args:
        name: under which scores are stored.
        weights: of CLIP-FlanT5.
        tokenizer: folder, or hub id with or without @revision; None for that of the weights.
        answer: maps the answer's likelihood to a score, a key of ``ANSWERS``.
        question: with one ``{}`` for the prompt.
        quantize: round pixels to 8 bits; None: unless a gradient is required.
        tower: folder, or hub id with or without @revision, of CLIP's configuration; None for the one that the weights
            contain or name.
        differentiable: True.
        range: lowest and highest score.
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
        """Check the answer and the question."""
        if self.answer not in ANSWERS:
            raise ValueError(f"reward {self.name!r}: answer must be one of {', '.join(ANSWERS)}, got {self.answer!r}")
        check_question(self.name, self.question)

    @on_images()
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """Score images (B, 3, H, W), float, [0, 1]: (B,), float32 or wider, on their device."""
        model, tokenizer = load_once(_load, self.weights, self.tokenizer or self.weights.spec, self.tower)
        quantize = should_quantize(self.quantize, images)
        step = Preprocess(goal=model.vision_tower.config.image_size, fit=stretch, pad=PAD)

        def ids(text: str) -> Tensor:
            return torch.tensor(tokenizer(text).input_ids, device=images.device)

        with on_device(model, self.weights, images.device):
            patches = model.patches(step(images, quantize=quantize).to(model.dtype))
            before = ids(BEFORE)
            after = MAX_TOKENS - len(before) - 1
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
    """Build the published models, or one of the same layout at ``path``."""
    return VqaScore(name, Weights(path, revision, precision, offload), tokenizer, answer, question, quantize, tower)
