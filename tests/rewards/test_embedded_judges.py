"""The judges that the repository ships: real layouts, read by the real loaders, and right about shapes."""

import json
import random

import pytest
import torch

from diffalign.rewards import get_reward
from diffalign.shapes import caption, render, scene_for
from diffalign.shapes.captions import neighbours
from tests.conftest import ROOT

JUDGES = ROOT / "assets/judges"
RESULTS = json.loads((ROOT / "assets/results/judges.json").read_text())
OPTIONS = {
    "pickscore": {"path": JUDGES / "pickscore", "tokenizer": JUDGES / "pickscore"},
    "hpsv2.1": {"path": JUDGES / "hps"},
    "vqascore": {
        "path": JUDGES / "vqascore",
        "tokenizer": JUDGES / "vqascore",
        "answer": "yes_no",
        "precision": "no",
    },
    "aesthetic": {"path": JUDGES / "aesthetic/aesthetic-model.pth", "clip": JUDGES / "pickscore"},
}


def judge(name):
    return get_reward(name, **{key: str(value) for key, value in OPTIONS[name].items()})


@pytest.fixture(scope="module")
def pairs():
    """Held-out captions, an image that shows each, and one of a caption one word away, or of the same task."""
    rng = random.Random(0)
    prompts = [caption(rng, held_out=True) for _ in range(96)]
    right = render([scene_for(p.metadata, rng) for p in prompts])
    others = [neighbours(p.metadata) or [caption(rng, p.metadata["tag"]).metadata] for p in prompts]
    wrong = render([scene_for(rng.choice(specs), rng) for specs in others])
    return [p.text for p in prompts], right, wrong


@pytest.mark.parametrize("name", ["pickscore", "hpsv2.1", "vqascore"])
@torch.no_grad()
def test_a_judge_prefers_the_image_that_shows_the_caption(pairs, name):
    texts, right, wrong = pairs
    reward, metadata = judge(name), [{}] * len(texts)
    better, worse = reward(right, texts, metadata), reward(wrong, texts, metadata)
    assert (better > worse).float().mean() >= 0.85
    if name == "vqascore":
        assert torch.cat([better > 0.5, worse < 0.5]).float().mean() >= 0.9


@torch.no_grad()
def test_the_aesthetic_judge_prefers_shapes_to_smears(pairs):
    texts, right, _ = pairs
    smeared = torch.nn.functional.avg_pool2d(right, 9, 1, 4)
    reward, metadata = judge("aesthetic"), [{}] * len(texts)
    assert (reward(right, texts, metadata) > reward(smeared, texts, metadata)).float().mean() >= 0.9


def test_the_judges_agree_with_the_verifier_as_the_readme_says():
    assert RESULTS["pickscore"]["pairs"] >= 0.85
    assert RESULTS["hpsv2.1"]["pairs"] >= 0.85
    assert RESULTS["vqascore"]["answers"] >= 0.9


def test_they_are_small():
    size = sum(file.stat().st_size for file in JUDGES.rglob("*") if file.is_file())
    assert size == RESULTS["bytes"]
    assert size <= 12e6
