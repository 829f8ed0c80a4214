"""Makes `python -m distgan` work as `distgan`."""

import sys

from distgan.cli import main

if __name__ == "__main__":
    sys.exit(main())
