"""Files that a run writes into its folder: protect files of others, and write the manifest of the exports."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from diffalign.atomic import keep_aside, write_text
from diffalign.config import from_dict, load_yaml, save_yaml, to_yaml
from diffalign.log import get_logger
from diffalign.runtime.checkpoint import has_checkpoints, put_aside, sweep
from diffalign.runtime.manifest import checked, manifest_text

logger = get_logger(__name__)

EXPORTS = "exports.json"
CONFIG, CARD = "config.yaml", "README.md"
LOGS = ("metrics.jsonl", "skipped.jsonl", "train.log")
FILES = (CONFIG, CARD, EXPORTS, *LOGS, "curves.png", "curves_all.png", "compare.png", "hacking.png")
WEIGHTS = ("pytorch_lora_weights.safetensors", "negative_prompt.safetensors")
FOLDERS = ("samples", "raw", "rollouts")
DENOISERS = ("unet", "transformer")


def check_products(folder: Path) -> None:
    """Raise ValueError if something in the folder conflicts with what the run will write."""
    for name in (*FILES, *WEIGHTS):
        if os.path.lexists(folder / name) and not (folder / name).is_file():
            raise ValueError(f"{folder / name} is not a regular file: move it away, or choose another output_dir")
    for name in FOLDERS:
        if os.path.lexists(folder / name) and not (folder / name).is_dir():
            raise ValueError(f"{folder / name} is not a folder: move it away, or choose another output_dir")
    if (folder / "model_index.json").exists():
        raise ValueError(
            f"output_dir {folder} is the folder of a model: choose another one, its files would be replaced"
        )


def keep_others(args: Any) -> dict[str, Path]:
    """Rename files that this package did not write and the run would replace; return name -> new path.

    In a folder without a run these are all files; in the folder of a run, a model card that was edited, and a
    configuration that has comments or was written by hand.
    """
    folder = args.output_dir
    manifest, _ = checked(folder / EXPORTS)
    generated = is_generated(args, folder / CONFIG)
    if manifest or generated or has_checkpoints(folder):
        edited = (folder / CARD).is_file() and CARD in manifest.get("files", {}) and _is_changed(folder, CARD)
        others = [name for name, foreign in ((CONFIG, not generated), (CARD, edited)) if foreign]
    else:
        every = (*FILES, *WEIGHTS, *DENOISERS, *args.products)
        others = [name for name in every if name not in LOGS]  # logs are kept by themselves
    return {name: aside for name in others if (aside := keep_aside(folder / name))}


def _is_changed(folder: Path, name: str) -> bool:
    return any(str(folder / name) in problem for problem in checked(folder / EXPORTS)[1])


def is_generated(args: Any, path: Path) -> bool:
    """Return whether a configuration file is, byte for byte, what ``save_config`` writes for this trainer."""
    try:
        return to_yaml(from_dict(type(args), load_yaml(path))) == path.read_text(encoding="utf-8")
    except (ValueError, OSError):
        return False


def portable(args: Any) -> Any:
    """Return the configuration, with an ``output_dir`` within the working folder made relative to it."""
    here = Path.cwd()
    inside = args.output_dir.is_relative_to(here) and args.output_dir != here
    return dataclasses.replace(args, output_dir=args.output_dir.relative_to(here)) if inside else args


def save_config(args: Any) -> None:
    """Write the configuration into the run folder."""
    save_yaml(portable(args), args.output_dir / CONFIG)


def prepare_folder(args: Any, resumed: bool) -> None:
    """Clear the run folder for a run that starts or resumes: rename what others wrote, and write the configuration."""
    folder = args.output_dir
    sweep(folder)
    if not resumed and (aside := put_aside(folder)):
        logger.info(f"checkpoints of an earlier run are in {aside}")
    for name, kept in keep_others(args).items():
        logger.info(f"{name} in {folder} was not written by this run: it is now {kept.name}")
    (folder / EXPORTS).unlink(missing_ok=True)  # the run is not finished any more
    save_config(args)


def write_exports(folder: Path, step: int, written: Iterable[Path]) -> None:
    """Write the manifest of the exports of a finished run; a folder stands for all files in it."""
    files = {file for path in written for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()}
    names = [file.relative_to(folder).as_posix() for file in files]
    write_text(folder / EXPORTS, manifest_text(folder, step, names))


def is_exported(folder: Path, step: int) -> bool:
    """Return whether the exports of a step are in the folder, byte for byte as they were written."""
    manifest, problems = checked(folder / EXPORTS)
    return not problems and manifest["step"] == step


def all_exported(accelerator: Accelerator, args: Any, step: int) -> bool:
    """Return whether the exports of ``step`` are complete; the main process checks for all."""
    found = [is_exported(args.output_dir, step)]
    if accelerator.num_processes > 1:
        broadcast_object_list(found)
    return found[0]
