"""Prompts from files of every format, from the hub's layouts, and from sets by one word."""

import json
from pathlib import Path

import pytest
from datasets import Dataset

from diffalign.cli import main
from diffalign.data.prompt_sets import CLASSES, COLORS, SETS, generate, held_out, is_official
from diffalign.data.prompt_source import HUB, LISTED, OWN, parse_source
from diffalign.data.prompts import count_prompts, load_prompts, prompt_source
from diffalign.preflight import prompts_problem
from diffalign.rewards.geneval_spec import read_spec
from diffalign.rewards.ocr import target_of
from diffalign.structures import Prompt
from tests.hub_stand_in import LAYOUTS, stand_in

ROWS = [
    {"caption": "a cat, asleep", "tag": "x", "score": "7"},
    {"caption": "None", "tag": "y", "score": "8"},
    {"caption": "a cat, asleep", "tag": "z", "score": "9"},
]
TEXTS = [row["caption"] for row in ROWS]


def write(folder, suffix, rows=ROWS):
    path = folder / f"rows{suffix}"
    if suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif suffix == ".csv":
        lines = [",".join(rows[0]), *(",".join(f'"{cell}"' for cell in row.values()) for row in rows)]
        path.write_text("\r\n".join(lines) + "\r\n")
    else:
        path.write_text(json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def hub(tmp_path, monkeypatch):
    return stand_in(tmp_path, monkeypatch)


# Files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl", ".json"])
def test_tables_of_every_format_mean_the_same(tmp_path, suffix):
    path = write(tmp_path, suffix)
    assert load_prompts(f"{path}?column=caption") == [
        Prompt(row["caption"], {"tag": row["tag"], "score": row["score"]}) for row in ROWS
    ]
    found = load_prompts(f"{path}?column=caption&metadata=tag&unique=true&limit=2")
    assert found == [Prompt("a cat, asleep", {"tag": "x"}), Prompt("None", {"tag": "y"})]
    assert [p.metadata for p in load_prompts(f"{path}?column=caption&metadata=")] == [{}, {}, {}]
    with pytest.raises(ValueError, match=r"no prose among caption, tag, score|no \"prose\" among"):
        load_prompts(f"{path}?column=prose")
    with pytest.raises(ValueError, match="no tga among tag, score; name others as metadata"):
        load_prompts(f"{path}?column=caption&metadata=tga")


def test_structured_metadata_survive_csv_and_parquet(tmp_path):
    spec = {"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}]}
    (tmp_path / "a.csv").write_text(
        "prompt,tag,include\na red circle,colors," + '"' + json.dumps(spec["include"]).replace('"', '""') + '"\n'
    )
    Dataset.from_list([{"prompt": "a red circle", **spec}]).to_parquet(tmp_path / "a.parquet")
    for name in ("a.csv", "a.parquet"):
        assert load_prompts(tmp_path / name) == [Prompt("a red circle", spec)]


def test_pictures_of_a_table_are_no_metadata(tmp_path):
    Dataset.from_list([{"prompt": "a cat", "jpg_0": b"\xff\xd8", "n": 1}]).to_parquet(tmp_path / "a.parquet")
    assert load_prompts(tmp_path / "a.parquet") == [Prompt("a cat", {"n": 1})]


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl", ".json"])
def test_check_reads_every_format(tmp_path, suffix, capsys):
    path = write(tmp_path, suffix, [*ROWS, {"caption": " ", "tag": "", "score": ""}])
    assert main(["check", f"{path}?column=caption", "--prompts"]) == 1
    said = capsys.readouterr().out
    assert "3 prompts, 2 different" in said
    assert "empty_prompt: 1" in said
    assert "repeated: 1" in said


# Names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("genevl", "did you mean geneval"),
        ("p.txt?column=a", "column is not read of a text file; write limit, unique"),
        ("geneval?column=a", "column is not read of a generated set; write split, seed, limit|split, seed, limit"),
        ("geneval?split=dev", "no split 'dev'|no split dev"),
        ("drawbench?column=x", "write limit, revision, streaming"),
        ("owner/name?limit=0", "limit must be a whole number; write limit=500"),
        ("owner/name?limit", "has no value"),
        ("owner/name?limit=1&limit=2", "given twice"),
        ("owner/name?streaming=yes", "streaming is true or false"),
        ("owner/name?file=a.json&split=test", "leave out split"),
        ("owner/name?colum=a", "colum is not read of a hub data set; write split"),
    ],
)
def test_a_wrong_name_is_refused_before_anything_loads(source, message):
    with pytest.raises(ValueError, match=message):
        parse_source(source)
    assert list(prompts_problem("train_prompts", Path(source), None))


def test_a_file_whose_name_has_a_question_mark_is_that_file(tmp_path):
    (tmp_path / "a?limit=1.txt").write_text("a\nb\n")
    assert len(load_prompts(tmp_path / "a?limit=1.txt")) == 2


def test_a_missing_file_with_options_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv: check the path"):
        load_prompts(tmp_path / "nowhere.csv?column=a")


