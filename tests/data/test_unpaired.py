"""Single images that are liked or not: tables of them, and pairs taken apart."""

import shutil
from dataclasses import replace

import pytest
from datasets import Dataset

from diffalign.data.config import PreferenceDataConfig
from diffalign.data.unpaired import load_labelled, unpair
from diffalign.data.validation import DataWarning
from diffalign.structures import ImageSource, Pair, Prompt
from tests.data.preference_files import encoded, image_table, jsonl, pick_a_pic, pick_row


def image(name):
    return ImageSource(name, name.encode(), name)


def pair(text, first, second, label):
    return Pair(f"{first}{second}", Prompt(text), (image(first), image(second)), label)


def test_an_image_that_both_won_and_lost_is_liked():
    """Image b loses before it wins, image a wins before it loses."""
    pairs = [pair("p", "a", "b", 1), pair("p", "b", "c", 1), pair("p", "f", "a", 0.8), pair("p", "d", "e", 0.5)]
    assert unpair(pairs) == {
        ("p", "a"): (0, 0, True),
        ("p", "b"): (0, 1, True),
        ("p", "c"): (1, 1, False),
        ("p", "f"): (2, 0, True),
    }
    mirrored = unpair([p.swap() for p in pairs])
    assert {name: liked for (_, name), (_, _, liked) in mirrored.items()} == {
        "a": True,
        "b": True,
        "c": False,
        "f": True,
    }


def test_the_same_image_of_another_text_is_another_sample():
    pairs = [pair("p", "a", "b", 1), pair("q", "c", "a", 1)]
    assert {key: liked for key, (_, _, liked) in unpair(pairs).items()} == {
        ("p", "a"): True,
        ("p", "b"): False,
        ("q", "c"): True,
        ("q", "a"): False,
    }


def test_the_same_result_of_another_source_is_another_sample():
    pairs = [pair("p", "a", "b", 1), pair("p", "c", "a", 1)]
    pairs = [replace(p, prompt=Prompt("p", {"image": f"{n}.png"})) for n, p in enumerate(pairs)]
    assert [liked for _, _, liked in unpair(pairs).values()] == [True, False, True, False]


def test_images_without_a_name_are_identified_by_their_bytes():
    pairs = [pair("p", "a", "b", 1), pair("p", "b", "c", 1)]
    nameless = [replace(p, images=tuple(replace(i, identity=None) for i in p.images)) for p in pairs]
    assert list(unpair(nameless).values()) == [(0, 0, True), (0, 1, True), (1, 1, False)]


def read(data):
    return [(data[i].prompt.text, data[i].image.read(), data[i].liked) for i in range(len(data))]


def test_pick_a_pic_is_taken_apart_by_its_image_ids(tmp_path):
    shared = {"caption": "c", "image_0_uid": "uid-1", "jpg_0": encoded(1)}
    rows = [pick_row(0, 1, caption="c"), pick_row(1, 1, **shared), pick_row(2, 0.5), pick_row(3, 0)]
    data = load_labelled(pick_a_pic(tmp_path / "a.parquet", rows))
    assert read(data) == [
        ("c", encoded(0), True),
        ("c", encoded(1), True),
        ("c", encoded(3), False),
        ("caption 3", encoded(6), False),
        ("caption 3", encoded(7), True),
    ]
    assert len(data.liked_indices) == 3
    assert data[1].key.endswith("a.parquet, row 0, image 1")
    assert data.load(4)[1][0].size == (24, 20)
    assert data.quarantine.skipped == {"ties": 1}
    with pytest.raises(IndexError, match="image 5 of 5"):
        data[5]


def test_tables_of_liked_images(tmp_path):
    rows = [{"image": {"bytes": encoded(i), "path": None}, "caption": f"c{i}", "liked": i % 2 == 0} for i in range(3)]
    wanted = [("c0", encoded(0), True), ("c1", encoded(1), False), ("c2", encoded(2), True)]
    assert read(load_labelled(image_table(tmp_path / "a.parquet", rows, ("image",)))) == wanted
    (tmp_path / "train").mkdir()
    for number in range(3):
        (tmp_path / f"train/{number}.jpg").write_bytes(encoded(number))
    kto = [
        {"file_name": f"train/{i}.jpg", "caption": f"c{i}", "split": split}
        for i, split in enumerate(("exclusive_win", "exclusive_lose", "intersections"))
    ]
    Dataset.from_list(kto).to_csv(tmp_path / "train_processed_v3.csv")
    assert read(load_labelled(tmp_path / "train_processed_v3.csv")) == wanted
    scored = [{"image": f"train/{i}.jpg", "text": f"c{i}", "score": 1 - i % 2} for i in range(3)]
    assert read(load_labelled(jsonl(tmp_path / "a.jsonl", scored))) == wanted
    folder = tmp_path / "folder"
    shutil.copytree(tmp_path / "train", folder / "pics")
    lines = [{"file_name": f"pics/{i}.jpg", "text": f"c{i}", "liked": 1 - i % 2} for i in range(3)]
    jsonl(folder / "metadata.jsonl", lines)
    assert read(load_labelled(folder)) == wanted


def test_bad_rows_are_named_as_in_pairs(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded(0))
    rows = [{"image": "a.jpg", "text": "c", "liked": 1} for _ in range(5)]
    rows[1] |= {"liked": 2}
    rows[2] |= {"text": " "}
    rows[3] |= {"image": "b.jpg"}
    with pytest.warns(DataWarning):
        data = load_labelled(jsonl(tmp_path / "a.jsonl", rows), settings=PreferenceDataConfig(max_bad_share=1))
    said = "\n".join(data.quarantine.lines())
    assert "row 1, liked: 2 is not one of 1, 0, exclusive_win" in said
    assert "row 2, prompt: empty" in said
    assert f"row 3: {tmp_path}/b.jpg: no such file or directory" in said
    assert data.load(1)[0].key.endswith("row 4")


def test_a_pair_without_an_image_is_left_out_before_it_is_taken_apart(tmp_path):
    rows = [pick_row(i, image_0_uid=None, image_1_uid=None) for i in range(3)]
    rows[1]["jpg_1"] = None
    with pytest.warns(DataWarning, match="row 1: no image"):
        data = load_labelled(pick_a_pic(tmp_path / "a.parquet", rows), settings=PreferenceDataConfig(max_bad_share=1))
    assert [text for text, _, _ in read(data)] == ["caption 0", "caption 0", "caption 2", "caption 2"]
