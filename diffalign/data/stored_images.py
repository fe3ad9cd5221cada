"""Write encoded images of tables to files, so that prompts name each source image by a path."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from diffalign import media
from diffalign.atomic import replacing

FOLDER = "diffalign/sources"  # in the user's cache


def stored_image(content: bytes) -> Path:
    """Write an encoded image to the cache, named by its content, unless it is there; return its path.

    Raises:
        ValueError: Not an image.
    """
    media.size(content)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / FOLDER
    path = cache / f"{hashlib.blake2b(content, digest_size=16).hexdigest()}.img"
    if not path.is_file() or path.stat().st_size != len(content):
        cache.mkdir(parents=True, exist_ok=True)
        with replacing(path) as staged:
            staged.write_bytes(content)
    return path
