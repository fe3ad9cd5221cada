"""Start the processes of a training, and check its output folder before any work."""

from __future__ import annotations

from collections.abc import Callable

from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, patch_environment

from diffalign.fsdp import FSDPConfig
from diffalign.runtime.config import TrainingConfig
from diffalign.runtime.lock import refuse_busy
from diffalign.runtime.output_copy import check_target
from diffalign.runtime.processes import check_world, connect, wants_shards
from diffalign.runtime.products import check_products
from diffalign.runtime.tracking import tracker_names
from diffalign.trainers.hub import create_repository

Check = Callable[[int, FSDPConfig | None], None]


def connected(config: TrainingConfig, check: Check) -> tuple[Accelerator, FSDPConfig | None]:
    """Start the processes, and check that a run fits them and may write its output.

    Args:
        config: Of the run.
        check: Called with the number of processes and the sharding asked for, None without; raises ValueError where
            the run does not fit them.

    Returns:
        The accelerator and the sharding.

    Raises:
        ValueError: The output folder is in use, holds products of another kind of run, or cannot be copied.
    """
    connect()
    # Accelerate would shard the denoiser too late, and on CPUs not at all: let it handle processes only.
    with patch_environment(ACCELERATE_USE_FSDP="false"):
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            log_with=tracker_names(config.report_to) or None,
            project_dir=config.output_dir,
            # Buffers are constants, and processes may call a network a different number of times per pass.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
    check_world(accelerator.num_processes)
    shards = wants_shards(accelerator.device)
    check(accelerator.num_processes, shards)
    if accelerator.is_main_process:
        refuse_busy(config.output_dir)
        check_products(config.output_dir)
        if config.push_to_hub is not None:
            create_repository(config.push_to_hub, config.hub_private)
        check_target(config)
    return accelerator, shards
