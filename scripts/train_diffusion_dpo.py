"""``accelerate launch scripts/train_diffusion_dpo.py --config configs/diffusion_dpo/shapes.yaml``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # a clone needs no installation

from diffalign.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "diffusion_dpo", *sys.argv[1:]]))
