"""Tensors on disk by content: what is expensive to compute and never changes, such as latents of images."""

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
    """Named tensors under a key, a file each; None as the folder keeps nothing.

    A file that is damaged, cut short or somebody else's is not trusted: it counts as missing, and is written anew. Any
    number of processes may use a folder.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        """The file of a key; any text is one."""
        assert self.folder is not None
        name = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=20).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def get(self, key: str) -> dict[str, Tensor] | None:
        """What ``put`` stored, on the CPU; None where it is missing or does not verify."""
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
        """Stores tensors; readers see the whole file or none."""
        if self.folder is None:
            return
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_suffix(f".{os.getpid()}.tmp")
        staged.write_bytes(save(plain, {CHECKSUM: _checksum(key, plain)}))
        os.replace(staged, path)


def _checksum(key: str, tensors: Mapping[str, Tensor]) -> str:
    """Of the key as well, so that a file under another one's name is found out."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"|{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(save({"": tensor}))
    return digest.hexdigest()
