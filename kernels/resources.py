"""What every Triton kernel costs on every GPU generation, found without a GPU.

    python -m vitok.kernels.resources [--archs 80,90,100] [--ops norm,attention] [--json FILE]

Each case calls a public op, forward and backward, on CPU tensors of a real model's shapes. Triton's own launch code
runs up to the point where it would compile, so that signature, specialisation (divisible by 16, equal to 1), constants
and options are those of a launch. What it would compile is compiled for each architecture and disassembled. Prints a
row a kernel; exits with 1 when one spills, uses local memory or misses the matrix instruction its case demands.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

# The names of matrix instructions in machine code: of one warp, of a warp group (Hopper), of a block (Blackwell).
MATRIX = re.compile(r"\b(HMMA|HGMMA|UTC\w*MMA)\b")
DEMANDS = {
    "mma": {80: r"HMMA", 90: r"HG?MMA", 100: r"HMMA|UTC\w*MMA"},  # any
    "wide mma": {80: r"HMMA", 90: r"HGMMA", 100: r"UTC\w*MMA"},  # the largest the generation has
}
COUNTED = ("FFMA", "LDG.E.64", "LDG.E.128", "STG.E.64", "STG.E.128", "LDGSTS", "LDL", "STL")


class Case(NamedTuple):
    """`run` calls an op; kernels of it that multiply matrices must do so by the instruction `demands` names."""

    label: str
    run: Callable[[], object]
    demands: str | None = None


class Launch(NamedTuple):
    """One distinct compilation: its first case, and the arguments of Triton's compiler."""

    op: str
    case: Case
    arch: int
    kernel: Any
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    def tile(self) -> str:
        """The constants that are not tensors' properties, such as "BLOCK=1024 PAD_ZERO=0"."""
        names = list(self.signature)
        values = [(names[path[0]], value) for path, value in self.constants.items() if len(path) == 1]
        return " ".join(f"{n}={int(v) if isinstance(v, bool) else v}" for n, v in values if n.isupper())


def differentiated(op: Callable[..., Any], *tensors: Tensor | None, **options: Any) -> None:
    """Forward and backward of an op through Triton, with a gradient for each of `tensors` that can have one."""
    leaves = [x.requires_grad_() for x in tensors if x is not None and x.is_floating_point()]
    outputs = op(*tensors, impl="triton", **options)
    outputs = [x for x in (outputs if isinstance(outputs, tuple) else (outputs,)) if x.requires_grad]
    torch.autograd.grad(outputs, leaves, [torch.zeros_like(x) for x in outputs], allow_unused=True)


