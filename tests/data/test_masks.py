"""Masks beside preference data: one for all images of a row."""

import pytest
from datasets import Dataset

from diffalign.data.config import PreferenceDataConfig
from diffalign.data.images import decode
from diffalign.data.pairs import load_pairs
from diffalign.data.stream import stream_pairs
from diffalign.data.unpaired import load_labelled
from diffalign.data.validation import DataWarning
from tests.data.preference_files import encoded, image_table, jsonl, picture

MASKED = PreferenceDataConfig(mask="region", max_bad_share=1.0)


def row(number, **changes):
    images = {"chosen": encoded(2 * number), "rejected": encoded(2 * number + 1)}
    return {"prompt": f"caption {number}", **images, "region": encoded(100 + number, kind="PNG"), **changes}


@pytest.fixture
def table(tmp_path):
    return lambda rows: image_table(tmp_path / "pairs.parquet", rows, ("chosen", "rejected", "region"))


@pytest.mark.parametrize("load", [load_pairs, load_labelled])
def test_a_mask_comes_with_every_image_of_its_row(table, load):
    data = load(table([row(0), row(1)]), settings=MASKED)
    assert len(data) == (2 if load is load_pairs else 4)
    for i in range(len(data)):
        sample, _ = data.load(i)
        number = int(sample.prompt.text.split()[1])
        assert decode(sample.mask).tobytes() == picture(100 + number).tobytes()


def test_a_stream_has_them_too(table):
    pair = next(stream_pairs(table([row(0), row(1)]), settings=MASKED).once())
    assert pair.mask.read() == encoded(100, kind="PNG")


def test_paths_begin_where_those_of_images_do(tmp_path):
    for name, content in row(0).items():
        if name != "prompt":
            (tmp_path / name).write_bytes(content)
    source = jsonl(tmp_path / "pairs.jsonl", [{name: name for name in row(0)}])
    assert load_pairs(source, settings=MASKED)[0].mask.content == tmp_path / "region"


def test_who_asks_for_none_gets_none(table):
    assert load_pairs(table([row(0)]), settings=PreferenceDataConfig())[0].mask is None


@pytest.mark.parametrize(
    "load", [load_pairs, load_labelled, lambda *s, settings: list(stream_pairs(*s, settings=settings).once())]
)
def test_a_column_that_is_not_there_is_named(tmp_path, load):
    source = tmp_path / "pairs.parquet"
    Dataset.from_list([{name: value for name, value in row(0).items() if name != "region"}]).to_parquet(source)
    with pytest.raises(ValueError, match=r"pairs\.parquet has no column 'region' of masks: name one of prompt, chosen"):
        load(source, settings=MASKED)


@pytest.mark.parametrize(
    ("mask", "why"),
    [
        (encoded(7, (10, 10), "PNG"), "a mask of 10 x 10 for images of 24 x 20 and 24 x 20"),
        (b"no image", "region: not an image"),
        (None, "region: .*"),
    ],
)
def test_one_that_does_not_fit_is_named_and_its_pair_left_out(table, mask, why):
    source = table([row(0), row(1, region=mask), row(2)])
    with pytest.warns(DataWarning, match=rf"(?s)bad_mask: 1 .*row 1: {why}"):
        data = load_pairs(source, settings=MASKED)
    assert [data.load(i)[0].prompt.text for i in range(3)] == ["caption 0", "caption 2", "caption 2"]
