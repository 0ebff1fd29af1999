"""QK norm and RoPE on the packed projection, backward: gradients of qkv and of the norm's weights, without atomics.

With n = x rstd the normalised row, rstd = 1 / sqrt(mean(x^2) + eps), and u the gradient of a row of out turned back by
its angles,

    dx = rstd (u weight - n mean(u weight n)),    dweight = sum over rows of u n

v's gradient is copied. rstd is computed again; the rows' shares of dweight are summed by programs, then in order.

grad, dqkv  [B, L, 3, H, D]  dtype of qkv; grad by strides with neighbouring channels, dqkv contiguous
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vitok.kernels.qk_norm_rope_parts import (
    alignment,
    copy_halves,
    head_rstd,
    load_angles,
    load_halves,
    load_weights,
    locate,
    locate_angles,
    locate_packed,
    rms_backward,
    segments,
    square_sum,
    store_halves,
    turn_back,
)

# Elements of one half in a tile. Gradient, input and the weight's gradient are held at once: with 4 warps head_dim 64
# in fp32 spills on sm_100, with 8 it does not.
BACKWARD_TILE = 1024
BACKWARD_WARPS = 8
# Programs that share the rows of q, and as many for k and v: a few for each multiprocessor of any GPU.
MAX_PROGRAMS = 1024
SUM_ROWS, SUM_COLUMNS, SUM_WARPS = 32, 32, 4


@triton.jit
def _turned_back(
    grad_ptr, table_ptr, grad_at, angles, inside, stride_part,
    ROTATE: tl.constexpr, START: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The gradient of what the rotation was given, in fp32."""
    first, second = load_halves(grad_ptr, grad_at, inside, START, BLOCK, D)
    first, second = first.to(tl.float32), second.to(tl.float32)
    if ROTATE:
        cos, sin = load_angles(table_ptr, angles, stride_part, inside, START, BLOCK, D)
        first, second = turn_back(first, second, cos, sin)
    return first, second


@triton.jit
def _sums(
    grad_ptr, qkv_ptr, q_weight_ptr, k_weight_ptr, table_ptr, grad_at, source, angles, inside, part, stride_part,
    ROTATE: tl.constexpr, START: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """[R] sums over the channels of a segment: x^2, and u weight x."""
    u, u_second = _turned_back(grad_ptr, table_ptr, grad_at, angles, inside, stride_part, ROTATE, START, BLOCK, D)
    x, x_second = load_halves(qkv_ptr, source, inside, START, BLOCK, D)
    x, x_second = x.to(tl.float32), x_second.to(tl.float32)
    weight, weight_second = load_weights(q_weight_ptr, k_weight_ptr, part, START, BLOCK, D)
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
        x, x_second = load_halves(qkv_ptr, source, inside, START, BLOCK, D)
        weight, weight_second = load_weights(q_weight_ptr, k_weight_ptr, part, START, BLOCK, D)
        rstd, mean = rstd[:, None], mean[:, None]
        x, x_second = x.to(tl.float32) * rstd, x_second.to(tl.float32) * rstd
        dw += u * x
        dw_second += u_second * x_second
        u = rms_backward(u * weight, x, rstd, mean)
        u_second = rms_backward(u_second * weight_second, x_second, rstd, mean)
    store_halves(dqkv_ptr, target, inside, u, u_second, START, BLOCK, D)
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
        grad_at = locate(
            row, rows, length, heads, grad_stride_b, grad_stride_l, grad_stride_part, grad_stride_head, part, ALIGN
        )
        target = locate_packed(row, rows, heads, part, D)
        if part == 2:
            for seg in tl.static_range(SEGMENTS):
                copy_halves(grad_ptr, dqkv_ptr, grad_at, target, inside, seg * MAIN, REST if seg else MAIN, D)
        else:
            source = grad_at
            angles = locate_angles(row, rows, length, heads, table_stride_l, TABLE_ALIGN)
            rstd = tl.zeros((BLOCK_R,), tl.float32)
            mean = tl.zeros((BLOCK_R,), tl.float32)
            if NORM:
                source = locate(
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
        num_warps=SUM_WARPS,
    )
    return dqkv, dq_weight, dk_weight
