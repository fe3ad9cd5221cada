"""VQAScore against a literal transcription of the paper's recipe, one image at a time."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, T5Config
from transformers import T5ForConditionalGeneration as T5

from diffalign.rewards import get_reward
from diffalign.rewards.vqascore import ClipT5, vqascore

PROMPTS = ["a red circle", "two squares and a triangle of any colour", ""]
IMAGES = torch.randint(0, 256, (3, 3, 45, 61), generator=torch.Generator().manual_seed(0)).double() / 255
CHAT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    'and polite answers to the user\'s questions. USER: <image>\nDoes this figure show "{}"? Please answer yes or no. '
    "ASSISTANT: "
)


def square(picture, colour):
    width, height = picture.size
    side = max(width, height)
    canvas = Image.new("RGB", (side, side), colour)
    canvas.paste(picture, ((side - width) // 2, (side - height) // 2))
    return canvas


@torch.no_grad()
def published(folder):
    """log p of the two tokens "Yes" and end, and of "No" first, per image."""
    tensors = load_file(folder / "model.safetensors")
    tower = CLIPVisionModel(CLIPVisionConfig.from_pretrained(folder / "vision_tower")).double().eval()
    prefix = "vision_tower.vision_tower.vision_model."
    tower.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    config = T5Config(**json.loads((folder / "config.json").read_text()) | {"model_type": "t5"})
    t5 = T5(config).double().eval()
    t5.lm_head.weight = torch.nn.Parameter(t5.lm_head.weight.clone())
    rest = {k: v for k, v in tensors.items() if not k.startswith(("vision_tower", "mm_projector"))}
    assert set(t5.load_state_dict(rest, strict=False).missing_keys) == {
        "encoder.embed_tokens.weight",
        "decoder.embed_tokens.weight",
    }
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    result = []
    for image, prompt in zip(IMAGES, PROMPTS, strict=True):
        picture = Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy())
        picture = square(picture, tuple(int(255 * m) for m in processor.image_mean))
        hidden = tower(processor(picture, return_tensors="pt")["pixel_values"].double(), output_hidden_states=True)
        patches = hidden.hidden_states[-2][0, 1:]
        for layer, after in ((0, F.gelu), (2, lambda x: x)):
            weight, bias = (tensors[f"mm_projector.{layer}.{part}"].double() for part in ("weight", "bias"))
            patches = after(patches @ weight.T + bias)
        front, back = (torch.tensor(tokenizer(chunk).input_ids) for chunk in CHAT.format(prompt).split("<image>"))
        assert front[-1] == back[-1] == tokenizer.eos_token_id
        words = torch.cat([t5.shared(front), patches, t5.shared(back)])[None]
        labels = torch.tensor([tokenizer("Yes").input_ids])
        log_probs = t5(inputs_embeds=words, labels=labels).logits[0].log_softmax(-1)
        no = tokenizer("No").input_ids[0]
        result.append([*log_probs[range(labels.shape[1]), labels[0]].tolist(), log_probs[0, no].item()])
    return np.array(result)


def reward(folder, **options):
    return vqascore("vqascore", str(folder), precision="fp64", **options)


def test_the_three_forms_of_the_score(clip_t5_folder):
    likelihood = published(clip_t5_folder)
    yes, no = np.exp(likelihood[:, 0]), np.exp(likelihood[:, -1])
    expected = {"yes_eos": np.exp(likelihood[:, :-1].mean(1)), "yes": yes, "yes_no": yes / (yes + no)}
    assert expected["yes"].std() > 0
    for answer, values in expected.items():
        found = reward(clip_t5_folder, answer=answer)(IMAGES, PROMPTS, [{}] * 3)
        np.testing.assert_allclose(found, values, rtol=1e-6, err_msg=answer)


def padded(folder, target, rows=28):
    """The same network with rows in its embedding and its head that stand for no word, as FlanT5 is published."""
    shutil.copytree(folder, target)
    tensors, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    for name in ("shared.weight", "lm_head.weight"):
        more = torch.randn(rows, tensors[name].shape[1], generator=generator)
        tensors[name] = torch.cat([tensors[name], more])
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + rows}))
    return target


@pytest.mark.parametrize("answer", ["yes_eos", "yes", "yes_no"])
def test_rows_of_the_head_that_are_no_words_take_no_part(clip_t5_folder, tmp_path, answer):
    """The published code cuts the head to ``len(tokenizer)`` words."""
    wide = padded(clip_t5_folder, tmp_path / "padded")
    assert len(load_file(wide / "model.safetensors")["lm_head.weight"]) == len(AutoTokenizer.from_pretrained(wide)) + 28
    expected = reward(clip_t5_folder, answer=answer)(IMAGES, PROMPTS, [{}] * 3)
    torch.testing.assert_close(reward(wide, answer=answer)(IMAGES, PROMPTS, [{}] * 3), expected, rtol=1e-6, atol=0)


def test_a_long_prompt_is_cut_where_the_published_code_cuts_it(clip_t5_folder, monkeypatch):
    """All tokens but those of the image's patches, the image itself counting as one, are at most 2048."""
    seen = []
    answer = ClipT5.answer

    def spy(self, images, before, questions, words):
        seen.append((before, questions))
        return answer(self, images, before, questions, words)

    monkeypatch.setattr(ClipT5, "answer", spy)
    prompt = "circle " * 2100
    assert reward(clip_t5_folder)(IMAGES[:1], [prompt], [{}]).isfinite().all()
    ((before, (question,)),) = seen
    tokenizer = AutoTokenizer.from_pretrained(clip_t5_folder)
    front, back = (tokenizer(chunk).input_ids for chunk in CHAT.format(prompt).split("<image>"))
    assert [*before.tolist(), -200, *question.tolist()] == [*front, -200, *back][:2048]
    assert len(front) + 1 + len(back) > 2048


def test_vqascore_computes_in_bfloat16_as_published_by_default():
    for name in ("vqascore", "vqascore_xl"):
        assert get_reward(name).weights.precision == "bf16"
        assert get_reward(name, precision="no").weights.precision == "no"
