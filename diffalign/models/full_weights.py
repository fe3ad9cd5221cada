"""Load full weights of a denoiser after comparing them with the denoiser that they replace."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from diffalign.fsdp import plain_class
from diffalign.models.quiet import quiet_libraries

STEM = "diffusion_pytorch_model"
SHOWN = 4
Shapes = dict[str, tuple[int, ...]]


def load_full(original: nn.Module, folder: Path, allow_partial: bool) -> nn.Module:
    """Load full weights as a replacement of ``original``, on its device and in its dtype.

    Args:
        original: The pipeline's denoiser; not changed.
        folder: Written by ``save_pretrained``; fp16-only variants are accepted.
        allow_partial: Warn instead of raising if the folder has weights that the denoiser lacks.

    Raises:
        ValueError: Weights are missing, unexpected or of another shape; the folder holds another class or no
            safetensors; or a file is damaged.
    """
    kind = plain_class(original)
    try:
        written = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name", kind.__name__)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} is no JSON: copy the folder again") from error
    if written != kind.__name__:
        raise ValueError(
            f"{folder} holds a {written}, and this model's denoiser is a {kind.__name__}: give its own base"
        )
    variant, files = weight_files(folder)
    found = {name: shape for file in files for name, shape in _shapes(file).items()}
    extra = _compare(original, folder, found)
    if extra and not allow_partial:
        raise ValueError(f"{extra}: set allow_partial (--allow_partial) to leave them out")
    if extra:
        warnings.warn(extra, stacklevel=6)
    dtype = next(p.dtype for p in original.parameters() if p.is_floating_point())
    try:
        with quiet_libraries():
            other: nn.Module = kind.from_pretrained(folder, dtype=dtype, variant=variant, use_safetensors=True)
    except Exception as error:  # of diffusers, safetensors or accelerate
        raise ValueError(f"{folder} does not load: {str(error)[:500]}") from error
    return other.to(next(original.parameters()).device)


def weight_files(folder: Path) -> tuple[str | None, list[Path]]:
    """Return the variant of a folder's weights, None or "fp16", and their files. ValueError: no safetensors."""
    for variant in (None, "fp16"):
        whole = folder / (f"{STEM}.safetensors" if variant is None else f"{STEM}.{variant}.safetensors")
        index = folder / f"{STEM}.safetensors.index{'' if variant is None else '.' + variant}.json"
        if whole.is_file():
            return variant, [whole]
        if index.is_file():
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            return variant, [folder / name for name in sorted(names)]
    raise ValueError(f"{folder} has a config.json and no {STEM}.safetensors: save it with safe_serialization=True")


def _shapes(file: Path) -> Shapes:
    try:
        with safe_open(file, "pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is no readable safetensors file ({str(error)[:200]}): copy it again") from error


def _compare(original: nn.Module, folder: Path, found: Shapes) -> str:
    """Describe unexpected weights; empty if there are none. ValueError: missing weights or other shapes."""
    if getattr(original, "quantization_method", None) is not None:
        return ""  # quantised weights are packed and have other shapes
    wanted = {name: tuple(tensor.shape) for name, tensor in original.state_dict().items()}
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} of {len(wanted)} weights ({_few(missing)}): copy it again")
    if other := sorted(name for name in wanted if found[name] != wanted[name]):
        shapes = [f"{name} {found[name]} instead of {wanted[name]}" for name in other]
        raise ValueError(f"{folder}: {len(other)} weights have other shapes ({_few(shapes)}): give its own base model")
    return f"{folder}: {len(extra)} weights have no place in this model ({_few(extra)})" if extra else ""


def _few(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(name[:120] for name in names[:SHOWN]) + more
