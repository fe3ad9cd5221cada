"""Provenance of a checkpoint: its configuration, data and machine, and whether this run may resume from it."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

from diffalign.config import free_fields, to_dict, unread
from diffalign.device import device_name
from diffalign.runtime.config import TrainingConfig

WITH_PATHS = "with_paths"  # beside a digest: the one of early checkpoints, in which paths of source images count
REPOSITORY = re.compile(r"(?:[\w.-]{1,96}/)?[\w.-]{1,96}")


def config_hash(config: Mapping[str, Any]) -> str:
    """Hash a configuration with SHA-256, independent of the order of its keys."""
    return digest([json.dumps(config, sort_keys=True, default=str)])


def digest(texts: Iterable[str]) -> str:
    """Hash a sequence of texts with SHA-256; their boundaries count."""
    found = hashlib.sha256()
    for text in texts:
        content = text.encode("utf-8", "surrogatepass")
        found.update(len(content).to_bytes(8, "little") + content)
    return found.hexdigest()


def machine(processes: int, device: str) -> dict[str, Any]:
    """Describe the hardware and software that the last bits of results depend on."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": _processor() if device == "cpu" else device_name(torch.device(device)),
        "processes": processes,
    }


def _processor() -> str:
    """Name the processor and the instruction set by which torch chooses its kernels."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        name = ""
    return f"{name or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def commit(name: str, revision: str | None = None, kind: str = "model") -> str | None:
    """Return the commit of a hub repository in the local cache; None if it is not cached or not a repository.

    Args:
        name: ``owner/name``.
        revision: Branch, tag or commit; None is ``main``.
        kind: ``model`` or ``dataset``.
    """
    if not REPOSITORY.fullmatch(name) or Path(name).exists():
        return None
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind)
    wanted = revision or "main"
    if (folder / "snapshots" / wanted).is_dir():
        return wanted
    reference = folder / "refs" / wanted
    return reference.read_text(encoding="utf-8").strip() if reference.is_file() else None


def origin(
    args: TrainingConfig,
    data: str,
    processes: int,
    device: str,
    commits: Mapping[str, str] | None = None,
    contents: Mapping[str, Mapping[str, str]] | None = None,
) -> dict[str, Any]:
    """Describe the run that writes a checkpoint.

    Args:
        args: Configuration of the run.
        data: Digest of the training data; empty without data.
        processes: Number of processes.
        device: Device type.
        commits: Commit of each hub repository that was loaded.
        contents: ``fingerprint`` of each local file that the run depends on.
    """
    config = plain(args)
    return {
        "config": config,
        "config_sha256": config_hash(config),
        "data_sha256": data,
        "commits": dict(commits or {}),
        "contents": {name: dict(found) for name, found in (contents or {}).items()},
        "machine": machine(processes, device),
    }


def plain(args: TrainingConfig) -> dict[str, Any]:
    """Return a configuration as plain JSON values."""
    return json.loads(json.dumps(to_dict(args)))


def check_origin(then: Mapping[str, Any], now: Mapping[str, Any], args: TrainingConfig) -> list[str]:
    """Compare the origin of a checkpoint with that of this run.

    Args:
        then: ``origin`` of the checkpoint.
        now: ``origin`` of this run.
        args: Configuration of this run.

    Returns:
        A line per difference that may change the last bits of results.

    Raises:
        ValueError: The data, or a setting that must not change on resume, differ.
    """
    old, new = _flat(then["config"]), _flat(now["config"])
    # Fields added after the checkpoint was written are assumed to have had their defaults.
    younger = new.keys() - old.keys() - {"revision"}
    # Also those that a default configuration does not read, e.g. because it trains offline.
    defaults = _flat(json.loads(json.dumps(unread.plain(type(args)()))))
    old |= {name: value for name, value in defaults.items() if name in younger}
    old.setdefault("revision", new.get("revision"))  # early checkpoints did not store the commit
    old = {name: value for name, value in _with_recorded_rewards(old, new).items() if unread.accepts(args, name)}
    changed = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    loose = free_fields(type(args)) | ({"max_train_steps"} if args.lr_scheduler == "constant" else set())
    if fixed := [name for name in changed if unread.covering(loose, name) is None]:
        table = "\n".join(f"  {name}: {old.get(name)!r} then, {new.get(name)!r} now" for name in fixed)
        raise ValueError(
            f"this checkpoint is of another configuration:\n{table}\n"
            "resume with the original settings (config.yaml of that run), or choose a new output_dir"
        )
    if then["data_sha256"] not in (now["data_sha256"], now.get(f"data_{WITH_PATHS}")):
        raise ValueError(
            "the training data have changed since this checkpoint: restore them, or choose a new output_dir"
        )
    known = then.get("commits", {})
    for name, here in now["commits"].items():
        if known.get(name, here) != here:
            raise ValueError(
                f"{name} has changed on the hub since this checkpoint: it was {known[name]}, and is {here}: "
                f"set revision: {known[name]}, or choose a new output_dir"
            )
    touched = _check_contents(then.get("contents", {}), now.get("contents", {}))
    before, here = then["machine"], now["machine"]
    lines = touched + [
        f"{name}: {before[name]} then, {here[name]} now" for name in here if before.get(name) != here[name]
    ]
    batches = [name for name in changed if name.endswith("_batch_size")]
    return lines + [f"{name}: {old[name]} then, {new[name]} now" for name in batches]


def _check_contents(then: Mapping[str, Mapping[str, str]], now: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Compare local files with those that a checkpoint was trained with; files that only one of them has are ignored.

    Returns:
        A line per file whose modification time differs, while its size and the samples that were compared agree.

    Raises:
        ValueError: Contents differ.
    """
    both = [name for name in now if name in then]
    if changed := [n for n in both if then[n]["content"] not in (now[n]["content"], now[n].get(WITH_PATHS))]:
        raise ValueError(
            f"changed since this checkpoint was written: {', '.join(changed[:10])}. A run goes on with the model, data "
            "and judges that it began with: restore these files, or start a new run in another output_dir"
        )
    return [
        f"{name}: same size and samples, but another time" for name in both if then[name]["time"] != now[name]["time"]
    ]


def _with_recorded_rewards(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Complete the rewards of ``old``: version 0.1 recorded only the weight of a reward that was passed from Python."""
    found = dict(old)
    for name in [name for name in old if name.startswith("rewards.") and f"{name}.weight" in new]:
        recorded = {key: value for key, value in new.items() if key.startswith(f"{name}.")}
        found |= recorded | {f"{name}.weight": found.pop(name)}
    return found


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else {prefix + name: value}
    return flat
