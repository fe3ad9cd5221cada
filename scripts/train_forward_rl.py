"""``accelerate launch scripts/train_forward_rl.py --config configs/forward_rl/shapes.yaml [--field VALUE ...]``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # a clone needs no installation

from diffalign.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "forward_rl", *sys.argv[1:]]))
