"""Latent caches: a data set encoded once, in the layout a trainer of generators reads, and read again for training."""

from vitok.cache.formats import FORMATS, Encoded, Format, Summary

__all__ = ["FORMATS", "Encoded", "Format", "Summary"]
