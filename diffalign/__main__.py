"""``python -m diffalign``: the command line, where its script is not on the path."""

import sys

from diffalign.cli import main

sys.exit(main())
