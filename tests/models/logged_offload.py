"""Offloading observed on a CPU."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from diffalign.models.offload import OffloadedModule


class LoggedOffload(OffloadedModule):
    """An offloaded part whose device is the CPU; each load appends ``name`` to ``log``."""

    def __init__(self, networks: Collection[nn.Module], log: list[str], name: str) -> None:
        super().__init__(networks, torch.device("cpu"))
        self.log, self.name = log, name

    def load(self) -> None:
        if not self.resident:
            self.log.append(self.name)
        super().load()
