"""Entry point of ``torchrun -m dat_ref.torch.train``: run ``dat-ref train`` in each process."""

import sys

from ...cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
