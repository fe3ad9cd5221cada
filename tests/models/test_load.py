"""Loading damaged model folders raises an error that names the folder, whichever library fails."""

import shutil

import pytest

from diffalign.models import load_model
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
