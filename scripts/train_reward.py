"""``accelerate launch scripts/train_reward.py --config configs/reward/shapes.yaml [--field VALUE ...]``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # a clone needs no installation

from diffalign.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "reward", *sys.argv[1:]]))
