"""``accelerate launch scripts/compare.py MODEL ... --prompts FILE``: the same as ``diffalign compare``."""

import sys

from diffalign.cli import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
