"""Every known layout, read through the loaders of ``datasets``, gives the same pairs."""

import json
import pickle
import shutil

import datasets
import pytest
from datasets import Dataset

from diffalign.data import tables
from diffalign.data.config import PreferenceDataConfig
from diffalign.data.formats import FORMATS, UNPAIRED, detect
from diffalign.data.pairs import load_pairs
from diffalign.structures import ImageSource, Pair, Prompt
from tests.data.preference_files import captions, encoded, image_table, jsonl, pick_a_pic, pick_row, picture


def labels(data):
    return [data[i].label for i in range(len(data))]


def reads(pair, first, second):
    """Whether its images are these, by their numbers."""
    return [source.read() for source in pair.images] == [encoded(first), encoded(second)]


@pytest.fixture
def files(tmp_path):
    """Images 0 to 9 as files in ``pics``."""
    (tmp_path / "pics").mkdir()
    for number in range(10):
        (tmp_path / f"pics/{number}.jpg").write_bytes(encoded(number))
    return tmp_path


def test_pick_a_pic_has_bytes_ties_and_rows_without_a_label(tmp_path):
    rows = [pick_row(0, 1), pick_row(1, 0), pick_row(2, 0.5), pick_row(3, None, has_label=False), pick_row(4, 1)]
    path = pick_a_pic(tmp_path / "pick.parquet", rows)
    data = load_pairs(path)
    assert captions(data) == ["caption 0", "caption 1", "caption 4"]
    assert labels(data) == [1, 0, 1]
    assert reads(data[1], 2, 3)
    assert data.quarantine.skipped == {"ties": 1, "unlabelled": 1}
    assert [source.identity for source in data[0].images] == ["uid-0", "uid-1"]
    soft = load_pairs(path, settings=PreferenceDataConfig(ties="soft"))
    assert labels(soft) == [1, 0, 0.5, 1]
    with pytest.raises(ValueError, match=r"pick\.parquet, row 2: a tie; set ties to drop or soft"):
        load_pairs(path, settings=PreferenceDataConfig(ties="error"))


def test_a_pair_has_a_winner_and_a_mirror_image():
    images = (ImageSource("a", b"a"), ImageSource("b", b"b"))
    pair = Pair("k", Prompt("p"), images, 0.25)
    assert (pair.winner, pair.loser, pair.tie) == (images[1], images[0], False)
    assert pair.winner_first() == Pair("k", Prompt("p"), images[::-1], 0.75)
    assert pair.swap().swap() == pair
    even = Pair("k", Prompt("p"), images, 0.5)
    assert even.tie
    assert even.winner is images[0]
    assert pair.images[0].read() == b"a"
    with pytest.raises(ValueError, match="no image"):
        ImageSource("c", None).read()


def test_hpdv2_train_has_two_images_and_test_has_ranks(files):
    train = [
        {"human_preference": [1, 0], "prompt": "a", "file_path": ["pics/0.jpg", "pics/1.jpg"]},
        {"human_preference": [0, 1], "prompt": "b", "file_path": ["pics/2.jpg", "pics/3.jpg"]},
    ]
    (files / "train.json").write_text(json.dumps(train))
    data = load_pairs(files / "train.json")
    assert labels(data) == [1, 0]
    assert reads(data[1], 2, 3)
    ranked = {
        "prompt": "c",
        "image_path": ["0.jpg", "1.jpg", "2.jpg"],
        "rank": [2, 0, 1],
        "raw_annotations": [{"annotation": [2, 0, 1], "user_hash": 5}],
    }
    (files / "test.json").write_text(json.dumps([ranked]))
    data = load_pairs(files / "test.json", settings=PreferenceDataConfig(image_root=files / "pics"))
    assert labels(data) == [0, 0, 1], "(0, 1), (0, 2), (1, 2), where rank 0 is the best"
    assert reads(data[2], 1, 2)
    assert data[2].key.endswith("test.json, row 0, pair 2")
    bad = [*train * 100, {"human_preference": [1, 1], "prompt": "d", "file_path": ["pics/2.jpg", "pics/3.jpg"]}]
    bad += [{"human_preference": [1, 0], "prompt": "d", "file_path": ["pics/2.jpg"]}]
    (files / "bad.json").write_text(json.dumps(bad))
    with pytest.warns(UserWarning, match="bad_label: 1"):
        found = load_pairs(files / "bad.json").quarantine.found
    assert list(found["bad_label"].values()) == ["[1, 1] is not [1, 0] or [0, 1]"]
    assert list(found["bad_row"].values()) == ["1 images for 2 ranks"]


