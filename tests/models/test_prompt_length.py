"""A prompt is too long by the tokens of its model's own text encoders."""

import pytest
import torch

from diffalign.cli import main
from diffalign.models import load_model
from diffalign.models.prompt_length import cut, text_encoders
from tests.conftest import PIPELINE
from tests.data.preference_files import pick_a_pic, pick_row
from tests.models.families import FAMILIES


def test_tokens_are_those_that_the_pipeline_reads(pipeline):
    """The last token that matters to the pipeline's own encoding is where the counted limit lies."""
    encoders = text_encoders(PIPELINE)
    assert [(encoder.name, encoder.limit) for encoder in encoders] == [
        ("tokenizer", pipeline.tokenizer.model_max_length),
        ("tokenizer_2", pipeline.tokenizer_2.model_max_length),
        ("tokenizer_3", 256),
    ]
    for text in ("a red circle", "", "a red circle and a blue square left of a green triangle"):
        for encoder in encoders:
            tokenizer = getattr(pipeline, encoder.name)
            assert encoder.count(text) == len(tokenizer(text).input_ids)


def test_max_sequence_length_counts_for_all_but_clip():
    encoders = text_encoders(PIPELINE, max_sequence_length=20)
    assert [encoder.limit for encoder in encoders] == [16, 16, 20]


@pytest.mark.parametrize(
    "name", [name if name in ("sana", "lumina2") else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_checks_and_trainings_count_alike(family_pipelines, name):
    """Templates, system prompts and changes of case count in both."""
    model = load_model(family_pipelines[name], **FAMILIES[name].options)
    longest = text_encoders(family_pipelines[name], FAMILIES[name].options.get("max_sequence_length"))[-1]
    for text in ("a red circle", " A Blue Square  "):
        assert longest.count(text) == model.count_tokens(text)
    assert longest.limit == model.token_limit


def same(model, first, second):
    encoded = [model.encode([text]).tensors for text in (first, second)]
    return all(torch.equal(encoded[0][name], encoded[1][name]) for name in encoded[0])


def test_the_model_reads_every_token_up_to_the_limit_and_none_beyond(frozen):
    """frozen: reads 16 tokens of T5, and so do its CLIP encoders."""
    encoders, text = text_encoders(PIPELINE, 16), "a red circle"
    while cut(f"{text} red", encoders) is None:
        text += " red"
    assert not same(frozen, text, f"{text.removesuffix(' red')} blue"), "the last word counts"
    while not all(encoder.count(text) > encoder.limit for encoder in encoders):
        text += " red"
    assert cut(text, encoders).count("reads 16") == 3
    assert same(frozen, f"{text} red", f"{text} blue"), "words behind the limit do not"


def test_check_counts_tokens_and_each_text_once(tmp_path, capsys):
    """Many letters of few tokens are not too long; few words of many tokens are."""
    short, long = "a red circle", "a red circle and a blue square and a green triangle and a red square"
    (tmp_path / "a.txt").write_text("\n".join([short, long, long, long]))
    assert main(["check", str(tmp_path / "a.txt"), "--model", str(PIPELINE)]) == 0
    said = capsys.readouterr().out
    assert "long: 1 (" in said
    assert "line 2: " in said
    assert "tokens, tokenizer reads 16; " in said
    assert main(["check", str(tmp_path / "a.txt")]) == 0
    assert "long: 0 (" in capsys.readouterr().out, "without a model, only what no encoder reads"


@pytest.mark.parametrize("streaming", [False, True])
def test_check_of_pairs_counts_them_too(streaming, tmp_path, capsys):
    long = "a red circle and a blue square and a green triangle and a red square"
    path = pick_a_pic(tmp_path / "a.parquet", [pick_row(i, caption=long if i else "a circle") for i in range(4)])
    options = ["--streaming"] if streaming else []
    assert main(["check", str(path), "--model", str(PIPELINE), *options]) == 0
    assert "prompts: 2 different, 1 too long for a text encoder" in capsys.readouterr().out
    assert main(["check", str(path), *options]) == 0
    assert "prompts: 2 different, 0 too long for a text encoder" in capsys.readouterr().out


def test_a_model_that_is_not_there_is_named_before_the_data_are_read(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a")
    assert main(["check", str(tmp_path / "a.txt"), "--model", "./nowhere"]) == 2
    assert "model nowhere: no such folder" in capsys.readouterr().err.replace("./", "")
