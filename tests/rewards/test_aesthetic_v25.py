"""The aesthetic predictor v2.5 against its formula, and its file, which only a user can give."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SiglipImageProcessorPil, SiglipVisionModel

from diffalign.rewards import get_reward
from diffalign.rewards.aesthetic_v25 import Head
from diffalign.rewards.base import RewardUnavailable
from tests.rewards.test_mps import IMAGES, PROMPTS

DATA = [{}] * 3


@torch.no_grad()
def test_the_score_is_the_published_formula(siglip_folder, small):
    model = SiglipVisionModel.from_pretrained(siglip_folder).double().eval()
    processor = SiglipImageProcessorPil(size={"height": 28, "width": 28}, resample=3)
    state = torch.load(siglip_folder / "head.pth", weights_only=True)
    expected = []
    for image in IMAGES:
        picture = Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy())
        hidden = model(pixel_values=processor(picture, return_tensors="pt")["pixel_values"].double()).pooler_output[0]
        hidden = hidden / hidden.norm()
        for layer in (0, 2, 4, 6, 8):
            weight, bias = (state[f"scoring_head.{layer}.{part}"].double() for part in ("weight", "bias"))
            hidden = weight @ hidden + bias
        expected.append(hidden.item())
    found = get_reward("aesthetic_v2.5", **small["aesthetic_v2.5"], precision="fp64")(IMAGES, PROMPTS, DATA)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_head_has_the_published_names_and_shapes():
    """As listed from the published file."""
    widths = {0: (1024, 1152), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 8: (1, 16)}
    expected = {f"scoring_head.{i}.weight": shape for i, shape in widths.items()}
    expected |= {f"scoring_head.{i}.bias": shape[:1] for i, shape in widths.items()}
    with torch.device("meta"):
        assert {name: tuple(tensor.shape) for name, tensor in Head(1152).state_dict().items()} == expected


def test_the_licence_is_said_before_a_file_is_asked_for():
    with pytest.raises(RewardUnavailable, match=r"AGPL-3.0 and not downloaded for you: get .*v2_5.pth.*options: {path"):
        get_reward("aesthetic_v2.5")(IMAGES.float(), PROMPTS, DATA)


@pytest.mark.parametrize("spoil", ["cut", "lost", "code", "missing"])
def test_files_that_do_not_fit_are_refused(spoil, siglip_folder, small, tmp_path):
    file, state = tmp_path / "head.pth", torch.load(siglip_folder / "head.pth", weights_only=True)
    if spoil == "lost":
        del state["scoring_head.8.bias"]
    torch.save(Head(24) if spoil == "code" else state, file)
    if spoil == "cut":
        file.write_bytes(file.read_bytes()[:2000])
    if spoil == "missing":
        file.unlink()
    with pytest.raises(RewardUnavailable, match=r"cannot be loaded|there is no file") as caught:
        get_reward("aesthetic_v2.5", **{**small["aesthetic_v2.5"], "path": str(file)})(IMAGES.float(), PROMPTS, DATA)
    assert len(str(caught.value)) < 2000
