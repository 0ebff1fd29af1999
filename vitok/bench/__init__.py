"""Timing of providers side by side in one process."""

from vitok.bench.timing import Timing, compare, copy_rate, matmul_rate

__all__ = ["Timing", "compare", "copy_rate", "matmul_rate"]
