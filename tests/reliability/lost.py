"""A null run in two processes, of which the second is lost once."""

import os
import signal
import sys
from pathlib import Path

import torch

from tests.reliability.null import NullTrainer, run


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ["ACCELERATE_USE_CPU"] = "true"

    def hook(phase: str, task: NullTrainer) -> None:
        mark = folder / "killed"
        if phase == "backward" and task.loop.progress.step == 6 and os.environ["RANK"] == "1" and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    run(folder, hook)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
