"""``python -m qsmpipe``."""

import sys

from qsmpipe.cli import main

if __name__ == "__main__":
    sys.exit(main())
