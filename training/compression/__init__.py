"""Fewer bytes for a trained adapter: fewer numbers (transforms), and fewer bits for each (codecs)."""

from training.compression.steps import Steps, compress, decompress, read_steps

__all__ = ["Steps", "compress", "decompress", "read_steps"]