def test_hpdv3_prefers_its_first_path_by_the_larger_part_of_the_votes(files):
    rows = [
        {"prompt": "a", "path1": "pics/0.jpg", "path2": "pics/1.jpg", "choice_dist": [3, 9], "confidence": 0.9},
        {"prompt": "b", "path1": "pics/2.jpg", "path2": "pics/3.jpg", "choice_dist": None, "confidence": None},
    ]
    rows = [{**row, "model1": "x", "model2": "y"} for row in rows]
    (files / "all.json").write_text(json.dumps(rows))
    data = load_pairs(files / "all.json")
    assert labels(data) == [0.75, 1]
    assert reads(data[0], 0, 1)


def test_open_image_preferences_has_chosen_and_rejected_image_features(tmp_path):
    rows = [
        {"chosen": {"bytes": encoded(2 * i), "path": None}, "rejected": {"bytes": encoded(2 * i + 1), "path": None}}
        | {"prompt": f"prompt {i}"}
        for i in range(3)
    ]
    data = load_pairs(image_table(tmp_path / "train-00000-of-00001.parquet", rows, ("chosen", "rejected")))
    assert captions(data) == ["prompt 0", "prompt 1", "prompt 2"]
    assert labels(data) == [1, 1, 1]
    assert reads(data[2], 4, 5)
    assert data.load(2)[1][0].tobytes() != data.load(2)[1][1].tobytes()


def test_the_same_pairs_come_from_every_kind_of_file_and_folder(files):
    rows = [
        {"image_0": f"pics/{2 * i}.jpg", "image_1": f"pics/{2 * i + 1}.jpg", "label": i / 4, "prompt": f"p{i}"}
        for i in (0, 1, 3, 4)
    ]
    table = Dataset.from_list(rows)
    table.to_parquet(files / "a.parquet")
    table.to_csv(files / "a.csv")
    jsonl(files / "a.jsonl", rows)
    table.save_to_disk(files / "saved")
    table.save_to_disk(files / "arrows")
    shutil.copy(next((files / "arrows").glob("*.arrow")), files / "a.arrow")
    shutil.copytree(files / "pics", files / "loaded/pics")
    shutil.copy(files / "a.jsonl", files / "loaded/train.jsonl")
    sources = [files / name for name in ("a.parquet", "a.csv", "a.jsonl", "a.arrow", "saved", "loaded")]
    for source in sources:
        settings = PreferenceDataConfig(image_root=files) if source.name == "saved" else PreferenceDataConfig()
        data = load_pairs(source, settings=settings)
        assert labels(data) == [0, 0.25, 0.75, 1], source
        assert captions(data) == ["p0", "p1", "p3", "p4"], source
        assert reads(data[2], 6, 7), source
    both = load_pairs(files / "a.csv", files / "a.jsonl")
    assert captions(both) == ["p0", "p1", "p3", "p4"] * 2
    with pytest.raises(IndexError, match="pair 8 of 8"):
        both[8]
    assert both[-1] == both[7]


def test_metadata_reach_the_prompt(files):
    scene = {"tag": "colors", "include": [{"class": "circle", "count": 1}]}
    rows = [{"chosen": "pics/0.jpg", "rejected": "pics/1.jpg", "text": " a red circle ", "metadata": scene}]
    rows += [{"chosen": "pics/0.jpg", "rejected": "pics/1.jpg", "text": "b", "metadata": {"count": 2}}]
    data = load_pairs(jsonl(files / "a.jsonl", rows))
    assert data[0].prompt == Prompt("a red circle", scene)
    assert data[1].prompt == Prompt("b", {"count": 2})
    written = [{**row, "metadata": json.dumps(row["metadata"])} for row in rows]
    assert load_pairs(jsonl(files / "b.jsonl", written))[0].prompt == Prompt("a red circle", scene)


def test_splits_of_a_folder_are_read_separately(tmp_path):
    (tmp_path / "data").mkdir()
    pick_a_pic(tmp_path / "data/train-00000-of-00001.parquet", [pick_row(0)])
    pick_a_pic(tmp_path / "data/validation-00000-of-00001.parquet", [pick_row(1)])
    assert captions(load_pairs(tmp_path)) == ["caption 0"]
    assert captions(load_pairs(tmp_path, settings=PreferenceDataConfig(split="validation"))) == ["caption 1"]
    with pytest.raises(ValueError, match=r"cannot be read: .*test"):
        load_pairs(tmp_path, settings=PreferenceDataConfig(split="test"))


