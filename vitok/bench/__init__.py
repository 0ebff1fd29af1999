"""Timing of providers side by side in one process."""

from vitok.bench.rows import Rows
from vitok.bench.timing import Timing, compare, copy_rate, matmul_rate, timing_stream, usable

__all__ = ["Rows", "Timing", "compare", "copy_rate", "matmul_rate", "timing_stream", "usable"]
