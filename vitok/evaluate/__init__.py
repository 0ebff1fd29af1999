"""Measuring reconstructions."""
