"""One file, one set of pixels: every command decodes pictures alike, or refuses them by name."""

import base64
import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from diffalign import media
from diffalign.cli import main
from diffalign.commands.image_sources import read
from diffalign.data.config import PreferenceDataConfig
from diffalign.data.images import decode, to_uint8
from diffalign.data.pairs import load_pairs
from diffalign.data.validation import SampleError
from diffalign.rewards.support.http_client import decode_images
from diffalign.rewards.support.images import as_image
from diffalign.structures import ImageSource
from tests.data.preference_files import jsonl

RGB = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
RAMP = np.linspace(0, 1, 12 * 16).reshape(12, 16)
PLAIN = Image.fromarray(RGB)


def grey(levels: np.ndarray) -> Image.Image:
    return Image.fromarray((levels * 255).round().astype(np.uint8)).convert("RGB")


EIGHT = grey(RAMP)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned(kind: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(PLAIN.transpose(Image.Transpose.ROTATE_90), kind, exif=exif, lossless=True)


def tiff_12_bits() -> bytes:
    """Grey from 0 to 4095, two pixels in three bytes."""
    levels = (RAMP * 4095).round().astype(int).ravel()
    bits = "".join(f"{level:012b}" for level in levels)
    data = int(bits, 2).to_bytes(len(bits) // 8, "big")
    tags = {256: 16, 257: 12, 258: 12, 259: 1, 262: 1, 273: 8 + 2 + 9 * 12 + 4, 277: 1, 278: 12, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + data


GREY_16 = Image.fromarray((RAMP * 65535).round().astype(np.uint16))
PALETTE = PLAIN.quantize(16)
# File name -> (content, what it shows).
GOOD = {
    "turned.png": (turned("PNG"), PLAIN),
    "turned.webp": (turned("WEBP"), PLAIN),
    "turned.tif": (turned("TIFF"), PLAIN),
    "grey16.png": (encoded(GREY_16, "PNG"), EIGHT),
    "grey16.tif": (encoded(GREY_16, "TIFF"), EIGHT),
    "grey16.ppm": (encoded(GREY_16, "PPM"), EIGHT),
    "white_is_zero.tif": (encoded(GREY_16, "TIFF", tiffinfo={262: 0}), Image.eval(EIGHT, lambda level: 255 - level)),
    "grey12.tif": (tiff_12_bits(), grey((RAMP * 4095).round() / 4095)),
    "int32.tif": (encoded(Image.fromarray((RAMP * 65535).round().astype(np.int32)), "TIFF"), EIGHT),
    "float.tif": (encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), EIGHT),
    "cmyk.tif": (encoded(PLAIN.convert("CMYK"), "TIFF"), PLAIN.convert("CMYK").convert("RGB")),
    "palette.png": (encoded(PLAIN.convert("P"), "PNG"), PLAIN.convert("P").convert("RGB")),
    "palette_alpha.png": (encoded(PALETTE, "PNG", transparency=bytes(range(0, 256, 16))), PALETTE.convert("RGB")),
    "alpha.png": (encoded(Image.merge("RGBA", (*PLAIN.split(), Image.new("L", PLAIN.size))), "PNG"), PLAIN),
    "grey_alpha.png": (encoded(PLAIN.convert("LA"), "PNG"), PLAIN.convert("L").convert("RGB")),
    "bits.png": (encoded(PLAIN.convert("1"), "PNG"), PLAIN.convert("1").convert("RGB")),
    "animated.png": (encoded(PLAIN, "PNG", save_all=True, append_images=[EIGHT]), PLAIN),
    "pages.tif": (encoded(PLAIN, "TIFF", save_all=True, append_images=[EIGHT]), PLAIN),
}


def wide(values: np.ndarray) -> bytes:
    return encoded(Image.fromarray(values), "TIFF")


# File name -> (content, why it is refused).
BAD = {
    "float_255.tif": (wide((RAMP * 255).astype(np.float32)), "which value is white"),
    "negative.tif": (wide((RAMP - 0.5).astype(np.float32)), "which value is white"),
    "nan.tif": (wide(np.full((4, 4), np.nan, np.float32)), "which value is white"),
    "int32_255.tif": (wide((RAMP * 255).astype(np.int32)), "which value is white"),
    "int32_wide.tif": (wide((RAMP * 2**30).astype(np.int32)), "which value is white"),
    "drawing.eps": (encoded(PLAIN, "EPS"), "PostScript, a program, is not read"),
    "script.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript, a program, is not read"),
    "icon.png": (encoded(PLAIN, "ICO"), "not an image"),
    "page.png": (b"%PDF-1.7", "a PDF is not read"),
    "truncated.png": (encoded(PLAIN, "PNG")[:60], "truncated|broken"),
    "damaged.tif": (b"II*\0" + b"\xff" * 50, "."),
}


def by_trainer(path):
    return to_uint8(decode(ImageSource(path.name, path)))


def by_score(path):
    return next(read(str(path))).load()


def by_table_of_score(path):
    return next(read(str(jsonl(path.with_suffix(".jsonl"), [{"image": path.name}])))).load()


def by_parquet_of_score(path):
    rows = {"image": [path.read_bytes()], "prompt": ["p"]}
    Dataset.from_dict(rows).to_parquet(path.with_suffix(".parquet"))
    return next(read(str(path.with_suffix(".parquet")))).load()


def by_server(path):
    return decode_images([base64.b64encode(path.read_bytes())])[0].float() / 255


def by_pairs(path):
    """As check, relabel and the trainers read a table."""
    Image.new("RGB", (3, 3)).save(path.parent / "other.bmp")
    row = {"prompt": "p", "chosen": path.name, "rejected": "other.bmp"}
    data = load_pairs(jsonl(path.parent / "pairs.jsonl", [row]), settings=PreferenceDataConfig(min_side=1, scan=0))
    return to_uint8(decode(data[0].winner))


def by_mask(path):
    Image.new("RGB", (3, 3)).save(path.parent / "other.bmp")
    row = {"prompt": "p", "chosen": "other.bmp", "rejected": "other.bmp", "mask": path.name}
    settings = PreferenceDataConfig(min_side=1, scan=0, mask="mask")
    return to_uint8(decode(load_pairs(jsonl(path.parent / "masks.jsonl", [row]), settings=settings)[0].mask))


READERS = [by_trainer, by_score, by_table_of_score, by_parquet_of_score, by_server, by_pairs, by_mask, as_image]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", GOOD)
def test_a_file_is_the_same_picture_in_every_command(reader, name, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    content, shown = GOOD[name]
    (tmp_path / name).write_bytes(content)
    found = reader(tmp_path / name)
    levels = found if found.dtype == torch.uint8 else (found * 255).round().to(torch.uint8)
    assert torch.equal(levels, torch.from_numpy(np.array(shown)).permute(2, 0, 1))
    assert found.dtype == torch.uint8 or torch.equal(found, levels.float() / 255)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", BAD)
def test_images_that_cannot_be_decoded_exactly_are_refused_by_name(reader, name, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    content, why = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, SampleError), match=why) as caught:
        reader(tmp_path / name)
    if reader not in (by_server, by_parquet_of_score):  # there a picture has no file
        assert name in str(caught.value)


@pytest.mark.parametrize("name", GOOD)
def test_an_image_that_pil_opened_is_that_of_its_file(name, tmp_path):
    (tmp_path / name).write_bytes(GOOD[name][0])
    with Image.open(tmp_path / name) as opened:
        assert torch.equal(as_image(opened), as_image(tmp_path / name))


def test_formats_that_start_programs_are_not_tried(tmp_path, monkeypatch):
    """Ghostscript would be asked for by PIL's reader of EPS, whatever the file is called."""
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: pytest.fail("a program was started"))
    monkeypatch.setattr(media, "_REFUSED", ())
    with pytest.raises(Image.UnidentifiedImageError):
        media.decode(encoded(PLAIN, "EPS"))
    assert not {"EPS", "WMF", "FITS", "BUFR", "GRIB", "HDF5", "MPEG"} & set(media.FORMATS)


