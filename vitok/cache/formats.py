"""The files of a latent cache in the layouts that trainers of generators read. Nothing is written to disk here.

A format turns the encoded samples of a shard into (relative path, contents) pairs. The same samples give the same
bytes, whatever the date, the user, the machine or the number of processes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitok.bottlenecks import GaussianPosterior
from vitok.errors import InputError

SHARD_FORMAT, SHARD_VERSION = "vitok-cache", "1"
_SAFETENSORS = {
    torch.int64: "I64",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


@dataclass(frozen=True, eq=False)
class Encoded:
    """The samples of one shard that could be read, in the data set's order; all tensors are on the CPU.

    names            path of each in the data set, "/" between folders
    indices          number of each in the whole listing, from 0, counting the unreadable ones
    labels           class number, -1 where there is none
    sizes            (H, W) or (T, H, W) of the originals, before resize and crop
    mean             [N, c, h, w] of pictures or [N, c, t, h, w] of clips; float32, float16 or bfloat16
    logvar           like `mean`, None of a deterministic bottleneck
    flipped_mean     of the mirrored samples, None where they were not asked for
    flipped_logvar   likewise
    seed             of the samples that are drawn
    pixels           uint8 [N, 3, H, W] as they were encoded, for formats whose `pixels` is true; otherwise None
    """

    names: Sequence[str]
    indices: Sequence[int]
    labels: Sequence[int]
    sizes: Sequence[tuple[int, ...]]
    mean: Tensor
    logvar: Tensor | None = None
    flipped_mean: Tensor | None = None
    flipped_logvar: Tensor | None = None
    seed: int = 0
    pixels: Tensor | None = None

    def draw(self) -> Tensor:
        """Samples of the posterior, shape and dtype of `mean`, which they are where the code is deterministic.

        The noise is that of `GaussianPosterior.sample(seed, indices)`: it does not depend on shards or batches.
        """
        return _draw(self.mean, self.logvar, self.seed, self.indices)

    def draw_flipped(self) -> Tensor:
        """As `draw`, of the mirrored samples, with the same noise. InputError where there are none."""
        if self.flipped_mean is None:
            raise InputError("mirrored samples were not encoded")
        return _draw(self.flipped_mean, self.flipped_logvar, self.seed, self.indices)


@dataclass(frozen=True, eq=False)
class Summary:
    """What is known of a cache when its shards stand.

    samples     (name, index, label) of every sample that was read, in order
    classes     names of the classes by number
    mean, std   float [c], over all samples and places, of latents as `Encoded.draw` gives them
    flip        whether mirrored samples were encoded too
    """

    samples: Iterable[tuple[str, int, int]]
    classes: Sequence[str]
    mean: Tensor
    std: Tensor
    flip: bool = False


class Format:
    """A layout of files; the class attributes say what it needs."""

    name = ""
    moments = False
    """Means and variances are stored, so the bottleneck must have them."""
    labels = False
    """Its trainer wants a class for every sample."""
    flip = False
    """Its trainer reads the mirrored samples as well."""
    clips = False
    """Clips can be stored, not pictures only."""
    pixels = False
    """Its trainer reads the pictures beside the latents."""

    def check(self, names: Sequence[str], labels: Sequence[int], *, gaussian: bool, flip: bool, clips: bool) -> None:
        """InputError for what this format cannot hold; costs nothing, so it may be asked before anything is encoded.

        Args:
            names, labels: of samples, as in `Encoded`.
            gaussian: whether there is a variance.
            flip: whether mirrored samples are encoded.
            clips: whether the samples are clips.
        """
        if self.moments and not gaussian:
            raise InputError(
                f"format {self.name} stores means and variances, and the code of this model has no variance: "
                f"take one of {_fit(lambda each: not each.moments)}"
            )
        if clips and not self.clips:
            raise InputError(f"format {self.name} is for pictures: clips fit {_fit(lambda each: each.clips)}")
        if self.flip and not flip:
            raise InputError(f"format {self.name} holds the mirrored pictures too: ask for them (--flip)")
        if self.labels and min(labels, default=0) < 0:
            name = next(name for name, label in zip(names, labels, strict=True) if label < 0)
            raise InputError(
                f"format {self.name} stores a class for every sample and {shown(name)} has none: "
                f"put the pictures in one folder a class, or take one of {_fit(lambda each: not each.labels)}"
            )

    def shard(self, number: int, encoded: Encoded) -> Iterator[tuple[str, bytes]]:
        """(relative path with "/", contents) of each file of shard `number`. InputError as in `check`."""
        self.check(
            encoded.names,
            encoded.labels,
            gaussian=encoded.logvar is not None,
            flip=encoded.flipped_mean is not None,
            clips=encoded.mean.dim() == 5,
        )
        return self._shard(number, encoded)

    def _shard(self, number: int, encoded: Encoded) -> Iterator[tuple[str, bytes]]:
        raise NotImplementedError

    def finish(self, summary: Summary) -> Iterator[tuple[str, bytes]]:
        """(relative path, contents) of the files that stand once in a cache."""
        return iter(())


class Safetensors(Format):
    """Our own layout, which `vitok.cache.LatentDataset` reads: one file of moments a shard.

    latents-00012.safetensors: mean, logvar, flipped_mean, flipped_logvar (those there are) like `Encoded`'s, and
    label int64 [N], index int64 [N], size int32 [N, 2 or 3].
    """

    name = "safetensors"
    clips = True

    def _shard(self, number: int, encoded: Encoded) -> Iterator[tuple[str, bytes]]:
        tensors = {
            "label": torch.tensor(encoded.labels, dtype=torch.int64),
            "index": torch.tensor(encoded.indices, dtype=torch.int64),
            "size": torch.tensor(encoded.sizes, dtype=torch.int32).view(len(encoded.names), -1),
        }
        moments = ("mean", "logvar", "flipped_mean", "flipped_logvar")
        tensors |= {key: getattr(encoded, key) for key in moments if getattr(encoded, key) is not None}
        about = {"format": SHARD_FORMAT, "version": SHARD_VERSION}
        yield f"latents-{number:05d}.safetensors", safetensors_bytes(tensors, about)


FORMATS: dict[str, Format] = {each.name: each for each in (Safetensors(),)}


def shown(name: str) -> str:
    """A name from outside as a message may hold it: printable and not endless."""
    text = "".join(c if c.isprintable() else "?" for c in name)
    return text if len(text) <= 120 else f"{text[:60]}...{text[-57:]}"


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file. The safetensors library itself writes the metadata in an order that changes by chance."""
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    parts: list[memoryview | bytes] = []
    end = 0
    # Wider elements first, so that each begins at a multiple of its size.
    for key, value in sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])):
        data = value.detach().contiguous().flatten().view(torch.uint8).numpy().data
        dtype, begin, end = _SAFETENSORS[value.dtype], end, end + len(data)
        header[key] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [begin, end]}
        parts.append(data)
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    return b"".join([len(head).to_bytes(8, "little"), head, *parts])


def _draw(mean: Tensor, logvar: Tensor | None, seed: int, indices: Sequence[int]) -> Tensor:
    if logvar is None:
        return mean
    ids = torch.tensor(indices, dtype=torch.int64)
    return GaussianPosterior(mean.float(), logvar.float()).sample(seed, ids).to(mean.dtype).contiguous()


def _fit(holds: Callable[[Format], bool]) -> str:
    return ", ".join(name for name, each in FORMATS.items() if holds(each))
