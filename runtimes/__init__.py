"""Load an exported model and run it: numpy and one inference engine, never torch."""

from compressor.runtimes.load import load
from compressor.runtimes.runtime import Driver, Port, Run, Runtime, TensorSpec

__all__ = ["Driver", "Port", "Run", "Runtime", "TensorSpec", "load"]