DTYPES = {"u8": torch.uint8, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def norm_cases() -> Iterator[Case]:
    from vitok.ops import add_norm, norm

    def alone(dtype: str, width: int, kind: str, bias: bool, parameters: str | None) -> Case:
        def run() -> None:
            x = torch.zeros(8, 256, width, dtype=DTYPES[dtype])
            weight = None if parameters is None else torch.ones(width, dtype=DTYPES[parameters])
            differentiated(norm, x, weight, torch.ones_like(weight) if bias else None, kind=kind, eps=1e-6)

        return Case(f"{dtype} {kind} {width}, weight {parameters}{', bias' * bias}", run)

    def added(dtype: str, width: int, kind: str, bias: bool, scale: bool, parameters: str) -> Case:
        def run() -> None:
            x, residual = torch.zeros(2, 8, 256, width, dtype=DTYPES[dtype]).unbind()
            weight, shift, factor = torch.ones(3, width, dtype=DTYPES[parameters]).unbind()
            tensors = (x, residual, weight, shift if bias else None)

            def op(*tensors: Tensor, scale: Tensor | None = None, **options: Any) -> Any:
                return add_norm(*tensors, scale=scale, kind=kind, eps=1e-6, **options)

            differentiated(op, *tensors, scale=factor.requires_grad_() if scale else None)

        return Case(f"{dtype} residual + {kind} {width}, weight {parameters}{', bias' * bias}{', scale' * scale}", run)

    for width in (48, 96, 192, 384, 768, 1536, 2050, 3075, 4096):  # every power of two that a row is rounded up to
        yield alone("bf16", width, "rms", False, "bf16")
    for width in (768, 2050, 4096):
        yield alone("bf16", width, "layer", True, "fp32")
    yield alone("bf16", 768, "layer", False, None)
    yield alone("fp32", 768, "rms", False, "fp32")
    yield alone("fp16", 3075, "layer", True, "fp16")
    for width in (768, 3075, 4096):
        yield added("bf16", width, "rms", False, False, "bf16")
        yield added("bf16", width, "layer", True, True, "fp32")


def heads(dtype: str, head_dim: int, normed: bool, rotated: bool, length: int = 256) -> tuple[Any, dict[str, Any]]:
    """A packed projection with its norm weights, and the table as an option."""
    qkv = torch.zeros(8, length, 3, 12, head_dim, dtype=DTYPES[dtype])
    q_weight, k_weight = torch.ones(2, head_dim, dtype=DTYPES[dtype]).unbind() if normed else (None, None)
    table = torch.zeros(2, length, head_dim // 2) if rotated else None
    return (qkv, q_weight, k_weight), {"table": table}


def qk_norm_rope_cases() -> Iterator[Case]:
    from vitok.ops import qk_norm_rope

    def case(dtype: str, head_dim: int, normed: bool, rotated: bool) -> Case:
        def run() -> None:
            tensors, options = heads(dtype, head_dim, normed, rotated)
            differentiated(qk_norm_rope, *tensors, **options)

        return Case(f"{dtype} head_dim {head_dim}{', norm' * normed}{', rope' * rotated}", run)

    for head_dim in (64, 72, 80, 96, 128, 256):
        yield case("bf16", head_dim, True, True)
        yield case("bf16", head_dim, False, True)
    yield case("bf16", 64, True, False)
    yield case("fp16", 72, True, True)
    yield case("fp32", 64, True, True)


def attention_cases() -> Iterator[Case]:
    from vitok.ops import attention

    def case(dtype: str, head_dim: int, label: str = "full", length: int = 256, **options: Any) -> Case:
        fused = label == "norm, rope"
        segments = options.pop("segments", None)

        def run() -> None:
            (qkv, *weights), table = heads(dtype, head_dim, fused, fused, length)
            if segments:
                options["cu_seqlens"] = torch.tensor(segments, dtype=torch.int32)
                qkv = qkv[:1]
            differentiated(attention, qkv, *weights, **table, **options)

        # float32 products are exact ones, which no matrix unit computes; the backward's tiles of the widest heads are
        # too small for the wide instructions.
        demands = None if dtype == "fp32" else "wide mma" if head_dim <= 128 else "mma"
        return Case(f"{dtype} head_dim {head_dim}, {label}", run, demands)

    for head_dim in (64, 72, 80, 96, 128):
        yield case("bf16", head_dim)
        yield case("bf16", head_dim, "norm, rope")
    yield case("bf16", 256)
    for head_dim in (64, 72):
        yield case("bf16", head_dim, "window 32", window=32)
        yield case("bf16", head_dim, "blocks of 64", causal_block=64)
        yield case("bf16", head_dim, "segments", segments=(0, 100, 256))
    yield case("bf16", 64, "257 tokens", length=257)
    yield case("fp16", 64)
    yield case("fp32", 64)
    yield case("fp32", 128, "norm, rope")


def gated_mlp_act_cases() -> Iterator[Case]:
    from vitok.ops import gated_mlp_act

    def case(dtype: str, hidden: int, gate: str) -> Case:
        def run() -> None:
            differentiated(gated_mlp_act, torch.zeros(8, 256, 2 * hidden, dtype=DTYPES[dtype]), gate=gate)

        return Case(f"{dtype} {gate} {hidden}", run)

    for gate in ("silu", "gelu"):
        for hidden in (2048, 2050, 3075):
            yield case("bf16", hidden, gate)
    yield case("fp16", 2048, "silu")
    yield case("fp32", 2048, "gelu")


def pixels(dtype: str, q: int, size: int, planar: bool, batch: int = 2) -> Tensor:
    """[B, 3q, size, size, 3], channels last or a view of a channels-first clip."""
    clip = torch.zeros(batch, q, 3, size, size, dtype=DTYPES[dtype]).permute(0, 1, 3, 4, 2)
    return clip if planar else clip.contiguous()


def layout(planar: bool) -> str:
    return "planar" if planar else "interleaved"


def tubelet_gather_cases() -> Iterator[Case]:
    from vitok.ops import tubelet_gather

    def case(source: str, target: str, q: int, p: int, pad: str, size: int, planar: bool) -> Case:
        def run() -> None:
            clip = pixels(source, q, size, planar)
            tubelet_gather(clip, tubelet=(q, p), pad=pad, dtype=DTYPES[target], impl="triton")

        return Case(f"{source}->{target} {q}x{p} {pad} {size} {layout(planar)}", run)

    for planar in (False, True):
        yield case("u8", "bf16", 1, 16, "edge", 256, planar)
        yield case("u8", "bf16", 4, 8, "zero", 128, planar)
        yield case("fp32", "fp16", 1, 16, "zero", 256, planar)
        yield case("bf16", "fp32", 2, 3, "edge", 256, planar)


def tubelet_embed_cases() -> Iterator[Case]:
    from vitok.ops import tubelet_embed

    def case(source: str, target: str, batch: int, q: int, p: int, pad: str, size: int, planar: bool) -> Case:
        def run() -> None:
            clip, elements = pixels(source, q, size, planar, batch), 3 * q * p * p
            weight, bias = torch.zeros(768, elements, dtype=DTYPES[target]), torch.zeros(768, dtype=DTYPES[target])

            def op(*tensors: Tensor, **options: Any) -> Tensor:
                return tubelet_embed(clip, *tensors, tubelet=(q, p), pad=pad, **options)

            if batch == 1:  # backward multiplies for real, here by the CPU
                differentiated(op, weight, bias)
            else:
                op(weight, bias, impl="triton")

        demands = None if target == "fp32" else "mma"
        return Case(f"{source}->{target} {q}x{p} {pad} {batch}x{size} {layout(planar)}", run, demands)

    for batch in (1, 16):  # small and large tiles
        for planar in (False, True):
            yield case("u8", "bf16", batch, 1, 16, "edge", 256, planar)
        yield case("bf16", "bf16", batch, 4, 8, "zero", 128, True)
    yield case("u8", "fp16", 1, 1, 16, "zero", 250, False)
    yield case("u8", "fp32", 1, 1, 16, "edge", 256, False)
    yield case("fp32", "fp32", 1, 4, 8, "edge", 128, True)


def tubelet_unembed_cases() -> Iterator[Case]:
    from vitok.ops import tubelet_unembed

    def case(dtype: str, batch: int, q: int, p: int, size: int, last: bool, to_bytes: bool) -> Case:
        def run() -> None:
            elements, frames = 3 * q * p * p, 1 if q == 1 else 3 * q
            tokens = torch.zeros(batch, -(-frames // q) * (-(-size // p)) ** 2, 768, dtype=DTYPES[dtype])
            weight, bias = (torch.zeros(elements, *more, dtype=DTYPES[dtype]) for more in ((768,), ()))
            options: dict[str, Any] = {"layout": "channels_last" if last else "channels_first", "tubelet": (q, p)}
            options["size"] = (frames, size, size)
            if to_bytes or batch > 1:  # backward multiplies for real, here by the CPU
                kind = torch.uint8 if to_bytes else None
                tubelet_unembed(tokens, weight, bias, out_dtype=kind, impl="triton", **options)
            else:
                differentiated(tubelet_unembed, tokens, weight, bias, **options)

        where = f"{'last' if last else 'first'}{', bytes' * to_bytes}"
        return Case(f"{dtype} {q}x{p} {batch}x{size} channels {where}", run, None if dtype == "fp32" else "mma")

    for batch in (1, 16):
        yield case("bf16", batch, 1, 16, 256, False, False)
        yield case("bf16", batch, 1, 16, 256, True, True)
    yield case("bf16", 2, 4, 8, 128, False, False)
    yield case("fp16", 2, 1, 16, 250, True, False)
    yield case("fp32", 1, 1, 16, 256, False, False)


def pixel_loss_cases() -> Iterator[Case]:
    from vitok.ops import pixel_loss

    def case(dtype: str, source: str, kind: str, q: int, p: int, size: int, planar: bool) -> Case:
        def run() -> None:
            target = pixels(source, q, size, planar, 8)
            tokens = -(-target.shape[1] // q) * (-(-size // p)) ** 2
            prediction = torch.zeros(8, tokens, 3 * q * p * p, dtype=DTYPES[dtype])
            differentiated(pixel_loss, prediction, target=target, tubelet=(q, p), kind=kind)

        return Case(f"{dtype} to {source} {kind} {q}x{p} {size} {layout(planar)}", run)

    for kind in ("l1", "l2", "charbonnier"):
        yield case("bf16", "u8", kind, 1, 16, 256, False)
        yield case("bf16", "u8", kind, 4, 8, 128, True)
    yield case("bf16", "fp32", "l1", 1, 16, 250, True)
    yield case("fp32", "fp32", "l2", 1, 16, 256, False)


def gaussian_sample_cases() -> Iterator[Case]:
    from vitok.ops import gaussian_sample, normal_noise

    def case(dtype: str, channels: int, sample: bool, tensors: bool) -> Case:
        def run() -> None:
            moments = torch.zeros(8, 256, 2 * channels, dtype=DTYPES[dtype])
            keys = (
                {"seed": torch.zeros(1, dtype=torch.int64), "sample_ids": torch.arange(8)} if tensors else {"seed": 3}
            )
            differentiated(gaussian_sample, moments, sample=sample, **keys)

        return Case(f"{dtype} {channels} channels{', sample' * sample}{', seed and ids in memory' * tensors}", run)

    for channels in (16, 64, 7):
        yield case("bf16", channels, True, False)
    yield case("bf16", 16, True, True)
    yield case("bf16", 16, False, False)
    yield case("fp16", 16, True, False)
    yield case("fp32", 16, True, False)
    yield Case("noise", lambda: normal_noise(3, torch.arange(8), 4096, impl="triton"))


# op -> its cases. Every tile that a launcher can choose belongs to one of them.
CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "norm": norm_cases,
    "qk_norm_rope": qk_norm_rope_cases,
    "attention": attention_cases,
    "gated_mlp_act": gated_mlp_act_cases,
    "tubelet_gather": tubelet_gather_cases,
    "tubelet_embed": tubelet_embed_cases,
    "tubelet_unembed": tubelet_unembed_cases,
    "pixel_loss": pixel_loss_cases,
    "gaussian_sample": gaussian_sample_cases,
}


@contextmanager
def recorder() -> Iterator[Callable[[str, Case, int], list[Launch]]]:
    """`record(op, case, arch)`: what the case would compile that no case before it did. Nothing is launched."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver, jit

    launches: list[Launch] = []
    current: list[Any] = []

    class Driver:
        """A machine whose device n is a GPU of compute capability n; Triton keeps its caches by device."""

        def get_current_device(self) -> int:
            return int(current[2])

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", current[2], 32)

    compiled = SimpleNamespace(
        run=lambda *_: None, launch_metadata=lambda *_: None, function=None, packed_metadata=None
    )

    def compile_nothing(self, key, signature, device, constants, options, attributes, warmup):  # type: ignore[no-untyped-def]
        launches.append(Launch(*current, self, signature, constants, attributes, dict(options.__dict__)))
        self.device_caches[device][0][key] = compiled
        return compiled

    def record(op: str, case: Case, arch: int) -> list[Launch]:
        launches.clear()
        current[:] = op, case, arch
        capability = (arch // 10, arch % 10)
        properties = SimpleNamespace(multi_processor_count={80: 108, 90: 132}.get(arch, 148), major=capability[0])
        with (
            mock.patch("torch.cuda.get_device_capability", lambda *_: capability),
            mock.patch("torch.cuda.get_device_properties", lambda *_: properties),
            mock.patch.object(Tensor, "is_cuda", property(lambda _: True), create=True),  # launchers ask before these
        ):
            case.run()
        return list(launches)

    driver.set_active(Driver())
    with mock.patch.object(jit.JITFunction, "_do_compile", compile_nothing):
        yield record


def measure(launch: Launch) -> dict[str, Any]:
    """Compile and disassemble; the row of the table."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", launch.arch, 32), options=launch.options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.check_output([tools / "cuobjdump", "--dump-resource-usage", cubin.name], text=True)
        quiet = {"text": True, "stderr": subprocess.DEVNULL}  # it warns of an ELF format of its own
        code = subprocess.check_output([tools / "nvdisasm", cubin.name], **quiet)
    sizes = {key: int(match[1]) for key in ("REG", "STACK", "LOCAL") if (match := re.search(rf"{key}:(\d+)", usage))}
    matrix = Counter(MATRIX.findall(code))
    return {
        "op": launch.op,
        "kernel": launch.kernel.fn.__name__,
        "case": launch.case.label,
        "tile": launch.tile(),
        "arch": launch.arch,
        "num_warps": launch.options["num_warps"],
        "num_stages": launch.options["num_stages"],
        "registers": sizes["REG"],
        "shared": compiled.metadata.shared,
        "stack": sizes["STACK"],
        "local": sizes["LOCAL"],
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "multiplies": "tt.dot" in compiled.asm["ttir"],
        "matrix": dict(sorted(matrix.items())),
        "instructions": {name: len(re.findall(rf"\b{re.escape(name)}\b", code)) for name in COUNTED},
    }


def problem(row: dict[str, Any], demands: str | None) -> str:
    """What a row must not be, or ""."""
    if row["spills"] or row["local"] or row["stack"]:
        return f"{row['spills']} spills, {row['local']} bytes of local memory, {row['stack']} of stack"
    if demands and row["multiplies"]:
        wanted = DEMANDS[demands].get(row["arch"], MATRIX.pattern)
        if not any(re.fullmatch(wanted, name) for name in row["matrix"]):
            return f"no {wanted} in the machine code"
    return ""


# Rows that spill some bytes and wait for a better tile, (kernel, case, arch). Any other that spills is an error, and so
# is one of these that no longer does, until it is taken off the list.
OPEN = {
    ("attention_backward_key_kernel", "fp32 head_dim 64, full", 90),
    ("attention_forward_kernel", "fp32 head_dim 128, norm, rope", 80),
    ("norm_backward_kernel", "bf16 residual + layer 3075, weight fp32, bias, scale", 100),
    ("norm_backward_kernel", "bf16 residual + rms 3075, weight bf16", 90),
    ("norm_backward_kernel", "bf16 rms 2050, weight bf16", 90),
    ("tubelet_embed_forward_kernel", "fp32->fp32 4x8 edge 1x128 planar", 80),
    ("tubelet_unembed_forward_kernel", "fp16 1x16 2x250 channels last", 80),
    ("tubelet_unembed_forward_kernel", "fp16 1x16 2x250 channels last", 90),
}

_LAUNCHES: list[Launch] = []  # found before the processes fork, which then need no copies of what cannot be pickled


def _measure(index: int) -> dict[str, Any]:
    try:
        return measure(_LAUNCHES[index])
    except Exception as error:
        said = str(error).strip().splitlines() or [""]
        return {"error": f"{type(error).__name__}: {said[-1]}"}


def save(file: Path, section: str, version: str, rows: list[dict[str, Any]]) -> None:
    """Replace one section of a JSON file that holds a row a line; the CUDA kernels' script writes another."""
    known = json.loads(file.read_text()) if file.is_file() else {}
    known[section] = {"version": version, "rows": rows}
    parts = []
    for name, part in sorted(known.items()):
        lines = ",\n".join(json.dumps(row) for row in part["rows"])
        parts.append(f'"{name}": {{"version": "{part["version"]}", "rows": [\n{lines}\n]}}')
    file.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", default="80,90,100", help="compute capabilities, default %(default)s")
    parser.add_argument("--ops", default=",".join(CASES), help="default: all")
    parser.add_argument("--json", type=Path, help="write the table to this file as well, in its section 'triton'")
    parser.add_argument("--jobs", type=int, default=int(os.environ.get("MAX_JOBS") or 2))
    options = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "0"  # decides what triton.jit makes of the kernels, which are imported below
    torch.set_num_threads(1)

    import triton

    archs, start = [int(arch) for arch in re.split(r"[;,\s]+", options.archs)], time.monotonic()
    idle = []
    with recorder() as record:
        for op in options.ops.split(","):
            for case in CASES[op]():
                found = [record(op, case, arch) for arch in archs]
                idle += [f"{op}, {case.label}" for launches in found[:1] if not launches]
                _LAUNCHES.extend(launch for launches in found for launch in launches)
    print(f"{len(_LAUNCHES)} compilations, triton {triton.__version__}, {options.jobs} processes", flush=True)
    for case in idle:
        print(f"note: {case} launches nothing that an earlier case does not", flush=True)

    rows, problems = [], []
    header = ("kernel", "case", "arch", "warps", "stages", "registers", "shared", "spills", "matrix")
    layout = "{:<34} {:<46} {:<7}{:>5}{:>7}{:>10}{:>8}{:>7}  {}"
    print(layout.format(*header), flush=True)
    with multiprocessing.get_context("fork").Pool(options.jobs, maxtasksperchild=64) as pool:
        for launch, row in zip(_LAUNCHES, pool.imap(_measure, range(len(_LAUNCHES))), strict=True):
            name = f"{launch.kernel.fn.__name__}, {launch.case.label}, sm_{launch.arch}"
            wrong = row.get("error") or problem(row, launch.case.demands)
            if (launch.kernel.fn.__name__, launch.case.label, launch.arch) in OPEN:
                wrong = "" if "spills" in wrong else wrong or "it spills no longer: take it off OPEN"
            if wrong:
                problems.append(f"{name}: {wrong} [{launch.tile()} num_warps={launch.options['num_warps']}]")
            if "error" in row:
                continue
            rows.append(row)
            matrix = " ".join(f"{count} {name}" for name, count in row["matrix"].items()) or "-"
            columns = (row["num_warps"], row["num_stages"], row["registers"], row["shared"], row["spills"], matrix)
            print(layout.format(row["kernel"], row["case"], f"sm_{row['arch']}", *columns), flush=True)
    for text in problems:
        print(f"error: {text}", file=sys.stderr)
    if options.json:
        save(options.json, "triton", triton.__version__, rows)
    seconds, spilling = time.monotonic() - start, sum(row["spills"] > 0 for row in rows)
    print(f"{len(rows)} kernels, {len(problems)} problems, {spilling} known to spill, {seconds:.0f} s", flush=True)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
