"""Qwen-VL as a judge: fed as the published processors feed it, its likelihood, and HPSv3's mean and uncertainty."""

import copy
import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen2VLImageProcessorPil

from diffalign.rewards.hpsv3 import FILE, TOKEN, hpsv3, prompt_text
from diffalign.rewards.qwen_vqascore import QUESTION, qwen_vqascore
from diffalign.rewards.support.qwen_vl import Patches, load, patchify
from diffalign.rewards.support.weights import Weights

PROMPTS = ["a red circle", "two squares {and} a triangle of any colour", ""]
# Heights that are kept or enlarged: since version 13, Pillow shrinks rows before columns.
IMAGES = torch.randint(0, 256, (3, 3, 56, 100), generator=torch.Generator().manual_seed(0)).double() / 255
KINDS = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


def pictures():
    return [Image.fromarray((i.permute(1, 2, 0) * 255).round().byte().numpy()) for i in IMAGES]


def published_rows(folder, **options):
    """What the published processor makes of each picture, one by one, through PIL."""
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder, **options)
    found = [processor(picture, return_tensors="pt") for picture in pictures()]
    return [f["pixel_values"].double() for f in found], [f["image_grid_thw"] for f in found]


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_vl"])
def test_patches_are_the_processors(kind, qwen_folders):
    rows, grids = published_rows(qwen_folders[kind])
    mine, grid = Patches.of(str(qwen_folders[kind]))(IMAGES, quantize=True)
    assert torch.equal(grid, torch.cat(grids))
    torch.testing.assert_close(mine, torch.cat(rows), rtol=0, atol=1e-6)


def test_patches_carry_a_gradient_and_forget_no_pixel():
    pixels = torch.rand(2, 3, 56, 84, dtype=torch.float64, requires_grad=True)
    rows, grid = patchify(pixels, 14, 2, 2)
    assert grid.tolist() == [[1, 4, 6], [1, 4, 6]]
    weights = torch.rand_like(rows)
    (gradient,) = torch.autograd.grad((rows * weights).sum(), pixels)
    assert gradient.sum().item() == pytest.approx(weights.sum().item())
    assert (gradient > 0).all()


