"""Decode image files; every command uses this decoder, and so the same pixels."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from diffalign.files import shorten

# What PIL reads by itself: others start programs (EPS) or accept bytes of any kind.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "DIB", "GIF", "TIFF", "JPEG2000", "PPM", "QOI")
SUFFIXES = frozenset(
    [
        ".png",
        ".apng",
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".mpo",
        ".webp",
        ".avif",
        ".avifs",
        ".bmp",
        ".dib",
        ".gif",
        ".tif",
        ".tiff",
        ".jp2",
        ".j2k",
        ".jpf",
        ".jpx",
        ".j2c",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".pfm",
        ".qoi",
    ]
)
# Image files to their owner, which nothing here can decode: refused by name, not passed over.
UNREADABLE_SUFFIXES = frozenset(
    [
        ".eps",
        ".ps",
        ".svg",
        ".svgz",
        ".heic",
        ".heif",
        ".jxl",
        ".psd",
        ".xcf",
        ".tga",
        ".ico",
        ".icns",
        ".pcx",
        ".dds",
        ".exr",
        ".hdr",
        ".raw",
        ".dng",
        ".cr2",
        ".cr3",
        ".nef",
        ".arw",
        ".wmf",
        ".emf",
    ]
)

_REFUSED = (
    (0, b"%!PS", "PostScript, a program,"),
    (0, b"\xc5\xd0\xd3\xc6", "PostScript, a program,"),
    (0, b"%PDF", "a PDF"),
    (0, b"8BPS", "a Photoshop file"),
    (4, b"ftyphei", "HEIC"),
    (4, b"ftypmif1", "HEIF"),
    (0, b"<svg", "SVG"),
)  # (offset, first bytes, name)

# What PIL raises on broken or hostile files; SyntaxError and EOFError come from its PNG reader.
BROKEN = (OSError, ValueError, SyntaxError, EOFError, MemoryError, Image.DecompressionBombError)


def decode(content: bytes, max_pixels: int | None = None) -> Image.Image:
    """Decode an image file to RGB, 8 bits, upright by its EXIF orientation; the first frame of an animation.

    Grey is repeated, CMYK and palettes are converted and transparency is dropped, as published rewards do. Grey of 9 to
    16 bits is scaled; wider grey is read if its values determine the white (16 bits in 32, or floats in [0, 1]). The
    suffix of a file does not matter.

    max_pixels: the largest area, checked before anything is decoded; default: PIL's MAX_IMAGE_PIXELS.
    One of ``BROKEN``: no image, a truncated one, a format or a depth that cannot be read, or more pixels.
    """
    with _opened(content, max_pixels) as image:
        image.load()
        return to_rgb(image)


def size(content: bytes, max_pixels: int | None = None) -> tuple[int, int]:
    """Read (width, height) of the upright image from the header of a file. Arguments and errors as for ``decode``."""
    with _opened(content, max_pixels) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in range(5, 9)
        return image.size[::-1] if turned else image.size


def fitted(content: bytes, size: tuple[int, int]) -> Image.Image:
    """Decode an image, resize it to cover (height, width) and crop its centre. Errors as for ``decode``."""
    return ImageOps.fit(decode(content), size[::-1], Image.Resampling.LANCZOS)


@contextmanager
def _opened(content: bytes, max_pixels: int | None) -> Iterator[Image.Image]:
    if (kind := next((name for place, mark, name in _REFUSED if content.startswith(mark, place)), None)) is not None:
        raise ValueError(f"{kind} is not read; save it as PNG or JPEG")
    try:
        with Image.open(io.BytesIO(content), formats=_formats()) as image:
            if image.width * image.height > (max_pixels or Image.MAX_IMAGE_PIXELS or float("inf")):
                raise ValueError(f"{image.width} x {image.height} pixels are too many: a decompression bomb")
            yield image
    except BROKEN:
        raise
    except Exception as error:  # plugins of PIL raise anything on damaged files, such as struct.error
        raise ValueError(f"a damaged image ({type(error).__name__}: {shorten(error)})") from error


@cache
def _formats() -> tuple[str, ...]:
    """List the formats of ``FORMATS`` that this build of PIL has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image that PIL opened: see ``decode``. ValueError: a depth or colours without a conversion."""
    upright = ImageOps.exif_transpose(image)
    if not image.mode.startswith(("I", "F")):
        upright.info.pop("transparency", None)  # PIL warns where a palette has a table of it
        return upright.convert("RGB")
    values = np.asarray(upright).astype(np.float64)
    levels = values / _white(image, values)
    if image.format == "TIFF" and _tag(image, 262) == 0:  # WhiteIsZero, which PIL heeds with 8 bits only
        levels = 1 - levels
    return Image.fromarray((levels * 255).round().clip(0, 255).astype(np.uint8)).convert("RGB")


def _white(image: Image.Image, values: np.ndarray) -> float:
    """Determine the white value of grey that ``convert`` would clip. ValueError: file and values leave it open."""
    if image.mode.startswith("I;16"):
        return 4095 if image.format == "TIFF" and _tag(image, 258) in (12, (12,)) else 65535
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # 16 bits, which PIL widens
        return 65535
    low, high = values.min(), values.max()
    if image.mode == "F" and low >= 0 and high <= 1:
        return 1
    if image.mode == "I" and low >= 0 and 255 < high <= 65535:
        return 65535
    kind = "floating-point numbers" if image.mode == "F" else "32-bit integers"
    raise ValueError(f"grey in {kind} from {low:g} to {high:g}: which value is white? Save it with 8 or 16 bits")


def _tag(image: Image.Image, number: int) -> object:
    return getattr(image, "tag_v2", {}).get(number)


def reason(error: BaseException) -> str:
    """Say in a few words why an image cannot be read: for one of ``BROKEN``."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    return shorten(str(error) or type(error).__name__, 400)
