"""Training on what a mask shows of its images."""

import io
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms.functional import pil_to_tensor

from diffalign import DiffusionDPOTrainer
from diffalign.data.config import PreferenceDataConfig
from diffalign.data.pairs import load_pairs
from tests.phases import collect

MASKED = PreferenceDataConfig(mask="mask")
WEIGHTS = "run/pytorch_lora_weights.safetensors"


def encoded(values):
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def blot(number, side=64):
    """Random blocks of 16 pixels, another half of them for each number."""
    blocks = np.random.default_rng(number).permutation(np.repeat([0, 255], (side // 16) ** 2 // 2))
    return np.kron(blocks.reshape(side // 16, -1), np.ones((16, 16))).astype(np.uint8)


@pytest.fixture
def masked(pairs, tmp_path):
    """The pairs with masks: a file of them."""

    def make(mask):
        rows = Dataset.from_parquet(str(pairs))
        file = tmp_path / "masked.parquet"
        rows.add_column("mask", [encoded(mask(i)) for i in range(len(rows))]).to_parquet(file)
        return (str(file),)

    return make


def test_masks_are_mirrored_as_their_images_are(dpo, masked):
    args = dpo(train_data=masked(blot), data=MASKED, num_pairs=12, random_flip=True, cache=False)
    trainer = DiffusionDPOTrainer(args=args)
    batch = collect(trainer, 0)
    examples, mirrored = batch.ranked, []
    h, w = examples.latents.shape[-2:]
    data = load_pairs(*args.train_data, settings=MASKED)
    rows = {data[i].prompt.text: data[i] for i in range(12)}
    for i, text in enumerate(examples.texts):
        with Image.open(io.BytesIO(rows[text].mask.read())) as image:
            pixels = pil_to_tensor(image)[0].double() / 255
        cells = pixels.reshape(h, 64 // h, w, 64 // w).mean((1, 3))
        straight, flipped = ((examples.mask[i, 0] - m).abs().max() < 1e-6 for m in (cells, cells.flip(-1)))
        assert straight != flipped
        mirrored.append(bool(flipped))
        with Image.open(io.BytesIO(rows[text].winner.read())) as image:
            image = pil_to_tensor(image.convert("RGB"))[None].float() / 255
        with torch.no_grad():
            expected = trainer.model.encode_images(image.flip(-1) if flipped else image)[0]
        torch.testing.assert_close(examples.latents[i, 0], expected, rtol=0, atol=1e-5)
    assert 0 < sum(mirrored) < 12


def test_masks_are_cropped_where_their_images_are(dpo, tmp_path):
    """Masks of 64 x 96 pixels beside images of that size: size conditioning describes the crop of each image."""
    noise = np.random.default_rng(0).integers(0, 256, (4, 3, 64, 96), dtype=np.uint8)
    pictures = [[encoded(np.repeat(grey[..., None], 3, -1)) for grey in row] for row in noise]
    rows = [dict(zip(("chosen", "rejected", "mask"), row, strict=True)) for row in pictures]
    file = tmp_path / "wide.parquet"
    Dataset.from_list([{"prompt": str(i), **row} for i, row in enumerate(rows)]).to_parquet(file)
    args = dpo(train_data=(str(file),), data=MASKED, random_crop=True)
    trainer = DiffusionDPOTrainer(args=args)
    batch = collect(trainer, 0)
    examples, lefts = batch.ranked, set()
    h, w = examples.latents.shape[-2:]
    for mask, text, sizes in zip(examples.mask, examples.texts, examples.sizes, strict=True):
        top, left = sizes[0].crop_top_left
        shown = torch.from_numpy(noise[int(text), 2, top : top + 64, left : left + 64]).double() / 255
        expected = shown.reshape(h, 64 // h, w, 64 // w).mean((1, 3))
        torch.testing.assert_close(mask[0].double(), expected, rtol=0, atol=1e-6)
        lefts.add(left)
    assert len(lefts) > 1


def test_only_what_they_show_counts(dpo, masked):
    trainer = DiffusionDPOTrainer(args=dpo(train_data=masked(blot), data=MASKED))
    batch = collect(trainer, 0)
    for side in trainer.algorithm.denoise(batch.ranked, torch.arange(4), 0)[0]:
        residual = (side.output - side.target).double().square().mean(1, keepdim=True)
        counts = batch.ranked.mask.double()
        expected = (counts * residual).sum((1, 2, 3)) / counts.sum((1, 2, 3))
        torch.testing.assert_close(side.error.double(), expected, rtol=1e-5, atol=0)
        assert (expected - residual.mean((1, 2, 3))).abs().min() > 1e-3 * expected.min()


@pytest.mark.parametrize("loss", ["dpo", pytest.param("kto", marks=pytest.mark.slow)])
def test_masks_that_show_everything_change_nothing_and_others_do(dpo, masked, tmp_path, loss):
    found = {}
    for name, mask in {"none": None, "all": lambda _: np.full((64, 64), 255, np.uint8), "some": blot}.items():
        data = {} if mask is None else {"train_data": masked(mask), "data": MASKED}
        DiffusionDPOTrainer(args=dpo(**data, loss=loss, output_dir=tmp_path / name / "run", cache=False)).train()
        found[name] = load_file(tmp_path / name / WEIGHTS)
    assert all(torch.equal(found["all"][name], found["none"][name]) for name in found["none"])
    assert any(not torch.equal(found["some"][name], found["none"][name]) for name in found["none"])


def test_a_sample_without_one_among_others_counts_everywhere(dpo, masked):
    source = DiffusionDPOTrainer(args=dpo(train_data=masked(blot), data=MASKED)).algorithm.source

    def load(place):
        pair, images = source.data.load(place)
        return (replace(pair, mask=None) if place == 1 else pair), images

    found = source.encoder([partial(load, place) for place in range(4)], 0)
    assert found.mask.shape == (4, 1, *found.latents.shape[-2:])
    assert [bool((mask == 1).all()) for mask in found.mask] == [False, True, False, False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_data": (), "rewards": {"shapes": 1.0}}, r"data\.mask.*: read only offline, .* leave"),
        ({"losers": "reference"}, r"data\.mask: the model's own images have no masks: leave it out"),
    ],
)
def test_images_that_the_model_draws_have_none(dpo, changes, message):
    with pytest.raises(ValueError, match=message):
        dpo(**changes, data=MASKED).validate()
