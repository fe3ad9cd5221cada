"""What the tests of trainers share: twelve preference pairs, and small runs."""

import io
import random
from functools import partial

import pytest
from datasets import Dataset
from torchvision.transforms.functional import to_pil_image

from diffalign import DiffusionDPOConfig, LoraConfig
from diffalign.shapes import caption, render, scene_for
from diffalign.shapes.captions import neighbours
from tests.conftest import PIPELINE
from tests.trainers.made_refl import config


def png(image):
    buffer = io.BytesIO()
    to_pil_image(image).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """Twelve pairs in Pick-a-Pic's columns, every third with the winner second."""
    rng = random.Random(0)
    rows = []
    for i in range(12):
        prompt = caption(rng)
        right, wrong = (
            render([scene_for(spec, rng)])[0] for spec in (prompt.metadata, rng.choice(neighbours(prompt.metadata)))
        )
        images = (wrong, right) if i % 3 == 0 else (right, wrong)
        rows.append(
            {
                "jpg_0": png(images[0]),
                "jpg_1": png(images[1]),
                "label_0": float(i % 3 != 0),
                "label_1": float(i % 3 == 0),
                "caption": prompt.text,
                "has_label": True,
            }
        )
    path = tmp_path_factory.mktemp("pairs") / "pairs.parquet"
    Dataset.from_list(rows).to_parquet(path)
    return path


@pytest.fixture
def dpo(tmp_path, pairs):
    """A configuration that trains in seconds; keyword arguments override it."""

    def make(**changes) -> DiffusionDPOConfig:
        settings = {
            "model": str(PIPELINE),
            "max_sequence_length": 16,
            "output_dir": tmp_path / "run",
            "train_data": (str(pairs),),
            "lora": LoraConfig(rank=4),
            "num_pairs": 4,
            "train_batch_size": 4,
            "max_train_steps": 3,
            "learning_rate": 1e-3,
            "beta": 500.0,
            "eval_num_steps": 2,
        }
        if not changes.get("train_data", True):
            del settings["num_pairs"]  # an online run has none
        return DiffusionDPOConfig(**(settings | changes))

    return make


@pytest.fixture
def refl(tmp_path):
    """A configuration of ReFL, of a preset; see ``made_refl.config``."""
    return partial(config, tmp_path)
