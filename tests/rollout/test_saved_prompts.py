"""Source images of edits in saved buffers."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffalign.data.pairs import load_pairs
from diffalign.diffusion.plan import Plan, Row
from diffalign.rollout.buffer import RolloutBuffer, clear_buffer
from diffalign.structures import Prompt


@pytest.fixture
def prompts(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    Image.new("RGB", (8, 8), "green").save(tmp_path / "green.png")
    return [Prompt("make it blue", {"image": str(tmp_path / name), "kept": 1}) for name in ("red.png", "green.png")]


def test_a_buffer_has_the_sources_of_its_edits_and_can_be_moved(prompts, tmp_path):
    group, sample = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    buffer = RolloutBuffer.allocate(Plan((Row("flow_sde", 0.7, True),)), group, sample, prompts, (2, 3, 3))
    buffer.rewards["brightness"] = torch.arange(len(buffer.step)).double()
    buffer.save(tmp_path / "run", torch.rand(4, 3, 16, 16), model="m", seed=0)
    contents = [Path(prompt.metadata["image"]).read_bytes() for prompt in prompts]
    moved = Path(shutil.move(tmp_path / "run", tmp_path / "moved"))
    for prompt in prompts:
        Path(prompt.metadata["image"]).unlink()

    for found in (
        RolloutBuffer.load(moved).prompts,
        [pair.prompt for pair in load_pairs(moved)],
    ):
        assert [Path(prompt.metadata["image"]).read_bytes() for prompt in found] == contents
        assert [(prompt.text, prompt.metadata["kept"]) for prompt in found] == [("make it blue", 1)] * 2

    clear_buffer(moved)
    assert not [path for path in moved.rglob("*") if path.is_file()]
