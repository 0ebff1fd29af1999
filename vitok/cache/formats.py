"""The files of a latent cache in the layouts that trainers of generators read. Nothing is written to disk here.

A format turns the encoded samples of a shard into (relative path, contents) pairs. The same samples give the same
bytes, whatever the date, the user, the machine or the number of processes.
"""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vitok.bottlenecks import GaussianPosterior
from vitok.errors import InputError

MOMENTS = ("mean", "logvar", "flipped_mean", "flipped_logvar")
"""The tensors of `Encoded`, by their names there and in our own files."""
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
        tensors |= {key: getattr(encoded, key) for key in MOMENTS if getattr(encoded, key) is not None}
        about = {"format": SHARD_FORMAT, "version": SHARD_VERSION}
        yield f"latents-{number:05d}.safetensors", safetensors_bytes(tensors, about)


class LightningDiT(Format):
    """What `datasets/img_latent_dataset.py` of github.com/hustvl/LightningDiT reads.

    latents_rank00_shard012.safetensors: latents and latents_flip [N, c, h, w], drawn; labels int64 [N].
    latents_stats.pt: a dict of mean and std, float32 [1, c, 1, 1], for torch.load, also with weights_only=True.

    The rank in the name is always 00 and the shards are numbered through, so that it does not tell how many there were.
    """

    name = "lightningdit"
    labels = flip = True

    def _shard(self, number: int, encoded: Encoded) -> Iterator[tuple[str, bytes]]:
        latents = encoded.draw()
        tensors = {
            "latents": latents,
            "latents_flip": encoded.draw_flipped(),
            "labels": torch.tensor(encoded.labels, dtype=torch.int64),
        }
        about = {"total_size": str(len(latents)), "dtype": str(latents.dtype), "device": "cpu"}
        yield f"latents_rank00_shard{number:03d}.safetensors", safetensors_bytes(tensors, about)

    def finish(self, summary: Summary) -> Iterator[tuple[str, bytes]]:
        stats = {"mean": summary.mean, "std": summary.std}
        file = io.BytesIO()
        torch.save({key: value.detach().float().reshape(1, -1, 1, 1).clone() for key, value in stats.items()}, file)
        yield "latents_stats.pt", file.getvalue()


class Repa(Format):
    """What `dataset.py` of github.com/sihyun-yu/REPA reads: pictures and their moments, one file each.

    images/00000/img00000012.npy: uint8 [3, H, W], the picture as it was encoded.
    vae-sd/00000/img-mean-std-00000012.npy: float32 [2c, h, w], mean and then standard deviation.
    vae-sd/dataset.json: {"labels": [["00000/img-mean-std-00000012.npy", 3], ...]}.
    """

    name = "repa"
    moments = labels = pixels = True

    def _shard(self, number: int, encoded: Encoded) -> Iterator[tuple[str, bytes]]:
        if encoded.logvar is None or encoded.pixels is None:
            raise InputError(f"format {self.name} needs the pictures and their variances beside the means")
        moments = torch.cat((encoded.mean.float(), torch.exp(0.5 * encoded.logvar.float())), 1).numpy()
        pixels = encoded.pixels.numpy()
        for row, index in enumerate(encoded.indices):
            folder = f"{index:08d}"[:5]
            yield f"images/{folder}/img{index:08d}.npy", _npy(pixels[row])
            yield f"vae-sd/{self._file(index)}", _npy(moments[row])

    def finish(self, summary: Summary) -> Iterator[tuple[str, bytes]]:
        labels = [[self._file(index), label] for _, index, label in summary.samples]
        yield "vae-sd/dataset.json", json.dumps({"labels": labels}).encode()

    @staticmethod
    def _file(index: int) -> str:
        number = f"{index:08d}"
        return f"{number[:5]}/img-mean-std-{number}.npy"


