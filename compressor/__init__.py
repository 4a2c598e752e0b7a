"""compressor: distil a vision model with a published method, export it, and measure what came out."""

__version__ = "0.1.0"
