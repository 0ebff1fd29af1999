"""QK norm and RoPE on the packed projection: every head's row x of q and of k, its D channels as two halves,

    n = x / sqrt(mean(x^2) + eps) * weight
    out[i] = n[i] cos[i] - n[i + D/2] sin[i],    out[i + D/2] = n[i + D/2] cos[i] + n[i] sin[i]

and v copied, in one pass. Fused: the split of the packed tensor, the norm, the casts, the rotation and the
concatenation; an element is read once and written once (4 bytes in bf16), where the eager composition passes over q and
k about ten times.

qkv, out  [B, L, 3, H, D]  float16, bfloat16 or float32; qkv by strides with neighbouring channels, out contiguous
weights   [D]              any of these dtypes, or None: no norm
table     [2, L, D/2]      float32 cosines and sines, or None: no rotation

A half is cut into a power of two and a rest, 36 = 32 + 4, instead of padded to 64. `rotate`, `rotate_back`,
`square_sum`, `head_rstd` and `rms_backward` are for kernels that fuse the same steps, such as attention.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

# Elements of one half in a tile: 16 a thread, two 16-byte loads of a 16-bit type. Not measured yet.
FORWARD_TILE = 2048
# The backward pass holds gradient, input and the weight's gradient of a tile at once: with 4 warps head_dim 64 in fp32
# spills on sm_100, with 8 it does not.
BACKWARD_TILE = 1024
NUM_WARPS, BACKWARD_WARPS = 4, 8
# Programs that share the rows of q, and as many for k and v: a few for each multiprocessor of any GPU.
MAX_PROGRAMS = 1024
SUM_ROWS, SUM_COLUMNS = 32, 32


@triton.jit
def rotate(first, second, cos, sin):
    """The pairs (first, second) turned by their angles."""
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def rotate_back(first, second, cos, sin):
    """The transpose of `rotate`: turned by minus the angles."""
    return first * cos + second * sin, second * cos - first * sin


@triton.jit
def square_sum(first, second):
    """[R] sums of the squares of the rows of two [R, N] tiles."""
    return tl.sum(first * first + second * second, axis=1)


@triton.jit
def head_rstd(squares, width, eps):
    """1 / sqrt(mean(x^2) + eps) from the sum of the squares of `width` channels."""
    return tl.rsqrt(squares / width + eps)


@triton.jit
def rms_backward(weighted, unit, rstd, mean):
    """dx of n = x rstd weight: weighted = dn weight, unit = x rstd, mean = mean(weighted unit) over the head."""
    return rstd * (weighted - unit * mean)


@triton.jit
def _load_halves(ptr, at, inside, START: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr):
    """[R, BLOCK] channels from START of the first halves of rows at `at`, and their partners; zero past the half."""
    HALF: tl.constexpr = (D + 1) // 2
    i = START + tl.arange(0, BLOCK)
    ptrs = ptr + at[:, None] + i[None, :]
    first = tl.load(ptrs, mask=inside[:, None] & (i < HALF)[None, :], other=0.0)
    second = tl.load(ptrs + HALF, mask=inside[:, None] & (i < D - HALF)[None, :], other=0.0)
    return first, second


@triton.jit
def _store_halves(ptr, at, inside, first, second, START: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr):
    HALF: tl.constexpr = (D + 1) // 2
    i = START + tl.arange(0, BLOCK)
    ptrs = ptr + at[:, None] + i[None, :]
    tl.store(ptrs, first.to(ptr.dtype.element_ty), mask=inside[:, None] & (i < HALF)[None, :])
    tl.store(ptrs + HALF, second.to(ptr.dtype.element_ty), mask=inside[:, None] & (i < D - HALF)[None, :])


@triton.jit
def _load_angles(ptr, at, stride_part, inside, START: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr):
    """[R, BLOCK] cosines and sines of rows whose token's row of the table is at `at`."""
    i = START + tl.arange(0, BLOCK)
    ptrs = ptr + at[:, None] + i[None, :]
    mask = inside[:, None] & (i < D // 2)[None, :]
    return tl.load(ptrs, mask=mask, other=1.0), tl.load(ptrs + stride_part, mask=mask, other=0.0)


@triton.jit
def _load_weights(q_ptr, k_ptr, part, START: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr):
    """[1, BLOCK] weights of the same channels and their partners, of q for part 0 and of k for part 1, in fp32."""
    HALF: tl.constexpr = (D + 1) // 2
    i = START + tl.arange(0, BLOCK)
    if part == 0:
        first = tl.load(q_ptr + i, mask=i < HALF, other=0.0)
        second = tl.load(q_ptr + HALF + i, mask=i < D - HALF, other=0.0)
    else:
        first = tl.load(k_ptr + i, mask=i < HALF, other=0.0)
        second = tl.load(k_ptr + HALF + i, mask=i < D - HALF, other=0.0)
    return first.to(tl.float32)[None, :], second.to(tl.float32)[None, :]


@triton.jit
def _locate(row, rows, length, heads, stride_b, stride_l, stride_part, stride_head, part, ALIGN: tl.constexpr):
    """int64 offsets of rows (b, l, h) of a part by strides, all multiples of ALIGN; rows past the end are at row 0."""
    row = tl.where(row < rows, row, 0)
    token = row // heads
    b = token // length
    at = b.to(tl.int64) * stride_b + (token - b * length).to(tl.int64) * stride_l
    at += (row - token * heads).to(tl.int64) * stride_head + part.to(tl.int64) * stride_part
    return tl.multiple_of(at, ALIGN)


@triton.jit
def _locate_angles(row, rows, length, heads, stride_l, ALIGN: tl.constexpr):
    return tl.multiple_of((tl.where(row < rows, row, 0) // heads % length).to(tl.int64) * stride_l, ALIGN)


@triton.jit
def _locate_packed(row, rows, heads, part, D: tl.constexpr):
    """Offsets of the rows in a contiguous packed tensor."""
    row = tl.where(row < rows, row, 0)
    token = row // heads
    return ((token.to(tl.int64) * 3 + part) * heads + row - token * heads) * D


@triton.jit
def _copy(from_ptr, to_ptr, source, target, inside, START: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr):
    first, second = _load_halves(from_ptr, source, inside, START, BLOCK, D)
    _store_halves(to_ptr, target, inside, first, second, START, BLOCK, D)


@triton.jit
def _squares(qkv_ptr, source, inside, START: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr):
    first, second = _load_halves(qkv_ptr, source, inside, START, BLOCK, D)
    return square_sum(first.to(tl.float32), second.to(tl.float32))


@triton.jit
def _forward(
    qkv_ptr, q_weight_ptr, k_weight_ptr, table_ptr, out_ptr, source, angles, target, inside, part, stride_part, rstd,
    NORM: tl.constexpr, ROTATE: tl.constexpr, START: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    first, second = _load_halves(qkv_ptr, source, inside, START, BLOCK, D)
    first, second = first.to(tl.float32), second.to(tl.float32)
    if NORM:
        weight, weight_second = _load_weights(q_weight_ptr, k_weight_ptr, part, START, BLOCK, D)
        first, second = first * rstd[:, None] * weight, second * rstd[:, None] * weight_second
    if ROTATE:
        cos, sin = _load_angles(table_ptr, angles, stride_part, inside, START, BLOCK, D)
        first, second = rotate(first, second, cos, sin)
    _store_halves(out_ptr, target, inside, first, second, START, BLOCK, D)


@triton.jit
def qk_norm_rope_forward_kernel(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    table_ptr,
    out_ptr,
    rows,
    length,
    heads,
    qkv_stride_b,
    qkv_stride_l,
    qkv_stride_part,
    qkv_stride_head,
    table_stride_part,
    table_stride_l,
    eps,
    D: tl.constexpr,
    NORM: tl.constexpr,
    ROTATE: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGN: tl.constexpr,
    TABLE_ALIGN: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """BLOCK_R rows of one part: n = x rstd weight, its pairs turned; v is copied.

    Channels are taken in two segments, MAIN and REST; the compiler merges the two loads of a segment.
    WIDE: row numbers need 64 bits; otherwise the divisions are of 32 bits.
    """
    SEGMENTS: tl.constexpr = 2 if REST else 1
    part = tl.program_id(1)
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    row = program * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < rows
    source = _locate(
        row, rows, length, heads, qkv_stride_b, qkv_stride_l, qkv_stride_part, qkv_stride_head, part, ALIGN
    )
    target = _locate_packed(row, rows, heads, part, D)
    if part == 2:
        for seg in tl.static_range(SEGMENTS):
            _copy(qkv_ptr, out_ptr, source, target, inside, seg * MAIN, REST if seg else MAIN, D)
    else:
        angles = _locate_angles(row, rows, length, heads, table_stride_l, TABLE_ALIGN)
        rstd = tl.zeros((BLOCK_R,), tl.float32)
        if NORM:
            for seg in tl.static_range(SEGMENTS):
                rstd += _squares(qkv_ptr, source, inside, seg * MAIN, REST if seg else MAIN, D)
            rstd = head_rstd(rstd, D, eps)
        for seg in tl.static_range(SEGMENTS):
            _forward(
                qkv_ptr, q_weight_ptr, k_weight_ptr, table_ptr, out_ptr, source, angles, target, inside, part,
                table_stride_part, rstd, NORM, ROTATE, seg * MAIN, REST if seg else MAIN, D,
            )  # fmt: skip


@triton.jit
def _turned_back(
    grad_ptr, table_ptr, grad_at, angles, inside, stride_part,
    ROTATE: tl.constexpr, START: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The gradient of what the rotation was given, in fp32."""
    first, second = _load_halves(grad_ptr, grad_at, inside, START, BLOCK, D)
    first, second = first.to(tl.float32), second.to(tl.float32)
    if ROTATE:
        cos, sin = _load_angles(table_ptr, angles, stride_part, inside, START, BLOCK, D)
        first, second = rotate_back(first, second, cos, sin)
    return first, second


@triton.jit
def _sums(
    grad_ptr, qkv_ptr, q_weight_ptr, k_weight_ptr, table_ptr, grad_at, source, angles, inside, part, stride_part,
    ROTATE: tl.constexpr, START: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """[R] sums over the channels of a segment: x^2, and u weight x."""
    u, u_second = _turned_back(grad_ptr, table_ptr, grad_at, angles, inside, stride_part, ROTATE, START, BLOCK, D)
    x, x_second = _load_halves(qkv_ptr, source, inside, START, BLOCK, D)
    x, x_second = x.to(tl.float32), x_second.to(tl.float32)
    weight, weight_second = _load_weights(q_weight_ptr, k_weight_ptr, part, START, BLOCK, D)
    return square_sum(x, x_second), tl.sum(u * weight * x + u_second * weight_second * x_second, axis=1)


@triton.jit
def _backward(
    grad_ptr, qkv_ptr, q_weight_ptr, k_weight_ptr, table_ptr, dqkv_ptr, grad_at, source, angles, target, inside, part,
    stride_part, rstd, mean, dw, dw_second,
    NORM: tl.constexpr, ROTATE: tl.constexpr, START: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Store dx of a segment; add its rows' shares of the weight's gradient to dw [R, BLOCK] and its partner."""
    u, u_second = _turned_back(grad_ptr, table_ptr, grad_at, angles, inside, stride_part, ROTATE, START, BLOCK, D)
    if NORM:
        x, x_second = _load_halves(qkv_ptr, source, inside, START, BLOCK, D)
        weight, weight_second = _load_weights(q_weight_ptr, k_weight_ptr, part, START, BLOCK, D)
        rstd, mean = rstd[:, None], mean[:, None]
        x, x_second = x.to(tl.float32) * rstd, x_second.to(tl.float32) * rstd
        dw += u * x
        dw_second += u_second * x_second
        u = rms_backward(u * weight, x, rstd, mean)
        u_second = rms_backward(u_second * weight_second, x_second, rstd, mean)
    _store_halves(dqkv_ptr, target, inside, u, u_second, START, BLOCK, D)
    return dw, dw_second


@triton.jit
def _store_partials(ptr, first, second, START: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr):
    HALF: tl.constexpr = (D + 1) // 2
    i = START + tl.arange(0, BLOCK)
    tl.store(ptr + i, tl.sum(first, axis=0), mask=i < HALF)
    tl.store(ptr + HALF + i, tl.sum(second, axis=0), mask=i < D - HALF)


@triton.jit
def qk_norm_rope_backward_kernel(
    grad_ptr,
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    table_ptr,
    dqkv_ptr,
    partials_ptr,
    rows,
    length,
    heads,
    grad_stride_b,
    grad_stride_l,
    grad_stride_part,
    grad_stride_head,
    qkv_stride_b,
    qkv_stride_l,
    qkv_stride_part,
    qkv_stride_head,
    table_stride_part,
    table_stride_l,
    eps,
    D: tl.constexpr,
    NORM: tl.constexpr,
    ROTATE: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGN: tl.constexpr,
    TABLE_ALIGN: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Every programs-th tile of BLOCK_R rows of one part, from the gradient g of out; v's is copied. With n = x rstd,

    u = g turned back,  dx = rstd (u weight - n mean(u weight n)),  partials[program, part] = sum over its rows of u n.
    """
    SEGMENTS: tl.constexpr = 2 if REST else 1
    part = tl.program_id(1)
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    REST_BLOCK: tl.constexpr = REST if REST else 1
    dw = tl.zeros((BLOCK_R, MAIN), tl.float32)
    dw_second = tl.zeros((BLOCK_R, MAIN), tl.float32)
    dw_rest = tl.zeros((BLOCK_R, REST_BLOCK), tl.float32)
    dw_second_rest = tl.zeros((BLOCK_R, REST_BLOCK), tl.float32)
    for first_row in range(program * BLOCK_R, rows, tl.num_programs(0) * BLOCK_R):
        row = first_row + tl.arange(0, BLOCK_R)
        inside = row < rows
        grad_at = _locate(
            row, rows, length, heads, grad_stride_b, grad_stride_l, grad_stride_part, grad_stride_head, part, ALIGN
        )
        target = _locate_packed(row, rows, heads, part, D)
        if part == 2:
            for seg in tl.static_range(SEGMENTS):
                _copy(grad_ptr, dqkv_ptr, grad_at, target, inside, seg * MAIN, REST if seg else MAIN, D)
        else:
            source = grad_at
            angles = _locate_angles(row, rows, length, heads, table_stride_l, TABLE_ALIGN)
            rstd = tl.zeros((BLOCK_R,), tl.float32)
            mean = tl.zeros((BLOCK_R,), tl.float32)
            if NORM:
                source = _locate(
                    row, rows, length, heads, qkv_stride_b, qkv_stride_l, qkv_stride_part, qkv_stride_head, part, ALIGN
                )
                squares = tl.zeros((BLOCK_R,), tl.float32)
                for seg in tl.static_range(SEGMENTS):
                    square, product = _sums(
                        grad_ptr, qkv_ptr, q_weight_ptr, k_weight_ptr, table_ptr, grad_at, source, angles, inside, part,
                        table_stride_part, ROTATE, seg * MAIN, REST if seg else MAIN, D,
                    )  # fmt: skip
                    squares += square
                    mean += product
                # Rows past the end are zeros: with eps = 0 their rstd is infinite and would make NaN of the sums.
                rstd = tl.where(inside, head_rstd(squares, D, eps), 0.0)
                mean = mean * rstd / D
            dw, dw_second = _backward(
                grad_ptr, qkv_ptr, q_weight_ptr, k_weight_ptr, table_ptr, dqkv_ptr, grad_at, source, angles, target,
                inside, part, table_stride_part, rstd, mean, dw, dw_second, NORM, ROTATE, 0, MAIN, D,
            )  # fmt: skip
            if REST:
                dw_rest, dw_second_rest = _backward(
                    grad_ptr, qkv_ptr, q_weight_ptr, k_weight_ptr, table_ptr, dqkv_ptr, grad_at, source, angles, target,
                    inside, part, table_stride_part, rstd, mean, dw_rest, dw_second_rest, NORM, ROTATE, MAIN, REST, D,
                )  # fmt: skip
    if NORM:  # noqa: SIM102  (a constant: without it nothing behind is compiled)
        if part < 2:
            partial_ptr = partials_ptr + (program.to(tl.int64) * 2 + part) * D
            _store_partials(partial_ptr, dw, dw_second, 0, MAIN, D)
            if REST:
                _store_partials(partial_ptr, dw_rest, dw_second_rest, MAIN, REST, D)


@triton.jit
def qk_norm_rope_sum_kernel(
    partials_ptr,
    dq_weight_ptr,
    dk_weight_ptr,
    programs,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dweight of one part = the sum of partials [programs, 2, D] over the programs, always in the same order."""
    part = tl.program_id(1)
    i = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, programs, ROWS):
        program = start + tl.arange(0, ROWS)
        at = (program * 2 + part).to(tl.int64)[:, None] * D + i[None, :]
        total += tl.load(partials_ptr + at, mask=(program < programs)[:, None] & (i < D)[None, :], other=0.0)
    dweight = tl.sum(total, axis=0)
    if part == 0:
        tl.store(dq_weight_ptr + i, dweight.to(dq_weight_ptr.dtype.element_ty), mask=i < D)
    else:
        tl.store(dk_weight_ptr + i, dweight.to(dk_weight_ptr.dtype.element_ty), mask=i < D)


def segments(head_dim: int) -> tuple[int, int]:
    """(MAIN, REST): a half of the head as a power of two and the power of two that holds what is left, or 0."""
    half = (head_dim + 1) // 2
    main = 1 << (half.bit_length() - 1)
    return main, triton.next_power_of_2(half - main) if half > main else 0


def alignment(*strides: int) -> int:
    """The largest of 16, 8, 4, 2 and 1 that divides all strides. Triton itself sees 16 only, and a head may be 72."""
    return math.gcd(16, *strides)


def qk_norm_rope_forward(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    table: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """Launch the forward kernel on qkv [B, L, 3, H, D], by strides of which the last is 1; the result is contiguous."""
    batch, length, _, heads, head_dim = qkv.shape
    out = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    rows = batch * length * heads
    if rows == 0:
        return out
    main, rest = segments(head_dim)
    block = max(1, FORWARD_TILE // main)
    qk_norm_rope_forward_kernel[(triton.cdiv(rows, block), 3)](
        qkv,
        q_weight,
        k_weight,
        table,
        out,
        rows,
        length,
        heads,
        *qkv.stride()[:4],
        *(table.stride()[:2] if table is not None else (0, 0)),
        float(eps),
        D=head_dim,
        NORM=q_weight is not None,
        ROTATE=table is not None,
        WIDE=rows + block >= 2**31,
        ALIGN=alignment(*qkv.stride()[:4]),
        TABLE_ALIGN=alignment(*table.stride()[:2]) if table is not None else 1,
        MAIN=main,
        REST=rest,
        BLOCK_R=block,
        num_warps=NUM_WARPS,
    )
    return out


def qk_norm_rope_backward(
    grad: torch.Tensor,
    qkv: torch.Tensor | None,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    table: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Launch the backward kernel, and with weights the sum of their partial gradients in a fixed order.

    qkv may be None without weights. Returns the gradients of qkv (contiguous), q_weight and k_weight.
    """
    batch, length, _, heads, head_dim = grad.shape
    dqkv = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    rows = batch * length * heads
    main, rest = segments(head_dim)
    block = max(1, BACKWARD_TILE // main)
    programs = max(1, min(triton.cdiv(rows, block), MAX_PROGRAMS))
    norm = q_weight is not None
    partials = torch.empty(programs, 2, head_dim, dtype=torch.float32, device=grad.device) if norm else None
    if rows or norm:
        qk_norm_rope_backward_kernel[(programs, 3)](
            grad,
            qkv if norm else None,
            q_weight,
            k_weight,
            table,
            dqkv,
            partials,
            rows,
            max(length, 1),
            max(heads, 1),
            *grad.stride()[:4],
            *(qkv.stride()[:4] if norm else (0, 0, 0, 0)),
            *(table.stride()[:2] if table is not None else (0, 0)),
            float(eps),
            D=head_dim,
            NORM=norm,
            ROTATE=table is not None,
            WIDE=rows + programs * block >= 2**31,
            ALIGN=alignment(*grad.stride()[:4], *(qkv.stride()[:4] if norm else ())),
            TABLE_ALIGN=alignment(*table.stride()[:2]) if table is not None else 1,
            MAIN=main,
            REST=rest,
            BLOCK_R=block,
            num_warps=BACKWARD_WARPS,
        )
    if not norm:
        return dqkv, None, None
    dq_weight, dk_weight = torch.empty_like(q_weight), torch.empty_like(k_weight)
    qk_norm_rope_sum_kernel[(triton.cdiv(head_dim, SUM_COLUMNS), 2)](
        partials,
        dq_weight,
        dk_weight,
        programs,
        D=head_dim,
        ROWS=SUM_ROWS,
        COLUMNS=SUM_COLUMNS,
        num_warps=NUM_WARPS,
    )
    return dqkv, dq_weight, dk_weight
