"""``diffalign check``: every kind of fault, and an exit code of 1 if training would stop."""

import json

import datasets
import pytest

from diffalign.cli import main
from diffalign.commands.check import CheckConfig, examine
from tests.data.preference_files import encoded, jsonl, pick_a_pic, pick_row


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """The copies that ``datasets`` makes of tables stay with the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def faulty(tmp_path):
    """Twelve rows: four good ones, one of them twice and once with the opposite label, and one of each fault."""
    rows = [
        pick_row(0, 1),
        pick_row(1, 1),
        pick_row(2, 0),
        pick_row(3, 1, jpg_1=encoded(99, (48, 40))),
        pick_row(4, 0.5),
        pick_row(5, None, has_label=False),
        pick_row(6, jpg_0=b"broken"),
        pick_row(7, jpg_1=encoded(14)),
        pick_row(8, caption=""),
        pick_row(9, 0.7),
        pick_row(0, 1),
        pick_row(1, 1, jpg_0=encoded(3), jpg_1=encoded(2)),
    ]
    return pick_a_pic(tmp_path / "pick.parquet", rows)


EXPECTED = {
    "rows": 12,
    "good": 6,
    "first_preferred": pytest.approx(5 / 6),
    "ties": 1,
    "unlabelled": 1,
    "soft_labels": 0,
    "prompts": 4,
    "sizes": {"24 x 20": 11, "48 x 40": 1},
}
FAULTS = {
    "bad_label": "row 9",
    "empty_caption": "row 8",
    "unreadable": "row 6",
    "same_image": "row 7",
    "different_size": "row 3",
}


@pytest.mark.parametrize("streaming", [False, True])
def test_every_error_is_counted_and_named(faulty, streaming):
    report = examine(CheckConfig(data=(str(faulty),), streaming=streaming))
    assert {key: report[key] for key in EXPECTED} == EXPECTED
    for kind, found in report["faults"].items():
        assert found["count"] == (kind in FAULTS)
        if kind in FAULTS:
            assert FAULTS[kind] in next(iter(found["samples"]))
    # Two bad rows of twelve, and two of the eight pairs whose images were read.
    assert report["bad_share"] == pytest.approx(2 / 12 + 2 / 8)
    repeated = report["repeated"]
    assert (repeated["count"], repeated["contradicting"]) == (2, 1)
    assert ["row 10" in repeated["samples"][0], "row 0 again" in repeated["samples"][0]] == [True, True]
    assert report["verdict"] == ["41.7% cannot be used, max_bad_share is 1.0%"]


def test_the_command_prints_it_and_says_1(faulty, capsys):
    assert main(["check", str(faulty)]) == 1
    printed = capsys.readouterr().out
    for line in (
        "pick.parquet: 6 good samples in 12 rows",
        "labels: the first image is preferred (or liked) in 83.3%; 1 ties, 1 unlabelled, 0 soft",
        "sizes: 24 x 20 (11), 48 x 40 (1)",
        "repeated: 2, of which 1 contradict the first",
        "unreadable: 1 (an image that is missing or cannot be decoded; drop)",
        "row 6: jpg_0: not an image",
        "a run would stop: 41.7% cannot be used",
    ):
        assert line in printed


def test_the_settings_of_a_run_decide_the_exit_code(faulty, tmp_path, capsys):
    assert main(["check", str(faulty), "--max_bad_share", "0.5"]) == 0
    assert main(["check", str(faulty), "--max_bad_share", "0.5", "--ties", "error"]) == 1
    assert "a run would stop: 1 ties, and ties is error" in capsys.readouterr().out
    assert main(["check", str(faulty), "--max_bad_share", "0.5", "--on_fault.different_size", "error"]) == 1
    assert "different_size: 1, and on_fault is error" in capsys.readouterr().out
    good = pick_a_pic(tmp_path / "good.parquet", [pick_row(i) for i in range(3)])
    assert main(["check", str(good), "--ties", "error"]) == 0
    ties = pick_a_pic(tmp_path / "ties.parquet", [pick_row(i, 0.5) for i in range(3)])
    assert main(["check", str(ties)]) == 1
    assert "a run would stop: no sample can be used" in capsys.readouterr().out
    assert main(["check", str(ties), "--ties", "soft"]) == 0


def test_json_holds_every_sample(tmp_path, capsys):
    rows = [pick_row(i, jpg_0=b"broken") if i % 2 else pick_row(i) for i in range(20)]
    path = pick_a_pic(tmp_path / "a.parquet", rows)
    assert main(["check", str(path), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert len(report["faults"]["unreadable"]["samples"]) == 10
    assert main(["check", str(path)]) == 1
    assert "... and 5 more" in capsys.readouterr().out
    assert examine(CheckConfig(data=(str(path),), scan=4))["examined"] == 4


def test_single_images_can_be_checked(faulty, tmp_path, capsys):
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(encoded(number))
    rows = [{"image": f"{i}.jpg", "text": "p", "liked": int(i == 0)} for i in (0, 1, 2, 1)]
    report = examine(CheckConfig(data=(str(jsonl(tmp_path / "a.jsonl", rows)),), unpaired=True))
    assert (report["good"], report["first_preferred"]) == (4, 0.25)
    assert (report["repeated"]["count"], report["repeated"]["contradicting"]) == (1, 0)
    apart = examine(CheckConfig(data=(str(faulty),), unpaired=True, max_bad_share=1.0))
    assert apart["verdict"] == []
    assert main(["check", str(faulty), "--unpaired", "--streaming"]) == 2
    assert "single images cannot be streamed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name at least one source of preference pairs"),
        (["nowhere.parquet"], "no preference data at nowhere.parquet"),
        (["LACKING"], "fit no format (pick_a_pic lacks label_0"),
        (["LACKING", "--format", "pick_a_pic"], "format pick_a_pic needs the column label_0"),
        (["LACKING", "--labels", "ai"], "fit no format"),
        (["LACKING", "--scan", "0"], "scan must be at least 1, got 0: leave it out"),
    ],
)
def test_unreadable_data_is_an_error_of_one_line(arguments, message, tmp_path, capsys):
    path = jsonl(tmp_path / "lacking.jsonl", [{"jpg_0": "a", "jpg_1": "b", "caption": "c"}])
    assert main(["check", *(argument.replace("LACKING", str(path)) for argument in arguments)]) == 2
    assert message in capsys.readouterr().err


def test_help_lists_the_fields_of_the_data(capsys):
    assert main(["check", "--help"]) == 0
    printed = capsys.readouterr().out
    for field in ("--format", "--on_fault", "--rollouts.rule", "--max_bad_share", "--streaming", "--json"):
        assert field in printed
