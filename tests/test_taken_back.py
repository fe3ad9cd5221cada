"""A typed option takes back, with a warning, what a config file sets in the same section and would not be read."""

import pytest

from diffalign.config import parse, to_dict
from diffalign.config.schema import ConfigError
from diffalign.trainers.registry import find_algorithm
from tests.conftest import ROOT

SHAPES = {
    "alpha": 8.0, "targets": ["to_q"], "blocks": [0], "rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_q": 2.0},
    "use_dora": True, "use_rslora": True,
}  # fmt: skip
TRAINERS = ("flow_grpo", "diffusion_dpo", "refl", "forward_rl")


def read(trainer, path, *typed):
    config = parse(find_algorithm(trainer).config, ["--config", str(path), *typed])
    config.validate()
    return config


@pytest.mark.parametrize("typed", [["--lora.rank", "0"], ["--lora.rank=0"], ["--lora", "0"]])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_one_option_trains_all_weights_under_every_trainer(trainer, typed):
    path = ROOT / f"configs/{trainer}/shapes.yaml"
    with pytest.warns(UserWarning, match=r"lora.targets of the config file is read only with a LoRA .*left out"):
        config = read(trainer, path, *typed)
    assert (config.lora.rank, config.lora.targets) == (0, None)
    assert "targets" not in to_dict(config)["lora"]


@pytest.mark.parametrize("name", SHAPES)
def test_each_field_of_a_lora_is_taken_back(name, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(f"model: m\nlora: {{rank: 4, {name}: {SHAPES[name]}}}\n".replace("True", "true"))
    with pytest.warns(UserWarning, match=rf"^lora\.{name} of the config file .*because of --lora.rank$"):
        assert read("flow_grpo", path, "--lora.rank", "0").lora.rank == 0
    with pytest.warns(UserWarning, match=r"^lora\.rank of the config file is the LoRA's own.*because of --lora.init$"):
        assert parse(find_algorithm("flow_grpo").config, ["--config", str(path), "--lora.init", "a/b"]).lora.init


@pytest.mark.parametrize(
    ("text", "typed"),
    [
        ("lora: {rank: 0, targets: [to_q]}", []),  # the file contradicts itself
        ("lora: {rank: 0, targets: [to_q]}", ["--lora.init", "a/b"]),
        ("lora: {rank: 4}", ["--lora.rank", "0", "--lora.targets", "to_q"]),  # and so does the command line
        ("lora: {rank: 0}", ["--lora.targets", "to_q"]),
    ],
)
def test_a_contradiction_in_one_place_is_refused(text, typed, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(f"model: m\n{text}\n")
    with pytest.raises(ConfigError, match=r"lora\.targets: is read only with a LoRA"):
        read("flow_grpo", path, *typed)


def test_nothing_is_taken_back_that_is_read(tmp_path, recwarn):
    path = tmp_path / "c.yaml"
    path.write_text("model: m\nlora: {rank: 4, alpha: 8.0, targets: null}\n")
    assert read("flow_grpo", path, "--lora.use_dora").lora.alpha == 8
    assert read("flow_grpo", path, "--lora.rank", "0", "--lora.alpha", "null").lora.alpha is None
    assert [str(found.message) for found in recwarn if "left out" in str(found.message)] == []
