"""Visits of parts that leave the device, watched on a CPU."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from diffalign.models.offload import OffloadedModule


class LoggedOffload(OffloadedModule):
    """A visitor whose device is the CPU; ``name`` goes to ``log`` each time that it comes."""

    def __init__(self, networks: Collection[nn.Module], log: list[str], name: str) -> None:
        super().__init__(networks, torch.device("cpu"))
        self.log, self.name = log, name

    def load(self) -> None:
        if not self.resident:
            self.log.append(self.name)
        super().load()
