"""Pictures, clips and latents: in from files, out to files.

Every function raises :class:`vitok.errors.InputError` with one sentence for a file that cannot be used, and every
writer leaves either the whole file or nothing under the final name. PyAV is needed for clips only and
imported on first use.
"""

from vitok.io.files import MAX_PIXELS, Entry, atomic_path, find_inputs, output_stems
from vitok.io.images import ReadImage, read_image, resize_and_crop, write_image
from vitok.io.latents import Latents, LatentsReader, LatentsWriter, read_latents, write_latents
from vitok.io.sheet import ContactSheet, grid, side_by_side
from vitok.io.video import ClipReader, ClipWriter

__all__ = [
    "MAX_PIXELS",
    "ClipReader",
    "ClipWriter",
    "ContactSheet",
    "Entry",
    "Latents",
    "LatentsReader",
    "LatentsWriter",
    "ReadImage",
    "atomic_path",
    "find_inputs",
    "grid",
    "output_stems",
    "read_image",
    "read_latents",
    "resize_and_crop",
    "side_by_side",
    "write_image",
    "write_latents",
]