# The hub ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", ["true", "false"])
def test_a_hub_data_set_is_read_by_split_column_and_limit(hub, streaming):
    hub("owner/name", ROWS)
    hub("owner/name", ROWS[:2], split="test")
    options = f"column=caption&metadata=tag&streaming={streaming}"
    assert [p.text for p in load_prompts(f"owner/name?{options}")] == TEXTS
    assert len(load_prompts(f"owner/name?split=test&{options}")) == 2
    assert load_prompts(f"owner/name?{options}&limit=1") == [Prompt("a cat, asleep", {"tag": "x"})]


def test_a_file_of_a_hub_data_set_is_read_alone(hub):
    hub("owner/name", files={"more/a.json": ["one", "two"], "b.json": [{"prompt": "three", "n": 1}]})
    assert [p.text for p in load_prompts("owner/name?file=more/a.json,b.json")] == ["one", "two", "three"]
    with pytest.raises(ValueError, match=r"c\.json of owner/name cannot be read"):
        load_prompts("owner/name?file=c.json")


@pytest.mark.parametrize("name", [name for name in LISTED if LISTED[name].splits is not OWN])
def test_every_listed_set_is_read_in_its_layout(hub, name):
    hub(LISTED[name].source, **LAYOUTS[name])
    found = {split: load_prompts(f"{name}?split={split}") for split in LISTED[name].splits}
    texts = [p.text for prompts in found.values() for p in prompts]
    assert len(texts) == len(set(texts))
    if name == "pickapic":
        assert len(texts) == 200
        assert 5 < len(found["test"]) < 40


@pytest.mark.parametrize("name", LISTED)
def test_every_listed_set_says_source_and_licence(name):
    assert LISTED[name].source
    assert LISTED[name].licence
    assert parse_source(name).kind == HUB or name in SETS


def test_prompts_on_the_hub_are_counted_without_them_where_that_is_known():
    assert count_prompts("drawbench") == 200
    assert count_prompts("pickapic?split=test&limit=64") == 64
    assert count_prompts(None) == 0


# Generated sets ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETS)
def test_a_generated_set_repeats_itself_and_its_splits_never_meet(name):
    train, test, other = (dict(generate(name, *of)) for of in (("train", 0), ("test", 0), ("test", 7)))
    assert train == dict(generate(name, "train", 0))
    assert train
    assert test
    assert not train.keys() & {*test, *other}
    assert "" not in train
    assert len(load_prompts(f"{name}?split=test&seed=7&limit=5")) == 5


@pytest.mark.parametrize("name", ["geneval", "counting", "spatial"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_prompts_of_objects_are_geneval_s_format_without_its_own_prompts(name, split):
    drawn = list(generate(name, split, 0))
    assert not [text for text, _ in drawn if is_official(text)]
    for text, metadata in drawn:
        assert read_spec(metadata, CLASSES, COLORS)["include"]
        assert all(entry["class"] in text for entry in metadata["include"])
    tags = {metadata["tag"] for _, metadata in drawn}
    six = {"single_object", "two_object", "counting", "colors", "position", "color_attr"}
    assert tags == {"geneval": six, "counting": {"counting"}, "spatial": {"position"}}[name]


@pytest.mark.parametrize(
    "text",
    [
        "a photo of a bench",
        "a photo of two backpacks",
        "a photo of a purple potted plant",
        "a photo of a bird below a skateboard",
        "a photo of a parking meter and a teddy bear",
        "a photo of a purple tennis racket and a black sink",
    ],
)
def test_prompts_that_geneval_tests_are_known(text):
    assert is_official(text)
    assert not is_official(text + "s")


def test_there_are_eighty_classes():
    assert len(set(CLASSES)) == 80
    assert all(is_official(f"a photo of {'an' if name[0] in 'aeiou' else 'a'} {name}") for name in CLASSES)


def test_prompts_of_words_quote_what_the_ocr_reward_looks_for():
    for text, metadata in generate("ocr", "test", 0):
        assert target_of(text, {}) == target_of(text, metadata)


def test_check_names_sets_by_one_word(capsys):
    assert main(["check", "geneval?split=test"]) == 0
    assert "500 prompts, 500 different" in capsys.readouterr().out


def test_prompt_source_asks_for_the_file_alone(tmp_path):
    assert prompt_source("owner/name").path is None
    with pytest.raises(FileNotFoundError):
        prompt_source(tmp_path / "a.txt")


@pytest.mark.parametrize("option", [["--split", "test"], ["--streaming", "true"], ["--subset", "a"]])
def test_check_refuses_options_that_prompts_do_not_read(option, capsys):
    assert main(["check", "geneval", *option]) == 2
    assert f"{option[0][2:]}: not read of prompts" in capsys.readouterr().err


def test_a_scene_is_on_one_side_whichever_object_is_named_first():
    for a in CLASSES:
        assert held_out(f"a {a} left of a bowl") == held_out(f"a bowl right of a {a}")
        assert held_out(f"a {a} and a bowl") == held_out(f"a bowl and a {a}")
