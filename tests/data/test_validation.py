"""Bad samples are named, left out or not as configured, and too many of them stop a run before it starts."""

import io

import pytest
from PIL import Image

from diffalign.data.config import PreferenceDataConfig
from diffalign.data.pairs import load_pairs
from diffalign.data.validation import KINDS, DataWarning
from tests.data.preference_files import captions, encoded, jsonl, pick_a_pic, pick_row

FAULTS = {
    "unreadable": pick_row(7, jpg_1=b"no image"),
    "too_small": pick_row(7, jpg_0=encoded(14, (24, 8))),
    "same_image": pick_row(7, jpg_1=encoded(14)),
    "different_size": pick_row(7, jpg_1=encoded(15, (48, 40))),
    "empty_caption": pick_row(7, caption="  "),
    "bad_label": pick_row(7, 0.25),
}


def rows_with(bad, count=100):
    """``count`` rows, of which those in ``bad`` (number -> row) are bad."""
    return [bad.get(number, pick_row(number)) for number in range(count)]


@pytest.mark.parametrize("kind", FAULTS)
def test_each_error_is_named_by_source_row_and_column(kind, tmp_path):
    path = pick_a_pic(tmp_path / "pick.parquet", rows_with({7: FAULTS[kind]}))
    with pytest.warns(DataWarning, match=rf"{kind}: 1 .*\n  .*pick\.parquet, row 7"):
        data = load_pairs(path)
    found = data.quarantine.found[kind]
    assert len(found) == 1
    details = {
        "unreadable": "jpg_1: not an image",
        "too_small": "24 x 8 and 24 x 20, min_side is 16",
        "same_image": "row 7, jpg_0 and ",
        "different_size": "24 x 20 and 48 x 40",
        "empty_caption": "empty",
        "bad_label": "0.25 is not one of 0, 0.5, 1",
    }
    assert details[kind] in next(iter(found.values()))
    dropped = KINDS[kind].actions[0] == "drop"
    assert data.quarantine.bad_share() == pytest.approx(0.01 if dropped else 0)
    others = [f"caption {number}" for number in range(100) if number != 7]
    good = {data.load(i)[0].prompt.text for i in range(len(data))}
    assert good == ({*others} if dropped else {*others, "caption 7"})


@pytest.mark.parametrize("kind", FAULTS)
def test_each_error_is_handled_as_configured(kind, tmp_path):
    path = pick_a_pic(tmp_path / "pick.parquet", rows_with({7: FAULTS[kind]}, 10))
    with pytest.raises(ValueError, match=rf"row 7.*\({kind}\): fix it, or set on_fault.{kind} to drop"):
        load_pairs(path, settings=PreferenceDataConfig(on_fault={kind: "error"}))
    settings = PreferenceDataConfig(on_fault={kind: "drop"}, max_bad_share=0.2)
    with pytest.warns(DataWarning, match=kind):
        data = load_pairs(path, settings=settings)
    assert "caption 7" not in {data.load(i)[0].prompt.text for i in range(len(data))}
    if "keep" in KINDS[kind].actions:
        with pytest.warns(DataWarning, match=kind):
            kept = load_pairs(path, settings=PreferenceDataConfig(on_fault={kind: "keep"}))
        assert len(kept) == len({kept.load(i)[0].key for i in range(len(kept))}) == 10
    else:
        with pytest.raises(ValueError, match=f"on_fault.{kind}: 'keep' is not possible; choose drop or error"):
            PreferenceDataConfig(on_fault={kind: "keep"})


def test_more_than_one_percent_stops_before_the_first_step_unless_allowed(tmp_path):
    bad = {7: FAULTS["unreadable"], 70: pick_row(70, 0.3)}
    path = pick_a_pic(tmp_path / "pick.parquet", rows_with(bad, 199))
    with pytest.raises(ValueError, match=r"1\.0% of the data cannot be used, more than max_bad_share 1\.0%") as caught:
        load_pairs(path)
    for part in ("bad_label: 1", "row 70", "unreadable: 1", "row 7: jpg_1: not an image", "raise max_bad_share"):
        assert part in str(caught.value)
    with pytest.warns(DataWarning):
        assert len(load_pairs(path, settings=PreferenceDataConfig(max_bad_share=0.02))) == 198
    path = pick_a_pic(tmp_path / "more.parquet", rows_with(bad, 201))
    with pytest.warns(DataWarning):
        assert len(load_pairs(path)) == 200


