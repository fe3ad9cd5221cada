"""``accelerate launch scripts/train_flow_grpo.py --config configs/flow_grpo/shapes.yaml [--field VALUE ...]``."""

import sys

from diffalign.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "flow_grpo", *sys.argv[1:]]))