class Mar(Format):
    """What `util/loader.py` of github.com/LTH14/mar (and torchvision's DatasetFolder) reads: one file a picture.

    moments/00003/PATH.npz: moments and moments_flip, float32 [2c, h, w], mean and then log-variance, where PATH is the
    sample's name. The folders below moments/ are class numbers with leading zeros, which sort as the numbers do. In
    a name, parts that would lead elsewhere and characters that some systems take for separators are written as
    %XX.
    """

    name = "mar"
    moments = labels = flip = True

    def check(self, names: Sequence[str], labels: Sequence[int], *, gaussian: bool, flip: bool, clips: bool) -> None:
        super().check(names, labels, gaussian=gaussian, flip=flip, clips=clips)
        seen: set[str] = set()
        for path, name in zip(map(self._file, names, labels), names, strict=True):
            if path in seen:
                raise InputError(
                    f"format {self.name} names files after samples, and two named {shown(name)} would be one file: "
                    f"rename one, or take one of {_fit(lambda each: not isinstance(each, Mar))}"
                )
            seen.add(path)

    def _shard(self, number: int, encoded: Encoded) -> Iterator[tuple[str, bytes]]:
        rows = {
            "moments": (encoded.mean, encoded.logvar),
            "moments_flip": (encoded.flipped_mean, encoded.flipped_logvar),
        }
        arrays = {
            key: torch.cat([half.float() for half in halves if half is not None], 1).numpy()
            for key, halves in rows.items()
        }
        for row, (name, label) in enumerate(zip(encoded.names, encoded.labels, strict=True)):
            yield self._file(name, label), _npz({key: value[row] for key, value in arrays.items()})

    @staticmethod
    def _file(name: str, label: int) -> str:
        return f"moments/{label:05d}/{'/'.join(map(_part, name.split('/')))}.npz"


class Npy(Format):
    """What `train.py` of github.com/chuanyangjin/fast-DiT reads, of caches as DiT's code makes them.

    features/12.npy: float32 [1, c, h, w], drawn, not scaled. labels/12.npy: int64 [1].
    """

    name = "npy"
    labels = True

    def _shard(self, number: int, encoded: Encoded) -> Iterator[tuple[str, bytes]]:
        latents = encoded.draw().float().numpy()
        for row, (index, label) in enumerate(zip(encoded.indices, encoded.labels, strict=True)):
            yield f"features/{index}.npy", _npy(latents[row : row + 1])
            yield f"labels/{index}.npy", _npy(np.array([label], np.int64))


class WebDataset(Format):
    """Tar files as github.com/webdataset/webdataset reads them: members of one key are one sample.

    latents-00012.tar: 00000345.npy, float32 [c, h, w] or [c, t, h, w], drawn; 00000345.flip.npy, of the mirrored one,
    if encoded; 00000345.cls, the class, if there is one; 00000345.json: name, index, label and size.
    """

    name = "webdataset"
    clips = True

    def _shard(self, number: int, encoded: Encoded) -> Iterator[tuple[str, bytes]]:
        arrays = {"npy": encoded.draw()}
        if encoded.flipped_mean is not None:
            arrays["flip.npy"] = encoded.draw_flipped()
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            rows = zip(encoded.names, encoded.indices, encoded.labels, encoded.sizes, strict=True)
            for row, (name, index, label, size) in enumerate(rows):
                about = {"name": name, "index": index, "label": label, "size": list(size)}
                members = {key: _npy(value[row].float().numpy()) for key, value in arrays.items()}
                if label >= 0:
                    members["cls"] = str(label).encode()
                members["json"] = json.dumps(about).encode()
                for suffix, data in members.items():
                    member = tarfile.TarInfo(f"{index:08d}.{suffix}")  # of mode 0644, owner 0 and the year 1970
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        yield f"latents-{number:05d}.tar", file.getvalue()


FORMATS: dict[str, Format] = {
    each.name: each for each in (Safetensors(), LightningDiT(), Repa(), Mar(), Npy(), WebDataset())
}


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


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(array), allow_pickle=False)
    return file.getvalue()


def _npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for key, value in arrays.items():
            member = zipfile.ZipInfo(f"{key}.npy")  # dated 1980, unlike numpy's own
            member.create_system, member.external_attr = 3, 0o644 << 16
            archive.writestr(member, _npy(value))
    return file.getvalue()


def _part(text: str) -> str:
    """A folder or file name that stands for itself only; other texts give other names."""
    if text in ("", ".", ".."):
        return "%" + text.replace(".", "2E")
    return "".join(
        c
        if c.isprintable() and c not in "%\\:"
        else "".join(f"%{byte:02X}" for byte in c.encode("utf-8", "surrogatepass"))
        for c in text
    )


def _fit(holds: Callable[[Format], bool]) -> str:
    return ", ".join(name for name, each in FORMATS.items() if holds(each))
