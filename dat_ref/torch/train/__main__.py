"""``torchrun -m dat_ref.torch.train``: what ``dat-ref train`` does, in each of the processes."""

import sys

from ...cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
