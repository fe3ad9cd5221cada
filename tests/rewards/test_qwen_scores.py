"""Soft-TIFA, PromptEcho and Q-Eval-Score against the likelihoods of one unpadded forward pass per question."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import gmean
from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen2VLImageProcessorPil

from diffalign.rewards import get_reward
from diffalign.rewards.base import RewardUnavailable
from diffalign.rewards.prompt_echo import QUESTION
from diffalign.rewards.q_eval import LEVELS
from diffalign.rewards.soft_tifa import read_questions, spellings
from diffalign.rewards.support.prompts import published_template
from tests.rewards.test_qwen import IMAGES, KINDS, PROMPTS, pictures

ASKED = [
    [["How many dogs are in the image?", "two"], ["Are the dogs brown?", "Yes"]],
    [["Is there a cat?", "Yes"]],
    [["How many cats are in the image?", "eleven"], ["Is it day?", "Yes"], ["Is it night?", "Yes"]],
]
METADATA = [{"vqa_list": pairs} for pairs in ASKED]
SIZES = {"min_pixels": 56 * 56, "max_pixels": 112 * 112}


class Published:
    """The network in float64, asked one question about one picture at a time."""

    def __init__(self, folder, **sizes):
        self.model = AutoModelForImageTextToText.from_pretrained(folder).double().eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(folder, **sizes)

    @torch.no_grad()
    def logits(self, picture, text, answer=""):
        """Of all positions, the answer's included, and the answer's ids."""
        seen = self.processor(picture, return_tensors="pt")
        turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        chat = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        count = int(seen["image_grid_thw"].prod()) // self.processor.merge_size**2
        own = self.tokenizer(answer).input_ids if answer else []
        ids = torch.tensor([self.tokenizer(chat.replace("<|image_pad|>", "<|image_pad|>" * count)).input_ids + own])
        found = self.model(
            input_ids=ids,
            pixel_values=seen["pixel_values"].double(),
            image_grid_thw=seen["image_grid_thw"],
            mm_token_type_ids=(ids == self.model.config.image_token_id).int(),
        ).logits[0]
        return found, own


def exact(name, folder, **options):
    return get_reward(name, path=str(folder), precision="fp64", **options)


@pytest.mark.parametrize("kind", KINDS)
def test_soft_tifa_is_the_published_mean_of_summed_probabilities(kind, qwen_folders):
    published = Published(qwen_folders[kind])
    expected = []
    for picture, pairs in zip(pictures(), ASKED, strict=True):
        found = []
        for question, answer in pairs:
            p = published.logits(picture, f"{question} Answer in one word.")[0][-1].softmax(-1)
            first = {published.tokenizer.encode(text)[0] for text in spellings(question, answer)}
            found.append(sum(p[token].item() for token in first))
        expected.append(found)
    for batch_size in (16, 2):
        scores, extras = exact("soft_tifa", qwen_folders[kind], batch_size=batch_size)(IMAGES, PROMPTS, METADATA)
        np.testing.assert_allclose(scores, [np.mean(found) for found in expected], rtol=1e-4)
        np.testing.assert_allclose(extras["gm"], [gmean(found) for found in expected], rtol=1e-4)
    geometric, extras = exact("soft_tifa_gm", qwen_folders[kind])(IMAGES, PROMPTS, METADATA)
    assert torch.equal(geometric, extras["gm"])


def test_spellings_are_the_published_lists():
    assert spellings("Is it red?", "Yes") == ("Yes", "yes", " yes", " Yes")
    assert spellings("How many cats are in the image?", "two") == ("two", "Two", " two", " Two", "2", " 2")
    assert spellings("How many cats are in the image?", "ten")[4:] == ("10", " 10")
    assert spellings("How many cats are in the image?", "eleven")[4:] == ("other", " other")


@pytest.mark.parametrize("value", [None, [], "text", [["one"]], [["q", 1]], [["", "Yes"]], {"q": "a"}])
def test_metadata_without_questions_is_said(value):
    with pytest.raises(ValueError, match=r"metadata of 'a red circle': vqa_list is .*; write pairs such as") as caught:
        read_questions("a red circle", {} if value is None else {"vqa_list": value})
    assert len(str(caught.value)) < 500


def test_the_gradient_of_the_geometric_mean_survives_an_answer_without_probability(qwen_folders):
    images = IMAGES[:1].clone().requires_grad_()
    scores, _ = exact("soft_tifa_gm", qwen_folders["qwen3_vl"])(images, PROMPTS[:1], METADATA[:1])
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_echo_is_minus_the_cross_entropy_of_the_prompt(kind, qwen_folders):
    published, prompts = Published(qwen_folders[kind]), ["a red circle", "two", "squares {and} <image>"]
    expected = []
    for picture, prompt in zip(pictures(), prompts, strict=True):
        logits, own = published.logits(picture, QUESTION, prompt)
        losses = [-logits[-len(own) - 1 + i].log_softmax(-1)[token].item() for i, token in enumerate(own)]
        expected.append(-np.mean(losses))
    found = exact("prompt_echo", qwen_folders[kind])(IMAGES, prompts, [{}] * 3)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    with_empty = exact("prompt_echo", qwen_folders[kind])(IMAGES, ["two", "", "two"], [{}] * 3)
    assert with_empty.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("task", ["alignment", "quality"])
def test_q_eval_is_the_published_expectation_over_five_levels(task, qwen_folders):
    folder = qwen_folders["qwen2_vl"]
    area = 28 * 28
    published = Published(folder, min_pixels=4 * area, max_pixels=16384 * area)
    expected = []
    for picture, prompt in zip(pictures(), PROMPTS, strict=True):
        text = published_template(f"q_eval_{task}").replace("{prompt}", prompt)
        last = published.logits(picture, text)[0][-1].numpy()
        table = {level: last[published.tokenizer(level).input_ids[0]] for level in LEVELS}
        logits = np.array([table[level] for level in ("Excellent", "Good", "Fair", "Poor", "Bad")])
        expected.append(np.exp(logits) / np.exp(logits).sum() @ np.array([1, 0.75, 0.5, 0.25, 0]))
    found = exact(f"q_eval_{task}", folder)(IMAGES, PROMPTS, [{}] * 3)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_questions_are_published_word_for_word():
    for name in ("q_eval_alignment", "q_eval_quality"):
        text = published_template(name)
        assert text.startswith("<image>Suppose you are an expert in evaluating the ")
        assert text.endswith('For this image, the text prompt is "{prompt}". Now please rate this image:')


@pytest.mark.parametrize("name", ["soft_tifa", "prompt_echo", "q_eval_quality", "vqascore_qwen3"])
def test_networks_that_lack_a_weight_or_are_cut_are_refused(name, qwen_folders, tmp_path):
    shutil.copytree(qwen_folders["qwen3_vl"], tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    lost = next(key for key in tensors if key.endswith("mlp.down_proj.weight"))
    save_file({key: tensor for key, tensor in tensors.items() if key != lost}, file, metadata={"format": "pt"})
    reward = get_reward(name, path=str(tmp_path))
    with pytest.raises(RewardUnavailable, match=r"does not fit Qwen3VL.*missing_keys.*down_proj") as caught:
        reward(IMAGES.float(), PROMPTS, METADATA)
    assert len(str(caught.value)) < 2000
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(RewardUnavailable, match="cannot be loaded"):
        reward(IMAGES.float(), PROMPTS, METADATA)
