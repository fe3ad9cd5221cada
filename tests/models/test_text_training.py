"""LoRAs on the text encoders of SD and SDXL: the pipeline's embeddings, gradients, files of diffusers and kohya."""

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from diffalign import DiffusionDPOConfig, FlowGRPOConfig, LoraConfig
from diffalign.commands.export import run as export
from diffalign.commands.export_config import ExportConfig
from diffalign.forecast import fitter, report
from diffalign.forecast.dry_run import Place
from diffalign.models import load_model
from diffalign.models.checkpoint_context import with_tuned_weights
from diffalign.models.lora_reading import read_updates
from diffalign.structures import Guidance
from diffalign.trainers.cost import Share
from diffalign.trainers.registry import find_algorithm
from tests.conftest import PIPELINE

TEXTS = ["a red circle", "two blue squares beside a dog"]
SLOW = pytest.mark.slow
NAMES = ["sdxl", pytest.param("sd15", marks=SLOW), pytest.param("sd2", marks=SLOW)]


def trained(folder, shift=0.05, **changes):
    """A model whose LoRAs are not zero."""
    model = load_model(folder)
    model.train(LoraConfig(rank=4, **{"text_encoder": True, **changes}), seed=1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.weights.trainable:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * shift)
    return model


def predicted(model, texts=TEXTS, scale=None):
    x = torch.randn(len(texts), *model.latent_shape(), generator=torch.Generator().manual_seed(0))
    level = model.level_at(torch.full((len(texts),), 500.0))
    return model.predict(x, level, model.encode(texts), None if scale is None else Guidance(scale))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [None, 3.0])
def test_a_new_lora_changes_no_prediction(name, scale, tiny_pipelines):
    plain = load_model(tiny_pipelines[name])
    model = load_model(tiny_pipelines[name])
    model.train(LoraConfig(rank=4, text_encoder=True))
    assert set(model.encode(TEXTS).tensors) & {"embeds", "pooled"} == set()
    # The last bits depend on how many texts are encoded at once.
    torch.testing.assert_close(predicted(model, scale=scale), predicted(plain, scale=scale), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_every_adapter_gets_a_gradient_and_nothing_else(name, tiny_pipelines):
    model = trained(tiny_pipelines[name])
    predicted(model).square().mean().backward()
    parameters = dict(model.raw_denoiser.named_parameters())
    assert {n for n, p in parameters.items() if p.grad is not None and p.grad.any()} == {
        n for n, p in parameters.items() if p.requires_grad
    }
    assert all("lora_" in n for n, p in parameters.items() if p.requires_grad)
    encoders = {n.split(".")[1] for n, p in parameters.items() if p.requires_grad and n.startswith("trained_text")}
    assert encoders == set(model.text_encoders)


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_is_the_base_with_its_text_encoders(name, tiny_pipelines):
    model = trained(tiny_pipelines[name])
    with torch.no_grad(), model.using("reference"):
        found = predicted(model)
    torch.testing.assert_close(found, predicted(load_model(tiny_pipelines[name])), rtol=1e-5, atol=1e-5)
    assert not torch.equal(found, predicted(model))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("changes", [{"alpha": 2.0}, {"use_rslora": True}])
def test_plain_diffusers_loads_all_of_it(name, changes, tiny_pipelines, tmp_path):
    model = trained(tiny_pipelines[name], **changes)
    with torch.no_grad():
        expected = predicted(model)
    model.save(tmp_path)
    prefixes = {key.split(".")[0] for key in load_file(tmp_path / "pytorch_lora_weights.safetensors")}
    assert prefixes == {"unet", *model.text_encoders}
    pipe = DiffusionPipeline.from_pretrained(tiny_pipelines[name], safety_checker=None)
    pipe.load_lora_weights(tmp_path)
    again = load_model(tiny_pipelines[name])
    again.pipeline = pipe
    again.denoiser = pipe.unet
    with torch.no_grad():
        torch.testing.assert_close(predicted(again), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("sdxl", "kohya"),
        ("sd15", "peft"),
        pytest.param("sdxl", "peft", marks=SLOW),
        pytest.param("sd15", "kohya", marks=SLOW),
    ],
)
def test_exports_of_other_formats_have_the_text_encoders(name, format, tiny_pipelines, tmp_path):
    model = trained(tiny_pipelines[name])
    model.about = {"diffalign.base_model": str(tiny_pipelines[name])}
    model.save(tmp_path / "lora")
    path = export(ExportConfig(models=(str(tmp_path / "lora"),), format=format, output_dir=tmp_path / "out"))
    if format == "kohya":
        prefixes = {key.split("_text_model")[0] for key in load_file(path) if key.startswith("lora_te")}
        assert prefixes == ({"lora_te"} if name == "sd15" else {"lora_te1", "lora_te2"})
    again = load_model(tiny_pipelines[name])
    with torch.no_grad():
        expected = predicted(model)
        with with_tuned_weights(again, path):
            torch.testing.assert_close(predicted(again), expected, rtol=1e-5, atol=1e-5)
    again.train(LoraConfig(rank=4, init=str(path), text_encoder=True))
    with torch.no_grad():
        torch.testing.assert_close(predicted(again), expected, rtol=1e-5, atol=1e-5)
    if format == "peft":
        (path / "text_encoder/adapter_config.json").write_text("[]")
        with pytest.raises(ValueError, match=r"text_encoder/adapter_config\.json cannot be read: copy it beside"):
            read_updates(again.pipeline, path / "adapter_model.safetensors")
        trained(tiny_pipelines[name], text_encoder=False).save(tmp_path / "alone")
        export(ExportConfig(models=(str(tmp_path / "alone"),), model=str(tiny_pipelines[name]), format=format,
                            output_dir=path))  # fmt: skip
        assert read_updates(again.pipeline, path / "adapter_model.safetensors").keys() == {"unet"}


