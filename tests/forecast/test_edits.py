"""Forecasts of the models that edit, by hub id: their published configurations are enough."""

import pytest
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2VLImageProcessor

from diffalign.cli import main
from diffalign.forecast.fake_model import BlankProcessor
from diffalign.models.published_configs import published_config
from tests.conftest import PROMPTS

EDITS = ("black-forest-labs/FLUX.1-Kontext-dev", "Qwen/Qwen-Image-Edit")


@pytest.mark.parametrize("size", [(1024, 1024), (1248, 832), (64, 48)])
def test_patches_are_as_many_as_the_published_processor_makes(size):
    settings = published_config("Qwen/Qwen-Image-Edit", "text_encoder")
    blank = BlankProcessor(Qwen2_5_VLConfig(**{name: settings[name] for name in ("text_config", "vision_config")}))
    image, (least, most) = Image.new("RGB", size), blank.area
    real = Qwen2VLImageProcessor(min_pixels=least, max_pixels=most)(images=[image], return_tensors="pt")
    found = blank(text=["make it red"], images=[image], padding=True, return_tensors="pt")
    assert found["pixel_values"].shape == real["pixel_values"].shape
    assert found["image_grid_thw"].tolist() == real["image_grid_thw"].tolist()
    images = (found["input_ids"] == blank.config.image_token_id).sum()
    assert images == real["image_grid_thw"].prod() // 4


@pytest.mark.slow
@pytest.mark.parametrize("model", EDITS)
def test_a_dry_run_by_hub_id_needs_no_network(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    prompts = ["--train_prompts", f"{PROMPTS}/shapes_edit_train.parquet?image=image", "--rewards", "source_similarity"]
    sizes = ["--resolution", "512", "--max_sequence_length", "128", "--num_groups", "2", "--group_size", "2"]
    sizes += ["--rollout_batch_size", "1", "--train_batch_size", "1", "--base_precision", "bf16"]
    card = ["--mixed_precision", "bf16", "--gradient_checkpointing", "true", "--dry_run", "--card", "h100"]
    assert main(["train", "flow_grpo", "--model", model, *prompts, *sizes, *card]) == 0
    shown = capsys.readouterr().out
    assert "forward and backward" in shown
    assert not list(tmp_path.iterdir())
