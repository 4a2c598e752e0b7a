"""Load an exported model and run it: numpy and one inference engine, never torch."""

from compressor.runtimes.runtime import Driver, Port, Run, Runtime, TensorSpec

__all__ = ["Driver", "Port", "Run", "Runtime", "TensorSpec", "load"]


def __getattr__(name: str) -> object:
    if name == "load":
        from compressor.runtimes.load import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
