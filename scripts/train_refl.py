"""``accelerate launch scripts/train_refl.py --config configs/refl/shapes.yaml [--field VALUE ...]``."""

import sys

from diffalign.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "refl", *sys.argv[1:]]))
