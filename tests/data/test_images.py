"""Good and bad image files: each is read as it should be, or named with its reason."""

import errno
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.data.config import PreferenceDataConfig
from diffalign.data.images import content_key, decode, decode_sample, to_uint8
from diffalign.data.pairs import load_pairs
from diffalign.data.validation import DataWarning, SampleError
from diffalign.structures import ImageSource, Pair, Prompt
from tests.data.preference_files import encoded, picture

SIZE = (24, 20)
PLAIN = picture(1, SIZE)


def bomb(path):
    """The head of a PNG of 20,000 x 20,000 pixels; nothing may decode what follows."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    chunks = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks + struct.pack(">I", 0) + b"IDAT" + b"\x35\xaf\x06\x1e")


def turned(path):
    """A picture that its EXIF data say to turn a quarter, as cameras write it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    PLAIN.transpose(Image.Transpose.ROTATE_90).save(path, "PNG", exif=exif)


def animated(path):
    PLAIN.save(path, "PNG", save_all=True, append_images=[picture(2, SIZE)])


def dangling(path):
    path.symlink_to(path.parent / "gone.png")


BAD = {
    "zero.png": (lambda path: path.write_bytes(b""), "not an image"),
    "truncated.jpg": (lambda path: path.write_bytes(encoded(1, (200, 200))[:3000]), "truncated"),
    "truncated.png": (lambda path: path.write_bytes(encoded(1, (200, 200), "PNG")[:3000]), "truncated|broken"),
    "text.png": (lambda path: path.write_text("no picture"), "not an image"),
    "bomb.png": (bomb, "decompression bomb"),
    "dangling.png": (dangling, "no such file"),
    "folder.png": (lambda path: path.mkdir(), "is a directory"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named_with_its_reason(name, tmp_path):
    make, reason = BAD[name]
    make(tmp_path / name)
    with pytest.raises(SampleError, match=f"{name}: .*({reason})") as caught:
        decode(ImageSource(str(tmp_path / name), tmp_path / name))
    assert caught.value.kind == "unreadable"


def test_a_file_without_permission_is_named():
    """As root, who may read everything, runs tests too, nothing is really locked here."""

    def locked():
        raise PermissionError(errno.EACCES, "Permission denied")

    with pytest.raises(SampleError, match=r"locked\.png: permission denied"):
        decode(ImageSource("locked.png", locked))


def test_a_bomb_below_the_error_of_pil_is_refused_too(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 20 - 1)
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(SampleError, match="24 x 20 pixels are too many: a decompression bomb"),
    ):
        decode(ImageSource("a", encoded(1)))


def grey_16(path):
    ramp = np.linspace(0, 65535, 24 * 20).round().astype(np.uint16).reshape(20, 24)
    Image.fromarray(ramp).save(path, "PNG")


def alpha(path):
    image = PLAIN.convert("RGBA")
    image.putalpha(0)
    image.save(path, "PNG")


RAMP = np.round(np.round(np.linspace(0, 65535, 24 * 20)) / 257).astype(np.uint8).reshape(20, 24)
GOOD = {
    "jpeg.png": (lambda path: path.write_bytes(encoded(1)), Image.open(io.BytesIO(encoded(1)))),
    "cmyk.jpg": (lambda path: PLAIN.convert("CMYK").save(path, "TIFF"), PLAIN.convert("CMYK").convert("RGB")),
    "grey16.png": (grey_16, Image.fromarray(RAMP).convert("RGB")),
    "alpha.png": (alpha, PLAIN),
    "palette.png": (lambda path: PLAIN.convert("P").save(path), PLAIN.convert("P").convert("RGB")),
    "animated.png": (animated, PLAIN),
    "turned.png": (turned, PLAIN),
    "one.png": (lambda path: Image.new("RGB", (1, 1), (1, 2, 3)).save(path), Image.new("RGB", (1, 1), (1, 2, 3))),
}


@pytest.mark.parametrize("name", GOOD)
def test_an_odd_file_is_read_as_it_looks(name, tmp_path):
    make, wanted = GOOD[name]
    make(tmp_path / name)
    found = decode(ImageSource(name, tmp_path / name))
    assert found.mode == "RGB"
    assert torch.equal(to_uint8(found), torch.from_numpy(np.array(wanted)).permute(2, 0, 1))


def test_a_file_name_that_is_not_utf8_is_read_and_can_be_printed(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/p\xff"))
    for side in ("chosen", "rejected"):
        (folder / side).mkdir(parents=True)
        place = os.fsencode(folder / side)
        Path(os.fsdecode(place + b"/caf\xe9.png")).write_bytes(encoded(len(side), kind="PNG"))
        Path(os.fsdecode(place + b"/bad\xe9.png")).write_bytes(b"")
    for stem in (b"caf\xe9", b"bad\xe9"):
        Path(os.fsdecode(os.fsencode(folder) + b"/chosen/" + stem + b".txt")).write_text("a text")
    with pytest.warns(DataWarning, match=r"bad\\xe9"):
        data = load_pairs(folder, settings=PreferenceDataConfig(max_bad_share=0.5))
    assert len(data) == 2
    assert data.load(0)[0].key == data.load(1)[0].key, "the bad one gives its place to the good one"
    data.load(0)[0].key.encode("utf-8")
    "\n".join(data.quarantine.lines()).encode("utf-8")


def pair(first, second, text="p"):
    images = (ImageSource("a", first), ImageSource("b", second))
    return Pair("row 3", Prompt(text), images, 1.0)


def test_errors_of_a_pair_are_reported():
    images, odd = decode_sample(pair(encoded(1), encoded(2, (30, 20))), min_side=21)
    assert [image.size for image in images] == [(24, 20), (30, 20)]
    assert [(error.kind, str(error)) for error in odd] == [
        ("too_small", "row 3: 24 x 20 and 30 x 20, min_side is 21"),
        ("different_size", "row 3: 24 x 20 and 30 x 20"),
    ]
    assert [error.kind for error in decode_sample(pair(encoded(1), encoded(1)))[1]] == ["same_image"]
    assert decode_sample(pair(encoded(1), encoded(2)))[1] == []
    with pytest.raises(SampleError, match="row 3: b: not an image"):
        decode_sample(pair(encoded(1), b"text"))
    with pytest.raises(SampleError, match="row 3: b: no image"):
        decode_sample(pair(encoded(1), None))


def test_the_content_of_a_pair_is_its_text_its_metadata_and_both_images_in_order():
    keys = {
        content_key(each)
        for each in (
            pair(encoded(1), encoded(2)),
            pair(encoded(2), encoded(1)),
            pair(encoded(1), encoded(3)),
            pair(encoded(1), encoded(2), "q"),
            Pair("k", Prompt("p", {"count": 1}), pair(encoded(1), encoded(2)).images, 1.0),
        )
    }
    assert len(keys) == 5
    other = Pair("another key", Prompt("p"), pair(encoded(1), encoded(2)).images, 0.0)
    assert content_key(other) == content_key(pair(encoded(1), encoded(2))), "keys and labels do not count"
