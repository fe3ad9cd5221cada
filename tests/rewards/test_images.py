"""Pictures of any kind become the tensors that PIL's RGB conversion gives."""

from collections import UserList

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.commands.score import score_images
from diffalign.rewards import as_image, as_images

RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def expected(picture):
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P", "1", "CMYK"])
def test_every_mode_is_converted_as_pil_does(mode, tmp_path):
    picture = Image.fromarray(RGB).convert(mode)
    assert torch.equal(as_image(picture), expected(picture))
    if mode != "CMYK":
        picture.save(tmp_path / "a.png")
        assert torch.equal(as_image(tmp_path / "a.png"), expected(picture))
        assert torch.equal(as_image(str(tmp_path / "a.png")), expected(picture))


def test_grey_of_16_bits_keeps_its_shades():
    levels = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    image = as_image(Image.fromarray(levels))
    assert torch.equal(image, (torch.tensor([[0, 1, 128, 255]]) / 255).expand(3, 1, 4)), "as the files of a training"


def test_arrays_and_tensors():
    wanted = expected(Image.fromarray(RGB))
    tensor = torch.from_numpy(RGB).permute(2, 0, 1)
    alpha = np.dstack([RGB, RGB[:, :, :1]])
    for picture in (RGB, RGB.astype(np.float32) / np.float32(255), tensor, tensor.float() / 255, alpha):
        assert torch.equal(as_image(picture), wanted)
    assert torch.equal(as_image(RGB[:, :, 0]), wanted[:1].expand(3, -1, -1))
    assert as_image(tensor.double() / 255).dtype == torch.float64


@pytest.mark.parametrize("kind", [list, tuple, UserList])
def test_any_sequence_is_several_images(kind):
    several = kind([RGB, Image.fromarray(RGB)])
    assert as_images(several).shape == (2, 3, 5, 7)
    assert score_images(several, "", kind(["brightness"]))["brightness"].shape == (2,)


def test_batches():
    batch = as_images([RGB, Image.fromarray(RGB)])
    assert batch.shape == (2, 3, 5, 7)
    assert torch.equal(batch[0], batch[1])
    assert torch.equal(as_images(batch), batch)
    assert torch.equal(as_images(RGB)[0], batch[0])
    assert as_images([]).shape == (0, 3, 1, 1)
    with pytest.raises(ValueError, match=r"of 2 sizes cannot be one batch: .*score_images"):
        as_images([RGB, RGB[:4]])


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.zeros((4, 4, 3), dtype=np.int64), r"an image of torch.int64: pass uint8"),
        (np.full((4, 4, 3), 255.0), "an image of floats up to 255: pass floats in"),
        (np.zeros((4, 4, 2), dtype=np.uint8), "is not an image"),
        (torch.zeros(4, 4), "is not an image"),
        (7, "a int is not an image: pass a PIL image, a path"),
        (None, "is not an image"),
    ],
)
def test_objects_that_are_no_image_are_refused(picture, message):
    with pytest.raises(ValueError, match=message):
        as_image(picture)


def test_files_that_are_missing_or_broken_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no picture at .*none\.png: check the path"):
        as_image(tmp_path / "none.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    with pytest.raises(ValueError, match=r"broken\.png cannot be read as a picture"):
        as_image(tmp_path / "broken.png")
