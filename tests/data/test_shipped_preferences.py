"""The embedded preference data: Pick-a-Pic's columns, and labels that the verifier confirms."""

import pyarrow.parquet as parquet
import pytest
import torch
from torchvision.transforms.functional import pil_to_tensor

from diffalign.data.config import PreferenceDataConfig
from diffalign.data.pairs import load_pairs
from diffalign.shapes import judge_batch
from diffalign.shapes.captions import TAGS, is_held_out, phrase, specs
from tests.conftest import ROOT

FILE = ROOT / "assets/preferences/shapes.parquet"
SPECS = {phrase(spec): spec for tag in TAGS for spec in specs(tag)}


def spec_of(text):
    """The specification behind a caption, whose opening is cut off."""
    words = text.split()
    return next(SPECS[tail] for i in range(len(words)) if (tail := " ".join(words[i:])) in SPECS)


@pytest.fixture(scope="module")
def pairs():
    return load_pairs(FILE, settings=PreferenceDataConfig(ties="soft", scan=100))


def test_columns_are_pick_a_pics():
    columns = set(parquet.read_schema(FILE).names)
    assert {"jpg_0", "jpg_1", "label_0", "label_1", "caption", "has_label", "best_image_uid", "ranking_id"} <= columns


def test_there_are_pairs_ties_and_no_held_out_caption(pairs):
    labels = torch.tensor([pairs[i].label for i in range(len(pairs))])
    assert len(pairs) == 2400
    assert set(labels.tolist()) == {0.0, 0.5, 1.0}
    assert 0.45 < (labels == 1).float().mean() < 0.55
    for number in range(0, 2400, 7):
        text = pairs[number].prompt.text
        spec = spec_of(text)
        assert not is_held_out(spec, text.removesuffix(phrase(spec)))


def test_the_verifier_agrees_with_the_labels(pairs):
    for number in range(0, 2400, 60):
        pair, images = pairs.load(number)
        pixels = torch.stack([pil_to_tensor(image) for image in images]).float() / 255
        first, second = (v.score + v.strict for v in judge_batch(pixels, [spec_of(pair.prompt.text)] * 2))
        assert pair.label == 0.5 + 0.5 * ((first > second) - (first < second))
