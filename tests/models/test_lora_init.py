"""Training that goes on from a LoRA of any format."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffalign.models import LoraConfig, load_model
from diffalign.models.checkpoint_context import with_tuned_weights
from diffalign.models.lora_export import write_diffusers, write_kohya, write_peft
from diffalign.models.lora_factors import Factors, adapter_config
from diffalign.models.lora_reading import read_updates
from tests.models.families import FAMILIES, images_of, noise_of
from tests.models.test_lora import trained
from tests.models.test_lora_variants import VARIANTS, adapted

WEIGHTS = "pytorch_lora_weights.safetensors"


def images(family, model):
    return images_of(FAMILIES[family], model, noise_of(model, 2))


@pytest.fixture(scope="module")
def source(family_pipelines, tmp_path_factory):
    """(Family, variant) -> folder of a LoRA and its images."""
    made = {}

    def build(family, config=VARIANTS["patterns"]):
        key = family, str(config)
        if key not in made:
            folder = tmp_path_factory.mktemp(family)
            model = load_model(family_pipelines[family], **FAMILIES[family].options)
            made[key] = folder, trained(family, model, config, folder)
        return made[key]

    return build


@pytest.mark.parametrize("format", ["own", "diffusers", "kohya", "peft"])
@pytest.mark.parametrize("family", ["sd15", pytest.param("sdxl", marks=pytest.mark.slow), "sd3"])
def test_every_format_is_gone_on_from(family_pipelines, source, family, format, tmp_path):
    folder, expected = source(family)
    model = load_model(family_pipelines[family], **FAMILIES[family].options)
    updates = read_updates(model.pipeline, folder / WEIGHTS)
    file = {
        "own": lambda: folder,
        "diffusers": lambda: write_diffusers(model.pipeline, updates, tmp_path, torch.float32),
        "kohya": lambda: write_kohya(model.pipeline, updates, tmp_path, torch.float32, {}),
        "peft": lambda: write_peft(updates, tmp_path, torch.float32, "base"),
    }[format]()
    base = images(family, model)
    model.train(LoraConfig(init=str(file)))
    assert {n: len(m.lora_A["default"].weight) for n, m in adapted(model).items()} == {
        name: own.rank for name, own in updates[model.denoiser_name].items()
    }
    assert (images(family, model) - expected).abs().max() < 1e-5
    with model.using("reference"):
        assert (images(family, model) - expected).abs().max() < 1e-5
    with torch.no_grad():
        for parameter in model.weights.trainable:
            parameter.mul_(1.5)
    with model.using("reference"):
        assert (images(family, model) - expected).abs().max() < 1e-5, "the reference stays"
    tuned = images(family, model)
    assert (tuned - expected).abs().max() > 1e-3
    model.save(tmp_path / "out")
    fresh = load_model(family_pipelines[family], **FAMILIES[family].options)
    with with_tuned_weights(fresh, tmp_path / "out"):
        assert (images(family, fresh) - tuned).abs().max() < 1e-5
    assert (base - expected).abs().max() > 1e-3


def test_the_reference_may_be_the_base(family_pipelines, source):
    folder, _ = source("sd15")
    model = load_model(family_pipelines["sd15"])
    base = images("sd15", model)
    model.train(LoraConfig(init=str(folder), reference="base"))
    with model.using("reference"):
        assert torch.equal(images("sd15", model), base)


def test_alpha_and_dora_are_taken(family_pipelines, source):
    folder, expected = source("sd15", VARIANTS["dora"])
    model = load_model(family_pipelines["sd15"])
    model.about = {}
    model.train(LoraConfig(init=str(folder / WEIGHTS)))
    assert (model.adapter_rank, model.raw_denoiser.peft_config["default"].use_dora) == (4, True)
    assert (images("sd15", model) - expected).abs().max() < 1e-5


def test_the_alpha_of_our_own_files_is_that_of_training(family_pipelines, tmp_path):
    model = load_model(family_pipelines["sd15"])
    model.about = {"diffalign.trained_alpha": "6.0"}
    expected = trained("sd15", model, LoraConfig(rank=4, alpha=6.0), tmp_path)
    other = load_model(family_pipelines["sd15"])
    other.train(LoraConfig(init=str(tmp_path)))
    assert (other.adapter_alpha, other.adapter_rank) == (6.0, 4)
    assert (images("sd15", other) - expected).abs().max() < 1e-5
    ours, theirs = (dict(m.raw_denoiser.named_parameters()) for m in (model, other))
    for name, tensor in ours.items():
        if "lora_" in name:
            torch.testing.assert_close(theirs[name], tensor, rtol=1e-6, atol=1e-8)


def test_full_fine_tuning_starts_from_base_and_lora(family_pipelines, source):
    folder, expected = source("sd3")
    model = load_model(family_pipelines["sd3"], **FAMILIES["sd3"].options)
    model.train(LoraConfig(rank=0, init=str(folder)), keep_reference=True)
    assert not adapted(model)
    assert (images("sd3", model) - expected).abs().max() < 1e-4
    with model.using("reference"):
        assert (images("sd3", model) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["sd15", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_text_encoder_layers_are_kept(family_pipelines, source, family, tmp_path):
    """They are merged while the denoiser trains, and written beside its layers."""
    folder, _ = source(family)
    model = load_model(family_pipelines[family])
    updates = dict(read_updates(model.pipeline, folder / WEIGHTS))
    generator = torch.Generator().manual_seed(0)
    for part in ("text_encoder", "text_encoder_2")[: 2 if family == "sdxl" else 1]:
        encoder = getattr(model.pipeline, part)
        updates[part] = {
            name: Factors(
                torch.randn(2, layer.in_features, generator=generator) * 0.2,
                torch.randn(layer.out_features, 2, generator=generator) * 0.2,
            )
            for name, layer in encoder.named_modules()
            if name.endswith(("q_proj", "fc1"))
        }
    file = write_kohya(model.pipeline, updates, tmp_path / "lora", torch.float32, {})
    with with_tuned_weights(model, file):
        expected = images(family, model)
    with with_tuned_weights(model, folder):
        assert (images(family, model) - expected).abs().max() > 1e-4, "the text encoder matters"
    model.train(LoraConfig(init=str(file)))
    assert (images(family, model) - expected).abs().max() < 1e-5
    model.save(tmp_path / "out")
    fresh = load_model(family_pipelines[family])
    with with_tuned_weights(fresh, tmp_path / "out"):
        assert (images(family, fresh) - expected).abs().max() < 1e-5
    with pytest.raises(ValueError, match="full fine-tuning does not save: write diffalign export --format merged"):
        load_model(family_pipelines[family]).train(LoraConfig(rank=0, init=str(file)))


def test_what_is_the_loras_own_is_refused(family_pipelines, source, tmp_path):
    folder, _ = source("sd15")
    model = load_model(family_pipelines["sd3"])
    with pytest.raises(ValueError, match="give the base that it was made for"):
        model.train(LoraConfig(init=str(folder)))
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        model.train(LoraConfig(init=str(tmp_path / "nothing")))
    shutil.copyfile(folder / WEIGHTS, tmp_path / WEIGHTS)
    broken = load_file(tmp_path / WEIGHTS)
    name = next(iter(broken))
    save_file(broken | {name: broken[name] * float("nan")}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="not finite"):
        load_model(family_pipelines["sd15"]).train(LoraConfig(init=str(tmp_path)))


def test_norms_of_some_layers_only_are_refused():
    """Peft would take the base's norms for the others, which a plain LoRA changes."""
    down, up = torch.ones(2, 4), torch.ones(4, 2)
    layers = {"a": Factors(down, up, magnitude=torch.ones(4)), "b": Factors(down, up)}
    with pytest.raises(ValueError, match="1 of 2 layers, such as b, lack the norms of DoRA"):
        adapter_config(layers)
