"""Single-file checkpoints as models: ``sd_xl_base.safetensors``, as ComfyUI and kohya's scripts use them.

    model: sd_xl_base_1.0.safetensors
    model: flux1-dev.safetensors?base=black-forest-labs/FLUX.1-dev
    model: owner/name/blob/main/file.safetensors?base=my/folder

A file has weights alone. Configuration, scheduler, tokenizers, and parts that the file lacks (text encoders and VAE of
a file with a transformer only) come from the base, a folder in diffusers' layout or a hub id; by default the repository
that diffusers knows for files of this kind. diffusers converts the weights.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.embedded import located
from diffalign.files import shorten

if TYPE_CHECKING:
    import torch

SUFFIX = ".safetensors"
OTHERS = (".ckpt", ".pt", ".pth", ".bin", ".gguf")
HUB_FILE = re.compile(
    r"(?:https?://(?:www\.)?(?:huggingface\.co|hf\.co)/)?([\w.-]+/[\w.-]+)/(?:blob|resolve)/([\w.-]+)/(.+)"
)
# Parts besides the denoiser -> prefixes of their tensors.
VAE = ("first_stage_model.", "vae.")
TEXT_ENCODERS: dict[str, dict[str, str]] = {
    "StableDiffusionPipeline": {"text_encoder": "cond_stage_model."},
    "StableDiffusionXLPipeline": {
        "text_encoder": "conditioner.embedders.0.",
        "text_encoder_2": "conditioner.embedders.1.",
    },
    "StableDiffusion3Pipeline": {
        "text_encoder": "text_encoders.clip_l.",
        "text_encoder_2": "text_encoders.clip_g.",
        "text_encoder_3": "text_encoders.t5xxl.",
    },
    "FluxPipeline": {"text_encoder": "text_encoders.clip_l.", "text_encoder_2": "text_encoders.t5xxl."},
}
TEXT_ENCODERS["FluxKontextPipeline"] = TEXT_ENCODERS["FluxPipeline"]
ELSEWHERE = (*VAE, "cond_stage_model.", "conditioner.", "text_encoders.", "model_ema.")
DENOISER = re.compile(r"^(model\.diffusion_model\.)?(layers|blocks|\w+_blocks)\.")
LORA = re.compile(r"lora_[AB]\b|lora_(up|down)\b|^lora_")
SCALED = re.compile(r"\.(scale_weight|weight_scale|scale_input)$|^scaled_fp8$")


@dataclass(frozen=True)
class SingleFile:
    """The name of a single-file model.

    Attributes:
        text: As written.
        name: Path of the file, or its name on the hub.
        base: Folder or hub id of all that is not in the file; None: the repository that diffusers knows.
    """

    text: str
    name: str
    base: str | None = None

    @property
    def on_hub(self) -> tuple[str, str, str] | None:
        """Repository, revision and file on the hub; None for a local or remote file."""
        match = None if Path(self.name).exists() else HUB_FILE.fullmatch(self.name)
        return None if match is None else (match[1], match[2], match[3])

    def path(self) -> Path:
        """Return the local file; one of the hub is downloaded. FileNotFoundError: it does not exist."""
        if (hub := self.on_hub) is not None:
            from huggingface_hub import hf_hub_download

            return Path(hf_hub_download(hub[0], hub[2], revision=hub[1]))
        path = Path(self.name)
        if not path.is_file():
            raise FileNotFoundError(
                f"model {shorten(self.name)}: no such file; check the path, or write owner/name/blob/main/FILE (hub)"
            )
        return path


def single_file(model: str | Path) -> SingleFile | None:
    """Parse the name of a single-file model; None for a folder, a hub id or an embedded model.

    Raises:
        ValueError: A file that is not safetensors, or an option other than ``base``.
    """
    text = str(model)
    name, mark, options = (text, "", "") if os.path.exists(text) else text.partition("?")
    suffix = Path(name).suffix.lower()
    if suffix not in (SUFFIX, *OTHERS) or Path(name).is_dir():
        return None
    if suffix != SUFFIX:
        raise ValueError(
            f"model {shorten(name)}: {suffix} files are not read (pickles can run code); convert it to {SUFFIX}, or "
            "give a folder in diffusers' layout"
        )
    key, equals, base = options.partition("=")
    if mark and (key != "base" or not equals or not base):
        raise ValueError(f"model {shorten(text)}: write FILE{SUFFIX}?base=FOLDER or ?base=owner/name")
    return SingleFile(text, name, base or None)


def is_local(model: str | Path) -> bool:
    """Return whether the files of a model, of a single file those of its base too, are on this machine."""
    found = single_file(model)
    return Path(model).exists() if found is None else found.on_hub is None and Path(layout(model)).exists()


def layout(model: str | Path) -> str | Path:
    """Return the folder or hub id with a model's configuration: of a single file its base, else the model itself."""
    found = single_file(model)
    if found is None:
        return model
    return str(located(found.base, "model")) if found.base else _known_base(found)


def _known_base(found: SingleFile) -> str:
    """Return the repository that diffusers knows for a kind of file. ValueError: the kind is not known."""
    path = found.path()
    return _detected(str(path), path.stat().st_mtime_ns)


@lru_cache
def _detected(path: str, changed: int) -> str:
    from diffusers.loaders.single_file_utils import fetch_diffusers_config

    shapes = header(path)
    check_kind(path, shapes)
    try:
        return str(fetch_diffusers_config(shapes)["pretrained_model_name_or_path"])
    except (KeyError, ValueError, IndexError, RuntimeError) as error:
        raise ValueError(
            f"model {shorten(path)}: diffusers does not know files of this kind ({shorten(error)}); name its base: "
            "FILE?base=owner/name"
        ) from error