def test_a_hub_id_is_loaded_with_its_split_subset_and_revision(tmp_path, monkeypatch):
    asked = []

    def loads(*args, **options):
        asked.append((args, options))
        return Dataset.from_list([pick_row(0)])

    monkeypatch.setattr(datasets, "load_dataset", loads)
    settings = PreferenceDataConfig(split="validation_unique", subset="small", revision="abc")
    assert captions(load_pairs("yuvalkirstain/pickapic_v2", settings=settings)) == ["caption 0"]
    wanted = {"split": "validation_unique", "name": "small", "revision": "abc", "streaming": False}
    assert asked == [(("yuvalkirstain/pickapic_v2",), wanted)]


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        ("jpg_0 jpg_1 label_0 caption has_label", "pick_a_pic"),
        ("prompt image_path rank raw_annotations", "hpdv2"),
        ("prompt file_path human_preference", "hpdv2"),
        ("prompt path1 path2 choice_dist confidence model1 model2", "hpdv3"),
        ("prompt chosen rejected", "chosen_rejected"),
        ("text image_0 image_1 label", "pairs"),
        ("image caption liked", "liked"),
        ("file_name caption split", "liked"),
    ],
)
def test_columns_tell_the_format(columns, name):
    known = {**FORMATS, **UNPAIRED}
    assert detect(columns.split(), "auto", known, "here") is known[name]
    assert detect(columns.split(), name, known, "here") is known[name]


@pytest.mark.parametrize(
    ("columns", "asked", "message"),
    [
        ("chosen rejected prompt path1 path2", "auto", "here: its columns fit hpdv3 and chosen_rejected; choose one"),
        ("jpg_0 jpg_1 caption", "auto", "here: columns jpg_0, jpg_1, caption fit no format .*pick_a_pic lacks label_0"),
        ("jpg_0 jpg_1 label_0", "pick_a_pic", "needs the column prompt or caption or text; there are jpg_0, jpg_1"),
        ("chosen rejected", "hpdv4", "unknown format 'hpdv4'; known: auto, pick_a_pic"),
    ],
)
def test_an_ambiguous_format_is_an_error_that_helps(columns, asked, message):
    with pytest.raises(ValueError, match=message):
        detect(columns.split(), asked, FORMATS, "here")
    if asked == "auto" and "fit hpdv3" in message:
        assert detect(columns.split(), "hpdv3", FORMATS, "here") is FORMATS["hpdv3"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.parquet", r"no preference data at nowhere\.parquet: check the path"),
        ("./nowhere", r"no preference data at \./nowhere"),
        ("notes.txt", r"notes\.txt: unknown suffix '\.txt'; known: \.parquet, \.arrow"),
        ("broken.parquet", r"broken\.parquet.* cannot be read"),
        ("empty.jsonl", r"empty\.jsonl holds no row"),
        ("headed.csv", r"headed\.csv holds no row"),
    ],
)
def test_a_source_that_cannot_be_opened_is_named(source, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("notes.txt", "broken.parquet"):
        (tmp_path / name).write_text("no data")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "headed.csv").write_text("chosen,rejected,prompt\n")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_pairs(source)
    with pytest.raises(ValueError, match="name at least one source"):
        load_pairs()


def test_rows_are_scanned_without_reading_an_image(tmp_path, monkeypatch):
    path = pick_a_pic(tmp_path / "pick.parquet", [pick_row(i) for i in range(4)])
    read = []
    real = tables.Table._cell
    monkeypatch.setattr(tables.Table, "_cell", lambda self, *cell: read.append(cell) or real(self, *cell))
    data = load_pairs(path, settings=PreferenceDataConfig(scan=0))
    assert (len(data), data[3].label, read) == (4, 1, [])
    assert data[3].images[1].read() == encoded(7)
    assert read == [(3, "jpg_1")]
    assert data.load(0)[1][0].size == picture(0).size


def test_data_travel_to_worker_processes(tmp_path):
    path = pick_a_pic(tmp_path / "pick.parquet", [pick_row(i) for i in range(4)])
    again = pickle.loads(pickle.dumps(load_pairs(path)))
    assert captions(again) == [f"caption {i}" for i in range(4)]
    assert reads(again[3], 6, 7)
