"""Noise in library logs is dropped, and meaningful messages appear once."""

import logging
import warnings

import pytest
import torch

from diffalign import LoraConfig
from diffalign.models import load_model, with_tuned_weights
from diffalign.models.prompt_cache import PromptEmbeddingCache
from diffalign.models.quiet import quiet_libraries
from tests.models.families import FAMILIES, LORA, NAMES

NOISE = (
    "kept in float32",
    "torch_dtype",
    "No LoRA keys",
    "truncated",
    "Token indices",
    "Loading",
    "it/s",
    "Materializing",
)


@pytest.mark.parametrize("name", LORA)
def test_loading_a_model_and_a_lora_says_one_line_each(family_pipelines, name, capfd, tmp_path):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model = load_model(family_pipelines[name], **FAMILIES[name].options)
        model.train(LoraConfig(rank=2))
        with torch.no_grad():
            for parameter in model.weights.trainable:
                parameter.fill_(0.01)
        model.save(tmp_path)
        fresh = load_model(family_pipelines[name], **FAMILIES[name].options, dtype=torch.bfloat16)
        with with_tuned_weights(fresh, tmp_path):
            pass
    output = capfd.readouterr()
    assert output.out == ""
    assert [line.split(" ")[0] for line in output.err.splitlines()] == ["loading"] * 2
    assert not [str(w.message) for w in seen if any(noise in str(w.message) for noise in NOISE)]


@pytest.mark.parametrize("name", NAMES)
def test_prompts_that_are_too_long_are_counted_once(family_pipelines, name, capfd):
    model = load_model(family_pipelines[name], **FAMILIES[name].options)
    limit = model.token_limit
    short, long = "a red circle", ["a red circle " * (limit + i) for i in (1, 2, 3)]
    assert model.count_tokens(short) <= limit < model.count_tokens(long[0])
    encoded = PromptEmbeddingCache(model)
    capfd.readouterr()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        encoded([short, *long])
        encoded([text + "x" for text in long])
    (warning,) = [str(w.message) for w in caught if "tokens" in str(w.message)]
    assert warning.startswith(f"3 of 4 prompts have more than the {limit} tokens")
    assert len(warning) < 400
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", NAMES)
def test_the_limit_is_where_the_end_of_a_prompt_is_no_longer_read(family_pipelines, name):
    """The last word that fits changes the embeddings; one well behind it does not."""
    model = load_model(family_pipelines[name], **FAMILIES[name].options)
    words = ["a"]
    while model.count_tokens(" ".join([*words, "b"])) <= model.token_limit:
        words.append("b")
    full = " ".join(words)
    kept, changed = (model.encode([text]).tensors["embeds"] for text in (full, " ".join([*words[:-1], "c"])))
    assert (kept - changed).abs().max() > 1e-4, "its last word is read"
    ends = [model.encode([f"{full} {more}"]).tensors["embeds"] for more in ("b b b b b b c", "b b b b b b b")]
    assert torch.equal(*ends), "what is far behind the limit is not"


def fail():
    logging.getLogger("diffusers.pipelines").warning("something new")
    raise KeyError


def test_levels_and_handlers_are_as_before():
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "peft")]
    before = [(list(logger.handlers), logger.propagate, logger.level) for logger in loggers]
    with pytest.raises(KeyError), quiet_libraries() as lines:
        fail()
    assert lines == ["something new"]
    assert [(list(logger.handlers), logger.propagate, logger.level) for logger in loggers] == before
