"""How much memory encoding and decoding take, how much there is, and how many tokens to work on at a time.

Outside attention every token is worked on by itself, so that n of N tokens at a time give the same numbers as all. With
W the width of a stack, H its hidden units and s the bytes of a number, the most that is held at one time is

    in chunks       N 5 W s + n (2 W + 3 H) s + own          x, its packed projection, what the heads gathered
    all at once     N max(9 W s + own / N, (5 W + 3 H) s)

and a tenth for the allocator, which also keeps what a chunk worked in while there is attention. The pixels' end may
take more: N W s, the picture, and n tubelets. `own` is what attention works in: the keys of a head for each thread of
our CPU kernel, normalised and rotated copies elsewhere. A processor without products of 16-bit floats widens them, and
takes 12 H for 3 H s.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from math import prod
from pathlib import Path

import torch

from vitok import _native
from vitok.config import ViTokConfig
from vitok.errors import InputError
from vitok.ops.linear import product_dtype

AT_ONCE = 16384  # tokens that are not cut unless the caller says so
# What is tried for more, the first that fits. 16384 tokens through 2 blocks of S-B/16, bfloat16, one thread: at once
# 6.7 s, in chunks of 4096 5.3 s, of 1024 5.4 s, of 256 7.1 s. A GPU wants more work for each launch.
CHUNKS = {"cpu": (4096, 1024), "cuda": (16384, 4096, 1024)}
UNLIMITED = 2**60  # bytes; version 1 says a number where there is no limit
SMALL = 2**29  # bytes that are not worth asking for how much there is


def plan(
    config: ViTokConfig,
    grids: list[tuple[int, int, int, int]],
    weight: torch.Tensor,
    chunk: int | None,
    *,
    decoding: bool,
    moved: int = 0,
) -> int | None:
    """How many tokens to work on at a time, None for all at once.

    Args:
        grids: (batch, t, h, w) tokens of what goes through together.
        weight: any of the model's, for its device and dtype.
        chunk: what the caller asks for, or None to choose here.
        moved: bytes of pixels that have yet to get to the model's device.

    Where torch.compile traces, what the caller asks for is taken as it is. Raises InputError when there is not as much
    memory as the plan takes, or for a chunk that cannot be.
    """
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise InputError(f"chunk must be a positive number of tokens or None, got {chunk!r}")
    training = torch.is_grad_enabled()
    if chunk is not None and training:
        raise InputError("chunk bounds the memory of inference: call under torch.no_grad() or torch.inference_mode()")
    if torch.compiler.is_compiling():
        return chunk
    tokens, chunks = sum(map(prod, grids)), CHUNKS.get(weight.device.type, (AT_ONCE,))
    chosen: tuple[int | None, ...] = (chunk,)
    if chunk is None and not training:
        chosen = chunks if tokens > AT_ONCE else (None, *chunks)
    takes = partial(needed, config, grids, weight, decoding=decoding)
    if moved + takes(chosen[0]) < SMALL or (there := available(weight.device)) is None:
        return chosen[0]
    for n in chosen:
        if moved + takes(n) <= there:
            return n
    least, switch = moved + takes(chunks[-1]), "smaller or fewer pictures at once take less"
    if least <= there:
        switch = f"{'torch.no_grad()' if training else f'chunk={chunks[-1]}'} would take {_size(least)}"
    raise InputError(
        f"there is not enough memory to {'decode' if decoding else 'encode'} {tokens} tokens: it takes about "
        f"{_size(moved + takes(chosen[-1]))} and {weight.device} has {_size(there)} left; {switch}"
    )


def needed(
    config: ViTokConfig,
    grids: list[tuple[int, int, int, int]],
    weight: torch.Tensor,
    chunk: int | None,
    *,
    decoding: bool,
) -> int:
    """Bytes that are held at the peak beside the model and what is given to it, as above; arguments as in `plan`."""
    stack = config.decoder if decoding else config.encoder
    width, size, wide = stack.width, weight.element_size(), product_dtype(weight).itemsize
    tokens = sum(map(prod, grids))
    rows = tokens if chunk is None else min(chunk, tokens)
    x, sequence = tokens * width * size, tokens // (grids[0][0] if len(grids) == 1 else 1)
    own = 3 * x
    if weight.is_cpu and _native.library() is not None:
        own = torch.get_num_threads() * sequence * 2 * -(-stack.head_dim // 16) * 16 * max(4, size)
    own += 4 * stack.heads * tokens
    hidden = (3 * size if wide == size else 2 * wide + 2 * size) * stack.hidden
    work = rows * max(2 * width * size + hidden, 7 * width * size)
    blocks = max(9 * x + own, 3 * x + work) if chunk is None else 5 * x + own + work
    joined = x if len(grids) > 1 else 0
    tables = 4 * stack.head_dim * sequence
    absolute = 3 * x + 12 * sequence * width if config.absolute == "sincos" else 0
    row = config.tubelet_elements * (size if wide == size else wide + size)
    pixels = rows * row + (x + tokens * config.tubelet_elements * size if decoding else 2 * x)
    return int(1.1 * max(joined + blocks + tables, absolute, pixels))


def available(device: torch.device) -> int | None:
    """Bytes that may still be allocated on a device, those that torch keeps included; None where nobody says."""
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return None
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if device.type != "cpu":
        return None
    return min((*_machine(), *_groups()), default=None)


def give_back() -> None:
    """Return to the system the memory of this process that is free; for long runs, now and then.

    In glibc before 2.38 a freed block that was aligned, as tensors are, is not found again once something small lies
    beside it: a run of 100,000 batches of one size would hold several times what it needs.
    """
    with suppress(OSError, AttributeError):  # where the C library has no such function
        ctypes.CDLL(None).malloc_trim(0)


def _machine() -> list[int]:
    lines = _lines(Path("/proc/meminfo"))
    return [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]


# Root, limit, usage and what of the usage is cache that gives way, of control groups of version 2 and 1.
_VERSIONS = {
    "": ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file "),
    "memory": ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "),
}


def _groups() -> Iterator[int]:
    """What the control groups of this process leave it, its own and those around it."""
    for line in _lines(Path("/proc/self/cgroup")):
        _, controllers, path = line.split(":", 2)
        if controllers not in _VERSIONS:
            continue
        root, limit, usage, cache = _VERSIONS[controllers]
        own = Path(root + path)
        for folder in (own, *own.parents[: len(own.parts) - len(Path(root).parts)]):
            most, used = _lines(folder / limit), _lines(folder / usage)
            if most and used and most[0] != "max" and int(most[0]) < UNLIMITED:
                gives = [int(x.split()[1]) for x in _lines(folder / "memory.stat") if x.startswith(cache)]
                yield int(most[0]) - int(used[0]) + sum(gives)


def _lines(path: Path) -> list[str]:
    """Of a file of the system's, none where there is none."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
