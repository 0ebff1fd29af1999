"""Triton kernels, one file per op. Importing this package needs no triton; importing one of its modules does."""
