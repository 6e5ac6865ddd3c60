"""`accelerate launch -m g2r_fast.training --config run.yaml`: the command `g2r-fast train`."""

from __future__ import annotations

import sys

from ..cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
