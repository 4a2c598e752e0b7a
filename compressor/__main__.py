"""`python -m compressor` is the `compress` command: the form that `accelerate launch -m compressor` needs."""

from compressor.cli.app import main

if __name__ == "__main__":
    main()
