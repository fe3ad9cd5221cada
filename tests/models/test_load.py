"""Loading damaged model folders raises an error that names the folder, whichever library fails."""

import shutil

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from diffalign import FlowGRPOConfig
from diffalign.models import load_model
from diffalign.models.meta_device import model_on_meta
from diffalign.models.prompt_length import text_encoders
from diffalign.report.load_snippet import load_snippet
from tests.conftest import PIPELINE


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "index empty": ("model_index.json", lambda path: path.write_text("")),
    "index not JSON": ("model_index.json", lambda path: path.write_text("{")),
    "index a list": ("model_index.json", lambda path: path.write_text("[]")),
    "index without a class": ("model_index.json", lambda path: path.write_text("{}")),
    "weights cut": ("transformer/diffusion_pytorch_model.safetensors", cut),
    "weights empty": ("transformer/diffusion_pytorch_model.safetensors", lambda path: path.write_bytes(b"")),
    "weights of text": ("vae/diffusion_pytorch_model.safetensors", lambda path: path.write_text("x" * 99)),
    "weights missing": ("vae/diffusion_pytorch_model.safetensors", lambda path: path.unlink()),
    "config empty": ("transformer/config.json", lambda path: path.write_text("")),
    "scheduler gone": ("scheduler", shutil.rmtree),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_is_named(damage, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(PIPELINE, folder)
    name, act = DAMAGES[damage]
    act(folder / name)
    with pytest.raises((ValueError, FileNotFoundError), match=f"model {folder}") as caught:
        load_model(folder)
    assert len(str(caught.value)) < 2000


@pytest.fixture(params=["saved without", "folders deleted"])
def without_t5(request, tmp_path):
    """SD3 without its third text encoder."""
    folder = tmp_path / "model"
    if request.param == "saved without":
        pipeline = StableDiffusion3Pipeline.from_pretrained(PIPELINE, text_encoder_3=None, tokenizer_3=None)
        pipeline.save_pretrained(folder)
    else:
        shutil.copytree(PIPELINE, folder, ignore=shutil.ignore_patterns("text_encoder_3", "tokenizer_3"))
    return folder


def test_sd3_is_loaded_without_t5(without_t5):
    plain = StableDiffusion3Pipeline.from_pretrained(without_t5, text_encoder_3=None, tokenizer_3=None)
    expected, _, pooled, _ = plain.encode_prompt(
        "a red circle", None, None, do_classifier_free_guidance=False, max_sequence_length=16
    )
    model = load_model(without_t5, max_sequence_length=16)
    found = model.encode(["a red circle"]).tensors
    assert torch.equal(found["embeds"], expected)
    assert torch.equal(found["pooled"], pooled)
    assert model_on_meta(without_t5).pipeline.text_encoder_3 is None
    assert [encoder.name for encoder in text_encoders(without_t5)] == ["tokenizer", "tokenizer_2"]
    args = FlowGRPOConfig(model=str(without_t5), rewards={"brightness": 1.0}, output_dir="run")
    model.train(args.lora)
    assert "text_encoder_3=None, tokenizer_3=None)" in load_snippet(model, args, "a red circle")
