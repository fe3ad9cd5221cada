"""Measure the peaks of an iteration on sharded weights, for ``test_shards``: two processes of a launcher run this."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from torch import distributed

from diffalign.config import from_dict
from diffalign.trainers.registry import find_algorithm
from tests.forecast.measured import measure


def main(settings: str, output: str) -> None:
    """Write the peaks of this process for the settings in a file."""
    table = json.loads(Path(settings).read_text())
    entry = find_algorithm(table.pop("trainer"))
    trainer = entry.trainer(args=from_dict(entry.config, table, "test"))
    found = measure(trainer)
    Path(f"{output}-{distributed.get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
