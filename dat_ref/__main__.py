"""Entry point of ``python -m dat_ref``, the same as the ``dat-ref`` command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