@pytest.mark.parametrize("kind", ["fifo", "device"])
@pytest.mark.parametrize("command", ["check", "relabel", "score", "as_image", "train"])
def test_only_regular_files_are_opened(kind, command, tmp_path, capsys):
    """Each of these would hang, or read for ever."""
    strange, folder = tmp_path / "strange.png", str(tmp_path)
    os.mkfifo(strange) if kind == "fifo" else strange.symlink_to("/dev/zero")
    PLAIN.save(tmp_path / "good.png")
    EIGHT.save(tmp_path / "other.png")
    rows = [{"prompt": "p", "chosen": "strange.png", "rejected": "good.png"}]
    rows += [{"prompt": "p", "chosen": "other.png", "rejected": "good.png"}]
    pairs = str(jsonl(tmp_path / "pairs.jsonl", rows))
    if command == "as_image":
        with pytest.raises(ValueError, match="not a regular file"):
            as_image(strange)
    elif command == "train":
        with pytest.raises(ValueError, match="not a regular file"):
            load_pairs(pairs, settings=PreferenceDataConfig(allow_outside=True))
    elif command == "score":
        options = ["--prompt", "x", "--output_dir", str(tmp_path / "out"), "--allow_outside"]
        assert main(["score", folder, "--rewards", "brightness", *options]) == 0
        assert "strange.png cannot be read as a picture: not a regular file" in capsys.readouterr().out
    else:
        options = ["--rewards", "brightness"] if command == "relabel" else []
        main([command, pairs, "--allow_outside", *options])
        assert "not a regular file" in capsys.readouterr().out


def test_a_file_of_too_many_bytes_is_not_read(tmp_path):
    with (tmp_path / "sparse.png").open("wb") as file:
        file.truncate((1 << 29) + 1)
    with pytest.raises(ValueError, match=r"sparse\.png .*larger than 536,870,912 bytes"):
        as_image(tmp_path / "sparse.png")
    with pytest.raises(SampleError, match="larger than"):
        decode(ImageSource("sparse", tmp_path / "sparse.png"))


def test_the_area_is_checked_before_anything_is_decoded():
    head = b"IHDR" + struct.pack(">IIBBBBB", 1000, 1001, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    with pytest.raises(ValueError, match="1000 x 1001 pixels are too many"):
        media.decode(png + struct.pack(">I", 0) + b"IDAT" + b"\x35\xaf\x06\x1e", max_pixels=1_000_000)


def test_a_palette_with_transparency_warns_of_nothing(recwarn):
    content, shown = GOOD["palette_alpha.png"]
    assert media.decode(content).tobytes() == shown.tobytes()
    assert not recwarn.list