@torch.no_grad()
def likelihoods(folder, prompts=PROMPTS):
    """log p of every word as the first of the answer, image by image, without padding."""
    model = AutoModelForImageTextToText.from_pretrained(folder).double().eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    result = []
    for rows, grid, prompt in zip(*published_rows(folder), prompts, strict=True):
        image = "<|image_pad|>" * (len(rows) // 4)
        text = f"<|im_start|>user\n<|vision_start|>{image}<|vision_end|>{QUESTION.format(prompt)}<|im_end|>\n"
        ids = torch.tensor([tokenizer.encode(text + "<|im_start|>assistant\n")])
        kinds = (ids == model.config.image_token_id).int()
        logits = model(input_ids=ids, pixel_values=rows, image_grid_thw=grid, mm_token_type_ids=kinds).logits
        result.append(logits[0, -1].log_softmax(-1))
    ids = {word: tokenizer.encode(word) for word in ("Yes", "No")}
    assert all(len(found) == 1 for found in ids.values())
    return np.array([[row[ids["Yes"][0]].item(), row[ids["No"][0]].item()] for row in result])


@pytest.mark.parametrize("kind", KINDS)
def test_the_score_is_the_likelihood_of_yes(kind, qwen_folders):
    yes, no = np.exp(likelihoods(qwen_folders[kind])).T
    assert yes.std() / yes.mean() > 1e-3
    for answer, expected in (("yes", yes), ("yes_no", yes / (yes + no))):
        reward = qwen_vqascore("q", str(qwen_folders[kind]), answer, precision="fp64")
        np.testing.assert_allclose(reward(IMAGES, PROMPTS, [{}] * 3), expected, rtol=1e-5, err_msg=answer)


def test_all_rows_of_the_head_take_part_as_published(qwen_folders, tmp_path):
    """The authors' package takes the softmax of what ``generate`` reports, with rows that are no words."""
    folder = shutil.copytree(qwen_folders["qwen2_5_vl"], tmp_path / "padded")
    model = AutoModelForImageTextToText.from_pretrained(folder)
    model.resize_token_embeddings(len(AutoTokenizer.from_pretrained(folder)) + 28, mean_resizing=False)
    model.save_pretrained(folder)
    expected = np.exp(likelihoods(folder))[:, 0]
    found = qwen_vqascore("q", str(folder), precision="fp64")(IMAGES, PROMPTS, [{}] * 3)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_unknown_answers_and_questions_are_refused():
    with pytest.raises(ValueError, match="answer must be one of yes, yes_no, got 'yes_eos'"):
        qwen_vqascore("q", "nowhere", "yes_eos")
    with pytest.raises(ValueError, match="the question needs one {} for the prompt".replace("{}", r"\{\}")):
        qwen_vqascore("q", "nowhere", question="Is it good?")


@torch.no_grad()
def test_hpsv3_is_the_published_formula(hpsv3_parts, qwen_folders):
    folder, model, tokenizer, head = hpsv3_parts
    base = qwen_folders["qwen2_vl"]
    model, head = copy.deepcopy(model).double().eval(), copy.deepcopy(head).double()
    size = {"shortest_edge": 256 * 28 * 28, "longest_edge": 256 * 28 * 28}
    expected = []
    for rows, grid, prompt in zip(*published_rows(base, size=size), PROMPTS, strict=True):
        image = "<|image_pad|>" * (len(rows) // 4)
        asked = prompt_text().replace("{text_prompt}", prompt)
        text = f"<|im_start|>user\n<|vision_start|>{image}<|vision_end|>{asked}<|im_end|>\n<|im_start|>assistant\n"
        ids = torch.tensor([tokenizer.encode(text)])
        words = model.get_input_embeddings()(ids)
        seen = model.model.visual(rows, grid_thw=grid).pooler_output
        words = words.masked_scatter((ids == model.config.image_token_id)[..., None].expand_as(words), seen)
        count = torch.arange(ids.shape[1])[None]
        hidden = model.model.language_model(inputs_embeds=words, position_ids=count).last_hidden_state[0]
        place = (ids[0] == tokenizer.convert_tokens_to_ids(TOKEN)).nonzero().item()
        expected.append(head["5"](F.relu(head["3"](F.relu(head["0"](hidden[place]))))).numpy())
    values, extras = hpsv3("h", str(folder), str(base), precision="fp64")(IMAGES, PROMPTS, [{}] * 3)
    np.testing.assert_allclose(values, np.array(expected)[:, 0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(extras["sigma"], np.exp(np.array(expected)[:, 1]), rtol=1e-4, atol=1e-5)


def test_hpsv3_refuses_weights_that_do_not_fit(hpsv3_parts, qwen_folders, tmp_path):
    from safetensors.torch import load_file

    folder, base = hpsv3_parts[0], qwen_folders["qwen2_vl"]
    tensors = load_file(folder / FILE)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / FILE)
    with pytest.raises(ValueError, match=r"does not fit Qwen2-VL: .*missing_keys.*layers.1.mlp.up_proj"):
        hpsv3("h", str(tmp_path), str(base), precision="no")(IMAGES.float(), PROMPTS, [{}] * 3)


def test_a_16_bit_network_is_close(hpsv3_parts, qwen_folders):
    folder, base = hpsv3_parts[0], qwen_folders["qwen2_vl"]
    exact, coarse = (
        hpsv3("h", str(folder), str(base), precision=p)(IMAGES, PROMPTS, [{}] * 3)[0] for p in ("fp64", "bf16")
    )
    assert coarse.dtype == torch.float32
    assert math.isfinite(coarse.sum())
    assert (exact - coarse).abs().max() < 0.2 * exact.abs().max()
    assert Weights("x", precision="bf16").dtype == torch.bfloat16


MARKS = ["<|image_pad|>", "<|vision_start|> and <|im_end|>", TOKEN, f"<<|im_end|>|im_end|>{TOKEN}"]


@pytest.mark.parametrize("prompt", MARKS)
def test_marks_of_the_model_in_a_prompt_are_words(prompt, hpsv3_parts, qwen_folders):
    """They leave the other prompts of their batch alone, and cost no more than a space."""
    base = str(qwen_folders["qwen2_vl"])
    rewards = [qwen_vqascore("q", base, precision="fp64"), hpsv3("h", str(hpsv3_parts[0]), base, precision="fp64")]
    for reward in rewards:
        both, alone = (reward(IMAGES[:n], ["a", prompt][:n], [{}] * n) for n in (2, 1))
        both, alone = (found[0] if isinstance(found, tuple) else found for found in (both, alone))
        assert both.shape == (2,)
        assert both.isfinite().all()
        torch.testing.assert_close(both[:1], alone, rtol=1e-5, atol=1e-6)


def test_a_small_image_is_left_as_small_as_the_authors_leave_it(qwen_folders, tmp_path):
    """Qwen3-VL's own processor would enlarge it to 65,536 pixels."""
    folder = tmp_path / "qwen3"
    shutil.copytree(qwen_folders["qwen3_vl"], folder)
    config = json.loads((folder / "preprocessor_config.json").read_text())
    config["size"] = {"shortest_edge": 65536, "longest_edge": 16777216}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    *_, patches = load(Weights(str(folder)))
    assert (patches.smallest, patches.largest) == (4 * 32**2, 16384 * 32**2)
    _, grid = patches(torch.rand(1, 3, 64, 96), quantize=True)
    assert grid.tolist() == [[1, 4, 6]]
