"""Cache tensors on disk by key, for results that are expensive and never change, such as latents of images."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

CHECKSUM = "checksum"


class TensorCache:
    """Store named tensors per key, one file each; ``folder=None`` disables the cache.

    A damaged, truncated or foreign file fails its checksum, counts as missing and is overwritten. Any number of
    processes may share a folder.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        """Return the file of a key, which may be any text."""
        assert self.folder is not None
        name = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=20).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def get(self, key: str) -> dict[str, Tensor] | None:
        """Return the stored tensors on the CPU, or None if they are missing or fail the checksum."""
        if self.folder is None:
            return None
        try:
            with safe_open(self.path(key), "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                known = (file.metadata() or {}).get(CHECKSUM)
        except (OSError, SafetensorError):
            return None
        return tensors if known == _checksum(key, tensors) else None

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Store tensors atomically: readers see the whole file or none."""
        if self.folder is None:
            return
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_suffix(f".{os.getpid()}.tmp")
        staged.write_bytes(save(plain, {CHECKSUM: _checksum(key, plain)}))
        os.replace(staged, path)


def _checksum(key: str, tensors: Mapping[str, Tensor]) -> str:
    """Hash the key with the tensors, to detect a file stored under another key's name."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"|{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(save({"": tensor}))
    return digest.hexdigest()
