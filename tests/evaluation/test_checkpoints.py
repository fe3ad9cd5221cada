from pathlib import Path

import pytest

from diffalign.evaluation.checkpoints import BASE, Subject, parse_subject, parse_subjects


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/a/checkpoint-100", "runs/a/checkpoint-20", "runs/b"):
        Path(name).mkdir(parents=True)
    Path("runs/style.safetensors").touch()


@pytest.mark.parametrize(
    ("text", "subject"),
    [
        ("runs/a", Subject("a", Path("runs/a"))),
        ("best=runs/a", Subject("best", Path("runs/a"))),
        ("runs/a@0.5", Subject("a@0.5", Path("runs/a"), 0.5)),
        ("half=runs/a@0.5", Subject("half", Path("runs/a"), 0.5)),
        ("runs/style.safetensors", Subject("style", Path("runs/style.safetensors"))),
        ("runs/a/checkpoint-20", Subject("checkpoint-20", Path("runs/a/checkpoint-20"))),
    ],
)
def test_a_text_names_weights(folders, text, subject):
    assert parse_subject(text) == subject


def test_the_base_comes_first(folders):
    assert [s.name for s in parse_subjects(["runs/b", "runs/a"])] == ["base", "b", "a"]
    assert parse_subjects([]) == [BASE]


def test_scales_make_a_sweep(folders):
    found = parse_subjects(["runs/a"], scales=[0.5, 1])
    assert [(s.name, s.scale) for s in found[1:]] == [("a x 0.5", 0.5), ("a x 1", 1)]


def test_checkpoints_make_a_strip_in_the_order_of_steps(folders):
    found = parse_subjects(["runs/a"], checkpoints=True)
    assert [s.name for s in found] == ["base", "a 20", "a 100", "a final"]
    assert found[1].path == Path("runs/a/checkpoint-20")


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (["runs/a", "runs/a"], {}, "twice"),
        (["runs/a@much"], {}, "no scale"),
        (["name="], {}, "names no path"),
        (["runs/b"], {"checkpoints": True}, "no checkpoint-N"),
    ],
)
def test_what_cannot_be_told_apart_or_found_is_refused(folders, texts, options, message):
    with pytest.raises(ValueError, match=message):
        parse_subjects(texts, **options)


def test_a_missing_path_is_named(folders):
    with pytest.raises(FileNotFoundError, match=r"runs/c: no such"):
        parse_subject("runs/c")
