"""`python -m compressor` is the `compress` command: the form that `accelerate launch -m compressor` needs."""

import sys

from compressor.cli.app import main
from compressor.launch import relaunch

if __name__ == "__main__":
    relaunch(sys.argv[1:])
    main()