def header(path: str | Path) -> dict[str, torch.Tensor]:
    """Read names, shapes and dtypes of a safetensors file, as tensors without values. ValueError: it is damaged."""
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"model {shorten(path)}: cannot be read ({shorten(error)}); copy it again") from error
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def check_kind(path: str | Path, names: Mapping[str, Any]) -> None:
    """Raise ValueError for a file that is no model: a LoRA, scaled fp8 weights, or no denoiser in it."""
    where = f"model {shorten(path)}"
    if any(LORA.search(name) for name in names):
        raise ValueError(f"{where}: is a LoRA, not a model; give its base as model, and this file as lora.init")
    if any(SCALED.search(name) for name in names):
        raise ValueError(
            f"{where}: has scaled fp8 weights, which are not converted; give its fp16, bf16 or plain fp8 file"
        )
    if not any(DENOISER.match(name) for name in names):
        some = ", ".join(list(names)[:3]) or "nothing"
        raise ValueError(f"{where}: has no known UNet or transformer (it has {shorten(some)}); give another file")


def held_parts(found: SingleFile, pipeline: str, denoiser: str) -> set[str]:
    """Return the parts of a pipeline that a single file holds."""
    names = header(found.path())
    parts = {"vae": VAE, **{name: (prefix,) for name, prefix in TEXT_ENCODERS.get(pipeline, {}).items()}}
    return {denoiser, *(name for name, prefixes in parts.items() if any(key.startswith(prefixes) for key in names))}


def load_parts(
    found: SingleFile, pipeline: str, index: Mapping[str, Any], denoiser: str, dtype: torch.dtype, **options: Any
) -> dict[str, Any]:
    """Load the parts of a pipeline that a single file holds.

    Args:
        found: The file.
        pipeline: Pipeline class of its base.
        index: ``model_index.json`` of its base.
        denoiser: "unet" or "transformer".
        dtype: Dtype of the parts.
        options: Of the denoiser's ``from_single_file``.

    Raises:
        ValueError: It does not fit the base, or is no model.
    """
    import diffusers
    from safetensors.torch import load_file

    path, base = found.path(), str(layout(found.text))
    check_kind(path, header(path))
    tensors = load_file(path)
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith(ELSEWHERE)}
    with _fitting(found, base):
        parts = {denoiser: _from_file(getattr(diffusers, index[denoiser][1]), own, base, denoiser, dtype, options)}
        if vae := {name: tensor for name, tensor in tensors.items() if name.startswith(VAE)}:
            parts["vae"] = _from_file(getattr(diffusers, index["vae"][1]), vae, base, "vae", dtype, {})
        for name, prefix in TEXT_ENCODERS.get(pipeline, {}).items():
            texts = {key: tensor for key, tensor in tensors.items() if key.startswith(prefix)}
            if texts and (index.get(name) or [None])[0] is not None:
                parts[name] = _text_encoder(index[name][1], texts, base, name, dtype)
    for name, part in parts.items():
        _check_complete(found, base, name, part)
    return parts


@contextmanager
def _fitting(found: SingleFile, base: str) -> Iterator[None]:
    """Raise ValueError where diffusers' conversion fails, as it does for files of another kind than the base."""
    import torch
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (LookupError, RuntimeError, AttributeError, TypeError, ValueError, SingleFileComponentError) as error:
        if isinstance(error, ValueError) and str(error).startswith("diffusers reads"):
            raise
        what = f"{type(error).__name__}: {shorten(str(error).strip(), 300)}"
        raise ValueError(
            f"model {shorten(found.text)}: its tensors do not fit {shorten(base)} ({what}); name the base that it was "
            "made from: FILE?base=owner/name"
        ) from error


def _from_file(kind: Any, tensors: dict[str, Any], base: str, name: str, dtype: Any, options: Mapping[str, Any]) -> Any:
    if not hasattr(kind, "from_single_file"):
        raise ValueError(f"diffusers reads no single files of a {kind.__name__}; give a folder in diffusers' layout")
    return kind.from_single_file(tensors, config=base, subfolder=name, dtype=dtype, **options)


def _text_encoder(kind: str, tensors: dict[str, Any], base: str, name: str, dtype: Any) -> Any:
    """Convert a text encoder as diffusers' pipelines do; theirs come without a public method of their own."""
    import transformers
    from diffusers.loaders import single_file_utils as convert

    t5 = convert.is_t5_in_single_file(tensors)
    make = convert.create_diffusers_t5_model_from_checkpoint if t5 else convert.create_diffusers_clip_model_from_ldm
    part = make(getattr(transformers, kind), tensors, subfolder=name, config=base, torch_dtype=dtype)
    part.tie_weights()
    own = next((tensor for key, tensor in tensors.items() if key.endswith("transformer.text_projection.weight")), None)
    if own is not None and hasattr(part, "text_projection"):  # diffusers puts the identity there, as files without have
        part.text_projection.weight.data.copy_(own)
    return part.eval()


def _check_complete(found: SingleFile, base: str, name: str, part: Any) -> None:
    """Raise ValueError where the file left weights of a part without values."""
    empty = [key for key, tensor in part.named_parameters() if tensor.device.type == "meta"]
    if empty:
        total = sum(1 for _ in part.named_parameters())
        raise ValueError(
            f"model {shorten(found.text)}: lacks {len(empty)} of {total} tensors of the {name} of {shorten(base)}, "
            f"such as {empty[0]}; name the base that it was made from: FILE?base=owner/name"
        )
