"""Check that a run has the number of processes and the sharding that its launcher was given."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env

from diffalign.config import load_yaml
from diffalign.fsdp import FSDPConfig

LAUNCHERS = ("accelerate", "accelerate-launch")
WHAT_WORKS = (
    "On CPUs, `accelerate launch --cpu --num_processes N` starts one process only; use "
    "`ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N ...` or `torchrun --nproc_per_node N ...`"
)

# Settings of accelerate that are not supported: environment variable and value, and the advice.
REFUSED = {
    ("ACCELERATE_USE_DEEPSPEED", "true"): "DeepSpeed is not supported, because it steps, clips and checkpoints by "
    "itself: use configs/accelerate/zero2.yaml, which shards as ZeRO-2 does, or fsdp2.yaml, which shards all",
    ("ACCELERATE_USE_MEGATRON_LM", "true"): "Megatron-LM is not supported: use configs/accelerate/fsdp2.yaml",
    ("FSDP_VERSION", "1"): "FSDP 1 is not supported: set fsdp_version: 2",
    ("FSDP_OFFLOAD_PARAMS", "true"): "weights are not offloaded: set fsdp_offload_params: false",
    ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true"): "each process loads all: set fsdp_cpu_ram_efficient_loading: false",
    ("FSDP_ACTIVATION_CHECKPOINTING", "true"): "set fsdp_activation_checkpointing: false, gradient_checkpointing: true",
}


def connect() -> None:
    """Let several processes without an accelerator train together on CPUs; call it before ``Accelerator()``.

    Without the variable set here, each process would form a group of one.

    Raises:
        ValueError: The launcher asks for an engine or option that is not supported.
    """
    shards = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    for (name, value), advice in REFUSED.items():
        if os.environ.get(name, "").lower() == value and (shards or not name.startswith("FSDP_")):
            raise ValueError(f"the launcher sets {name}={value}: {advice}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")


def joined() -> PartialState:
    """Return the state of this process among those of the launcher, for commands that do not train.

    Raises:
        ValueError: The launcher asks for an engine or option that is not supported.
        RuntimeError: The launcher was asked for another number of processes.
    """
    connect()
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    check_world(state.num_processes)
    return state


def wants_shards(device: torch.device) -> FSDPConfig | None:
    """Return the FSDP2 settings of the launcher, or None for one process or without FSDP2."""
    wanted = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    keep = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "false"
    return FSDPConfig(device, keep) if wanted and int(os.environ.get("WORLD_SIZE", "1")) > 1 else None


def shortfall(passes: int) -> int:
    """Return how many passes this process lacks compared to the one with the most. Collective."""
    return max(gather_object([passes])) - passes


def check_world(num_processes: int) -> None:
    """Raise RuntimeError if the launcher was given another number of processes than there are."""
    wanted = asked_for(os.environ, _parent())
    if wanted is not None and wanted != num_processes:
        raise RuntimeError(
            f"the launcher was asked for {wanted} process(es), and this one is part of {num_processes}. {WHAT_WORKS}"
        )


def asked_for(environment: Mapping[str, str], parent: Sequence[str]) -> int | None:
    """Return the number of processes from the environment or the launcher's command line, else None.

    Args:
        environment: Environment variables.
        parent: Command line of the parent process.
    """
    if "WORLD_SIZE" in environment:
        return int(environment["WORLD_SIZE"])
    if not any(os.path.basename(token) in LAUNCHERS for token in parent[:2]):
        return None
    options = {}
    for token, following in zip(parent, [*parent[1:], ""], strict=True):
        if token.endswith(".py"):
            break  # arguments of the script
        name, equals, value = token.partition("=")
        options[name.lstrip("-").replace("-", "_")] = value if equals else following
    if "num_processes" in options:
        return int(options["num_processes"])
    file = options.get("config_file")
    return int(load_yaml(file).get("num_processes", 1)) if file else None


def _parent() -> list[str]:
    try:
        parent = psutil.Process().parent()
        return parent.cmdline() if parent is not None else []
    except psutil.Error:
        return []  # another user's process, or one that has exited
