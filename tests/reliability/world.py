"""A short training that notes what it saw: which prompt, with which noise. Started alone or by a launcher."""

import signal
import sys
from pathlib import Path

import torch

from diffalign.rng import KeyedRNG
from tests.reliability.trainers import TRAINERS, short


def main(name: str, folder: Path, stop: int) -> None:
    torch.set_num_threads(1)
    normal_batch, seen = KeyedRNG.normal_batch, []

    def noted(self, shape, stream, addresses):
        drawn = normal_batch(self, shape, stream, addresses)
        seen.extend(f"{stream} {a} {row.sum().item()!r}" for a, row in zip(addresses, drawn, strict=True))
        return drawn

    KeyedRNG.normal_batch = noted
    changes = {"num_groups": 2} if "num_groups" in TRAINERS[name].settings else {}
    changes |= {"updates_per_rollout": 1} if name == "online_dpo" else {}
    args = short(name, folder, max_train_steps=6, lr_scheduler="constant", max_grad_norm=1e9, **changes)
    args.resume_from_checkpoint = "latest"
    trainer = TRAINERS[name].make(args)
    on_step = trainer.algorithm.on_step

    def watched(batch, metrics):
        on_step(batch, metrics)
        if trainer.run.progress.step == stop < 6:
            trainer.run.heartbeat.signals.received = signal.SIGTERM

    trainer.algorithm.on_step = watched
    try:
        trainer.train()
    finally:
        with (folder / "seen.txt").open("a") as file:
            file.write("".join(line + "\n" for line in seen))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
