"""A short training that notes what it saw: which prompt, with which noise. Started alone or by a launcher."""

import sys
from pathlib import Path

import torch

from diffalign.runtime.noise import Noise
from tests.reliability.trainers import TRAINERS, short


def main(name: str, folder: Path, steps: int) -> None:
    torch.set_num_threads(1)
    normal_batch, seen = Noise.normal_batch, []

    def noted(self, shape, stream, addresses):
        drawn = normal_batch(self, shape, stream, addresses)
        seen.extend(f"{stream} {a} {row.sum().item()!r}" for a, row in zip(addresses, drawn, strict=True))
        return drawn

    Noise.normal_batch = noted
    changes = {"updates_per_rollout": 1, "num_groups": 2} if "grpo" in name else {}
    args = short(name, folder, max_train_steps=steps, lr_scheduler="constant", max_grad_norm=1e9, **changes)
    args.resume_from_checkpoint = "latest"
    trainer = TRAINERS[name].make(args)
    trainer.train()
    with (folder / "seen.txt").open("a") as file:
        file.write("".join(line + "\n" for line in seen))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