def test_a_label_that_is_no_number_is_a_bad_label(tmp_path):
    rows = [{"image_0": "a", "image_1": "b", "prompt": "p", "label": label} for label in ("0.5", "first", "1.5", "nan")]
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the message is what is tested
        load_pairs(jsonl(tmp_path / "a.jsonl", rows))
    assert "row 1, label: 'first' is not a number" in str(caught.value)
    assert "row 2, label: 1.5 is not in [0, 1]" in str(caught.value)


def test_an_unusable_pair_is_replaced_by_the_next_and_the_others_keep_their_index(tmp_path):
    """Whether the images were looked at before or not: what a run sees does not depend on it."""
    path = pick_a_pic(tmp_path / "pick.parquet", rows_with({3: pick_row(3, jpg_0=None), 4: FAULTS["unreadable"]}, 10))
    wanted = [f"caption {number}" for number in (0, 1, 2, 5, 5, 5, 6, 7, 8, 9)]
    for scan in (None, 0):
        settings = PreferenceDataConfig(max_bad_share=0.2, scan=scan)
        if scan is None:
            with pytest.warns(DataWarning, match="unreadable: 2"):
                data = load_pairs(path, settings=settings)
        else:
            data = load_pairs(path, settings=settings)
            with pytest.warns(DataWarning, match="left out: .*row [34]: jpg_[01]: (no|not an) image"):
                data.load(3)
        assert [data.load(i)[0].prompt.text for i in range(10)] == wanted
        assert captions(data)[3] == "caption 3", "the number itself stays"
        assert list(data.quarantine.found["unreadable"].values()) == ["jpg_0: no image", "jpg_1: not an image"]


def test_too_many_bad_images_stop_a_run_that_looked_at_none_before(tmp_path):
    path = pick_a_pic(tmp_path / "pick.parquet", rows_with({3: FAULTS["unreadable"]}, 10))
    data = load_pairs(path, settings=PreferenceDataConfig(scan=0))
    with pytest.warns(DataWarning), pytest.raises(ValueError, match=r"10\.0% of the data cannot be used"):
        data.load(3)


def test_known_errors_are_neither_read_nor_counted_again(tmp_path, monkeypatch):
    bad = {3: FAULTS["unreadable"], 7: FAULTS["different_size"]}
    path = pick_a_pic(tmp_path / "pick.parquet", rows_with(bad, 10))
    with pytest.warns(DataWarning):
        data = load_pairs(path, settings=PreferenceDataConfig(max_bad_share=0.2))
    opened = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda file, **how: opened.append(file) or real(file, **how))
    assert data.load(3)[0].prompt.text == "caption 4"
    data.load(7)
    assert len(opened) == 4, "two images of pair 4, two of pair 7, none of pair 3"
    assert {kind: data.quarantine.count(kind) for kind in ("unreadable", "different_size")} == {
        "unreadable": 1,
        "different_size": 1,
    }


def test_scan_limits_how_many_images_are_decoded(tmp_path, monkeypatch):
    path = pick_a_pic(tmp_path / "pick.parquet", rows_with({3: FAULTS["unreadable"]}, 10))
    opened = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda file, **how: opened.append(file) or real(file, **how))
    data = load_pairs(path, settings=PreferenceDataConfig(scan=4))
    assert (len(opened), data.quarantine.examined) == (8, 4), "0, 2, 5 and 7: spread evenly"
    with pytest.raises(ValueError, match="unreadable: 1"):
        load_pairs(path, settings=PreferenceDataConfig(scan=None))


def test_data_without_a_usable_pair_are_refused_with_reasons(tmp_path):
    path = pick_a_pic(tmp_path / "pick.parquet", [pick_row(0, 0.5), pick_row(1, 0.5)])
    with pytest.raises(ValueError, match=r"pick\.parquet: no sample is left\nties: 2"):
        load_pairs(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_fault": {"unreadabel": "drop"}}, "on_fault: unknown kind 'unreadabel'; known: bad_label"),
        ({"max_bad_share": 1.5}, "max_bad_share must be at least 0 and at most 1, got 1.5"),
        ({"min_side": 0}, "min_side must be at least 1, got 0"),
        ({"scan": -1}, "scan must be at least 0, got -1"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PreferenceDataConfig(**settings)


def test_an_image_in_another_mode_is_no_error(tmp_path):
    file = io.BytesIO()
    Image.open(io.BytesIO(encoded(0))).convert("L").save(file, "PNG")
    path = pick_a_pic(tmp_path / "pick.parquet", [pick_row(0, jpg_0=file.getvalue())])
    _, images = load_pairs(path).load(0)
    assert [image.mode for image in images] == ["RGB", "RGB"]
