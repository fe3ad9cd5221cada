"""Find a LoRA by its path or its id on the hub."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"  # of diffusers
HALF_NAME = WEIGHTS_NAME.replace(".safetensors", ".fp16.safetensors")
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
HUB_ID = re.compile(r"([\w][\w.-]*/[\w][\w.-]*)(?:/(.+\.safetensors))?")
HOW = "give a run folder, a checkpoint, a LoRA file or a hub id (owner/name, or owner/name/file.safetensors)"


def find_lora(name: str) -> Path:
    """Return the path of a LoRA, after downloading one that is named by its hub id.

    Args:
        name: A path; ``owner/name`` of a repository with one LoRA; or ``owner/name/file.safetensors``.

    Raises:
        FileNotFoundError: There is no such file or repository.
        ValueError: The repository holds several files, and none has the usual name.
    """
    if (path := Path(name)).exists():
        return path
    match = HUB_ID.fullmatch(name)
    if match is None or path.parent.is_dir():  # in a folder of this machine, it is misspelt
        raise FileNotFoundError(f"{name}: no such file or folder; {HOW}")
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return _download(match[1], match[2])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise FileNotFoundError(f"{name}: no such file or folder, and no LoRA on the hub ({why}); {HOW}") from error


def lora_file(path: Path) -> Path:
    """Return the file of a LoRA: ``path`` itself, or the one in a folder. FileNotFoundError: a folder without one."""
    if path.is_file():
        return path
    for name in (WEIGHTS_NAME, HALF_NAME, PEFT_WEIGHTS):
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(f"{path} holds no {WEIGHTS_NAME} and no {PEFT_WEIGHTS}; {HOW}")


def _download(repository: str, file: str | None) -> Path:
    from huggingface_hub import hf_hub_download, list_repo_files
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for usual in [file] if file else [WEIGHTS_NAME, PEFT_WEIGHTS]:
        try:
            found = Path(hf_hub_download(repository, usual))
        except EntryNotFoundError as error:
            if file or (isinstance(error, LocalEntryNotFoundError) and usual == PEFT_WEIGHTS):
                raise
            continue
        if usual == PEFT_WEIGHTS:
            hf_hub_download(repository, PEFT_CONFIG)
            for encoder in TEXT_ENCODERS:  # where ``diffalign export --format peft`` writes their adapters
                with suppress(EntryNotFoundError):
                    hf_hub_download(repository, f"{encoder}/{PEFT_WEIGHTS}")
                    hf_hub_download(repository, f"{encoder}/{PEFT_CONFIG}")
        return found
    files = [name for name in list_repo_files(repository) if name.endswith(".safetensors")]
    if len(files) != 1:
        named = ", ".join(files[:8]) or "none"
        raise ValueError(f"{repository} holds {len(files)} .safetensors files ({named}): name one, {repository}/FILE")
    return Path(hf_hub_download(repository, files[0]))
