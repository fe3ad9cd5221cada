import re
from pathlib import Path

import pytest

from diffalign.evaluation.checkpoints import BASE, CheckpointSpec, parse_checkpoint, parse_checkpoints


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/a/checkpoint-100", "runs/a/checkpoint-20", "runs/b"):
        Path(name).mkdir(parents=True)
    Path("runs/style.safetensors").touch()


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("runs/a", CheckpointSpec("a", Path("runs/a"))),
        ("best=runs/a", CheckpointSpec("best", Path("runs/a"))),
        ("runs/a@0.5", CheckpointSpec("a@0.5", Path("runs/a"), 0.5)),
        ("half=runs/a@0.5", CheckpointSpec("half", Path("runs/a"), 0.5)),
        ("runs/style.safetensors", CheckpointSpec("style", Path("runs/style.safetensors"))),
        ("runs/a/checkpoint-20", CheckpointSpec("checkpoint-20", Path("runs/a/checkpoint-20"))),
    ],
)
def test_an_argument_is_parsed_to_name_path_and_scale(folders, text, spec):
    assert parse_checkpoint(text) == spec


def test_the_base_comes_first(folders):
    assert [s.name for s in parse_checkpoints(["runs/b", "runs/a"])] == ["base", "b", "a"]
    assert parse_checkpoints([]) == [BASE]


def test_scales_expand_to_a_model_each(folders):
    found = parse_checkpoints(["runs/a"], scales=[0.5, 1])
    assert [(s.name, s.scale) for s in found[1:]] == [("a x 0.5", 0.5), ("a x 1", 1)]


def test_checkpoints_expand_a_run_sorted_by_step(folders):
    found = parse_checkpoints(["runs/a"], checkpoints=True)
    assert [s.name for s in found] == ["base", "a 20", "a 100", "a final"]
    assert found[1].path == Path("runs/a/checkpoint-20")


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (["runs/a", "runs/a"], {}, "share a name or image folder (a)"),
        (["base=runs/a"], {}, "share a name or image folder (base)"),
        (["a b=runs/a", "a-b=runs/b"], {}, "share a name or image folder (a-b)"),
        (["..=runs/a"], {}, "'..' is not a model name"),
        (["=runs/a"], {}, "'' is not a model name"),
        (["runs/a@much"], {}, "not a scale"),
        (["name="], {}, "has no path"),
        (["runs/b"], {"checkpoints": True}, "no checkpoint-N"),
    ],
)
def test_ambiguous_or_missing_models_are_refused(folders, texts, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_checkpoints(texts, **options)


def test_a_missing_path_is_named(folders):
    with pytest.raises(FileNotFoundError, match=r"runs/c: no such"):
        parse_checkpoint("runs/c")
