"""Answers as preference data."""

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as parquet
import pytest

from diffalign.commands.label.export import digest_images, export
from diffalign.data.config import PreferenceDataConfig
from diffalign.data.pairs import load_pairs
from diffalign.structures import Prompt
from tests.commands.label.world import BLUE, RED, answer, comparison

CHOICES = ("first", "second", "equal", "bad", "skip")
PAIRS = [replace(comparison(i), prompt=Prompt(f"prompt {i}", {"tag": "x", "n": i})) for i in range(5)]


def answered(**more):
    return [answer(i, choice, content=digest_images(PAIRS[i]), **more) for i, choice in enumerate(CHOICES)]


def test_training_reads_the_table_with_ties_as_soft_labels(tmp_path):
    made = export(tmp_path / "p.parquet", PAIRS, answered(), "tie")
    assert (made.rows, made.ties, made.lines()) == (4, 2, ["1 answers left out: skipped"])
    data = load_pairs(tmp_path / "p.parquet", settings=PreferenceDataConfig(ties="soft"))
    assert [data[i].label for i in range(4)] == [1, 0, 0.5, 0.5]
    assert [data[i].prompt for i in range(4)] == [pair.prompt for pair in PAIRS[:4]]
    assert [image.read() for image in data[0].images] == [RED, BLUE]
    assert len(load_pairs(tmp_path / "p.parquet")) == 2  # by default ties are dropped


def test_it_has_the_columns_of_pick_a_pic(tmp_path):
    export(tmp_path / "p.parquet", PAIRS, answered(), "tie")
    found = parquet.read_table(tmp_path / "p.parquet")
    shipped = parquet.read_table("assets/preferences/shapes.parquet")
    assert set(shipped.schema.names) - set(found.schema.names) == {"image_0_url", "image_1_url"}
    rows = found.to_pylist()
    assert [row["label_1"] for row in rows] == [0, 1, 0.5, 0.5]
    assert [row["best_image_uid"] for row in rows] == [*digest_images(PAIRS[0]), "tie", "tie"]
    assert {(row["user_id"], row["model_0"], row["model_1"]) for row in rows} == {("Ada", "base", "tuned")}
    assert [row["answer"] for row in rows] == list(CHOICES[:4])


def test_the_source_of_an_edit_is_in_the_table(tmp_path, monkeypatch):
    """So that training finds it wherever the table lies."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "elsewhere" / "source.png"
    source.parent.mkdir()
    source.write_bytes(BLUE)
    pairs = [replace(pair, prompt=Prompt(pair.prompt.text, {"image": str(source), "n": 1})) for pair in PAIRS]
    export(tmp_path / "p.parquet", pairs, answered(), "tie")
    source.unlink()
    found = load_pairs(tmp_path / "p.parquet")
    assert [Path(pair.prompt.metadata["image"]).read_bytes() for pair in found] == [BLUE] * 2
    assert [pair.prompt.metadata["n"] for pair in found] == [1, 1]


def test_both_bad_may_be_left_out(tmp_path):
    made = export(tmp_path / "p.parquet", PAIRS, answered(), "drop")
    assert (made.rows, made.ties, dict(made.unused)) == (3, 1, {"skipped": 1, "both bad": 1})


def test_each_rater_has_a_row(tmp_path):
    made = export(tmp_path / "p.parquet", PAIRS, answered() + answered(rater="Bob"), "tie")
    assert made.rows == 8
    assert len(load_pairs(tmp_path / "p.parquet", settings=PreferenceDataConfig(ties="soft"))) == 8


def test_two_spellings_of_a_name_are_one_rater_as_on_the_page(tmp_path):
    """A reward for several raters would learn a mixture for each spelling."""
    answers = [
        replace(one, rater=name) for one, name in zip(answered(), ("Ada", "ada", "ADA", "Zoë", "Ada"), strict=True)
    ]
    export(tmp_path / "p.parquet", PAIRS, answers, "tie")
    assert parquet.read_table(tmp_path / "p.parquet").column("user_id").to_pylist() == ["Ada", "Ada", "Ada", "Zoë"]


@pytest.mark.parametrize(
    ("pairs", "reason"),
    [([comparison(0, images=(BLUE, RED))], "the images or the text changed since"),
     ([replace(comparison(0), prompt=Prompt("another"))], "the images or the text changed since"),
     ([comparison(9)], "their pairs are not among the sources of this command"),
     ([comparison(0, images=(None, RED))], "an image can no longer be read")],
)  # fmt: skip
def test_an_answer_about_other_images_is_not_used(tmp_path, pairs, reason):
    (tmp_path / "p.parquet").write_text("an earlier table")
    made = export(tmp_path / "p.parquet", pairs, answered()[:1], "tie")
    assert (made.rows, made.lines()) == (0, [f"1 answers left out: {reason}"])
    assert (tmp_path / "p.parquet").read_text() == "an earlier table"
