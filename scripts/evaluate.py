"""``accelerate launch scripts/evaluate.py MODEL ... --prompts FILE``: the same as ``diffalign eval``."""

import sys

from diffalign.cli import main

if __name__ == "__main__":
    sys.exit(main(["eval", *sys.argv[1:]]))
