"""Rewards that are built on CLIP: ICT, HP and F-CLIPScore against literal transcriptions."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from diffalign.rewards.f_clipscore import TEMPLATE, f_clipscore, words_of
from diffalign.rewards.ict_hp import HEAD_FILE, HP_FILE, ICT_FILE, IctHpReward, ict_hp
from diffalign.rewards.support.preprocess import CLIP_MEAN, CLIP_STD

PROMPTS = ["a red circle, two squares.", "two squares", "blue triangle left of a red square", ""]
IMAGES = torch.randint(0, 256, (4, 3, 45, 61), generator=torch.Generator().manual_seed(0)).double() / 255


def pixels(by_torchvision=False):
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pictures = [Image.fromarray((i.permute(1, 2, 0) * 255).round().byte().numpy()) for i in IMAGES]
    if by_torchvision:
        steps = [v2.Resize(32, v2.InterpolationMode.BICUBIC), v2.CenterCrop(32), v2.PILToTensor()]
        recipe = v2.Compose([*steps, v2.ToDtype(torch.float64, scale=True), v2.Normalize(CLIP_MEAN, CLIP_STD)])
        return [recipe(picture)[None] for picture in pictures]
    return [processor(picture, return_tensors="pt")["pixel_values"].double() for picture in pictures]


@torch.no_grad()
def published_ict_hp(clip_folder, folders):
    models = {}
    for name, file in (("ict", ICT_FILE), ("hp", HP_FILE)):
        models[name] = CLIPModel.from_pretrained(clip_folder).double().eval()
        models[name].load_state_dict(torch.load(f"{folders[name]}/{file}"), strict=False)
    head = {name: tensor.double().numpy() for name, tensor in torch.load(f"{folders['hp']}/{HEAD_FILE}").items()}
    tokenizer = AutoTokenizer.from_pretrained(clip_folder)
    ict, hp = [], []
    for image, prompt in zip(pixels(), PROMPTS, strict=True):
        seen = models["ict"].get_image_features(image).pooler_output[0].numpy()
        tokens = tokenizer(prompt, truncation=True, max_length=16, return_tensors="pt")
        read = models["ict"].get_text_features(**tokens).pooler_output[0].numpy()
        ict.append(seen @ read / np.linalg.norm(seen) / np.linalg.norm(read))
        hidden = models["hp"].get_image_features(image).pooler_output[0].numpy()
        for layer in (0, 2, 4, 6, 7):
            hidden = head[f"layers.{layer}.weight"] @ hidden + head[f"layers.{layer}.bias"]
        hp.append(1 / (1 + np.exp(-hidden[0])))
    return np.array(ict), np.array(hp)


def test_ict_hp_and_their_product_are_the_published_formulas(clip_folder, ict_hp_folders):
    ict, hp = published_ict_hp(clip_folder, ict_hp_folders)
    options = {"clip": str(clip_folder), "precision": "fp64"}
    for parts, expected in ((("ict",), ict), (("hp",), hp), (("ict", "hp"), ict * hp)):
        folders = {name: ict_hp_folders[name] if name in parts else None for name in ("ict", "hp")}
        found = ict_hp("mine", **folders, **options)(IMAGES, PROMPTS, [{}] * 4)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7, err_msg=str(parts))
    with pytest.raises(ValueError, match="give the weights of ict, of hp, or of both"):
        IctHpReward("mine", None, None)


def published_attributions(folder, image, prompt):
    """(mean attribution per token, cosine): gradients by finite differences of each attention."""
    model = CLIPModel.from_pretrained(folder, attn_implementation="eager").double().eval()
    tokens = AutoTokenizer.from_pretrained(folder)(
        TEMPLATE + prompt, truncation=True, max_length=16, return_tensors="pt"
    )
    with torch.no_grad():
        seen = model.get_image_features(image).pooler_output[0]
        seen = seen / seen.norm()
    layers = model.text_model.encoder.layers[-3:]
    change = {}

    def attention(number):
        def forward(hidden_states, attention_mask=None, **options):
            own = layers[number].self_attn
            shape = (*hidden_states.shape[:-1], -1, own.head_dim)
            q, k, v = (p(hidden_states).view(shape).transpose(1, 2) for p in (own.q_proj, own.k_proj, own.v_proj))
            scores = q @ k.transpose(2, 3) * own.head_dim**-0.5
            length = scores.shape[-1]
            scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
            weights = scores.softmax(-1)
            change.setdefault("attention", {})[number] = weights
            weights = weights + change.get(number, 0)
            out = (weights @ v).transpose(1, 2).reshape(*hidden_states.shape[:-1], -1)
            return own.out_proj(out), weights

        return forward

    for number in range(len(layers)):
        layers[number].self_attn.forward = attention(number)

    @torch.no_grad()
    def cosine():
        read = model.get_text_features(**tokens).pooler_output[0]
        return (read @ seen / read.norm()).item()

    base = cosine()
    attentions = dict(change["attention"])
    length = tokens.input_ids.shape[1]
    total = np.zeros(length)
    for number, own in attentions.items():
        for token in range(length):
            for head in range(own.shape[1]):
                nudge = torch.zeros_like(own)
                nudge[0, head, -1, token] = 1e-6
                change[number] = nudge
                up = cosine()
                change[number] = -nudge
                slope = (up - cosine()) / 2e-6
                del change[number]
                total[token] += slope * own[0, head, -1, token].item() / own.shape[1] / len(attentions)
    return total, base


def test_f_clipscore_is_the_published_formula(clip_folder):
    found, extras = f_clipscore("f", str(clip_folder), precision="fp64")(IMAGES, PROMPTS, [{}] * 4)
    tokenizer = AutoTokenizer.from_pretrained(clip_folder)
    expected, worst = [], []
    for image, prompt in zip(pixels(by_torchvision=True), PROMPTS, strict=True):
        tokens, cosine = published_attributions(clip_folder, image, prompt)
        words = [tokens[places].mean() for places in words_of(tokenizer, prompt, 16)]
        expected.append(sum(word for word in words if word < -5e-5) * (1 - max(cosine, 0)))
        worst.append(min(words, default=0.0))
    assert min(expected) < -1e-4, "words that are missing are found"
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-8)
    np.testing.assert_allclose(extras["worst"], worst, rtol=1e-3, atol=1e-8)


def test_words_are_those_between_spaces_full_stops_and_commas(clip_folder):
    tokenizer = AutoTokenizer.from_pretrained(clip_folder)
    ids = tokenizer(TEMPLATE + PROMPTS[0]).input_ids
    words = words_of(tokenizer, PROMPTS[0], 77)
    texts = [tokenizer.decode([ids[place] for place in places]).strip() for places in words]
    assert texts == ["a", "red", "circle", "two", "squares"]
    assert words_of(tokenizer, "", 77) == []
    assert len(words_of(tokenizer, "a " * 50, 16)) < 16, "what is cut off is no word"


def test_f_clipscore_is_the_same_in_inference_mode(clip_folder):
    reward = f_clipscore("f", str(clip_folder))
    with torch.inference_mode():  # which loads the network too
        found, _ = reward(IMAGES.float(), PROMPTS, [{}] * 4)
    torch.testing.assert_close(found.clone(), reward(IMAGES.float(), PROMPTS, [{}] * 4)[0])


def test_f_clipscore_has_a_gradient(clip_folder):
    reward = f_clipscore("f", str(clip_folder), precision="fp64")
    images = (IMAGES[:2] * 0.6 + 0.2).requires_grad_()
    values, _ = reward(images, PROMPTS[:2], [{}] * 2)
    (gradient,) = torch.autograd.grad(values.sum(), images)
    direction, step = gradient / gradient.abs().max(), 1e-6
    smooth = f_clipscore("f", str(clip_folder), precision="fp64", quantize=False)
    up, down = (smooth(images.detach() + s * step * direction, PROMPTS[:2], [{}] * 2)[0] for s in (1, -1))
    expected = ((up - down).sum() / (2 * step)).item()
    assert (gradient * direction).sum().item() == pytest.approx(expected, rel=1e-3)
    assert not up.requires_grad
