"""Latent caches: a data set encoded once, in the layout a trainer of generators reads, and read again for training."""

from vitok.cache.formats import FORMATS, Encoded, Format, Summary
from vitok.cache.reader import LatentDataset, ShardSampler, Stats, sample_latents

__all__ = ["FORMATS", "Encoded", "Format", "LatentDataset", "ShardSampler", "Stats", "Summary", "sample_latents"]
