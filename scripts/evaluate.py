"""``accelerate launch scripts/evaluate.py MODEL ... --prompts FILE``: the same as ``diffalign eval``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # a clone needs no installation

from diffalign.cli import main

if __name__ == "__main__":
    sys.exit(main(["eval", *sys.argv[1:]]))