@pytest.mark.parametrize("name", ["sdxl", pytest.param("sd15", marks=SLOW)])
@pytest.mark.parametrize("before", [True, False])
def test_it_goes_on_from_a_lora_with_or_without_text_encoders(name, before, tiny_pipelines, tmp_path):
    first = trained(tiny_pipelines[name], text_encoder=before)
    first.save(tmp_path / "a")
    model = load_model(tiny_pipelines[name])
    model.train(LoraConfig(init=str(tmp_path / "a"), text_encoder=True), keep_reference=True)
    with torch.no_grad():
        torch.testing.assert_close(predicted(model), predicted(first), rtol=1e-5, atol=1e-5)
    model.save(tmp_path / "b")
    start, end = (load_file(tmp_path / run / "pytorch_lora_weights.safetensors") for run in ("a", "b"))
    assert set(start) <= set(end)
    assert {key.split(".")[0] for key in end} == {"unet", *model.text_encoders}


def test_a_dora_is_refused(tiny_pipelines):
    with pytest.raises(ValueError, match="loads no DoRA into text encoders; set lora"):
        load_model(tiny_pipelines["sdxl"]).train(LoraConfig(text_encoder=True, use_dora=True))


def test_text_encoders_that_are_offloaded_are_refused():
    config = FlowGRPOConfig(model="x", lora=LoraConfig(text_encoder=True), offload=("text_encoders",))
    with pytest.raises(ValueError, match="leave text_encoders out of offload"):
        config.validate()


def test_other_families_are_refused():
    model = load_model(PIPELINE, max_sequence_length=16)
    with pytest.raises(ValueError, match=r"lora\.text_encoder: .* StableDiffusion3Pipeline do not train, only"):
        model.train(LoraConfig(text_encoder=True))


def test_no_forecast_offloads_text_encoders_that_train():
    args = DiffusionDPOConfig(model="x", train_data=("x",), lora=LoraConfig(text_encoder=True))
    found = fitter.Fitter(find_algorithm("diffusion_dpo"), args, Place(Share(0, 1)))._ladder
    assert any("vae" in settings.get("offload", ()) for settings in found)
    assert not any("text_encoders" in settings.get("offload", ()) for settings in found)
    assert not report._can_set(args, "offload", "text_encoders")
