"""An example of a package that extends compressor; `pyproject.toml` beside it names the entry points."""
