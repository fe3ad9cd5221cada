"""``accelerate launch scripts/compare.py MODEL ... --prompts FILE``: the same as ``diffalign compare``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # a clone needs no installation

from diffalign.cli import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
