"""The 3x3 neighbourhood attention of `attention.py` as three Triton kernels, for all cells or for selected ones.

For cell i, its neighbours j (nine, itself included) and the gradient do_i of the output, per head:

    s_ij = q_i·k_j / sqrt(d)     lse_i = log sum_j exp s_ij     p_ij = exp(s_ij - lse_i)     o_i = sum_j p_ij v_j
    g_ij = do_i·v_j              delta_i = sum_j p_ij g_ij      ds_ij = p_ij (g_ij - delta_i) / sqrt(d)
    dq_i = sum_j ds_ij k_j       dk_j = sum_i ds_ij q_i         dv_j = sum_i p_ij do_i

A neighbour outside the grid is a zero key and a zero value inside the softmax: a masked load gives both zeros, and
the loops need no other case for the border. Only q, k, v and lse are kept for the backward pass, which finds p again.
i is a neighbour of j where j is one of i, so dk and dv are gathered like the rest: each number is written by one
program, sums have one order, and results repeat bit by bit.

A program computes one head of BLOCK cells. Everything is summed in float32 and rounded once, when it is written.
Triton is imported here; import this module only where it is installed.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

BLOCK = 16  # cells of a program: with more, or with the loops unrolled, a wide head overflows the registers
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def neighbourhood_attention_triton(q, k, v, rows=None):
    """q, k, v (N, H, W, heads, d) -> (N, H, W, heads, d): what `neighbourhood_attention` computes.

    With rows (R,), distinct indices into the N·H·W cells of the batch: q (R, heads, d) -> (R, heads, d), only for
    those cells. That they are distinct and within the batch is not checked: the host would have to wait for them.
    """
    queries, dim = (k.shape, 5) if rows is None else ((*rows.shape, *k.shape[3:]), 3)
    if q.shape != queries or q.dim() != dim or v.shape != k.shape:
        raise ValueError("expected k and v (N, H, W, heads, d), q like them or, with rows (R,), (R, heads, d): "
                         f"found q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, "
                         f"rows {None if rows is None else tuple(rows.shape)}")
    if not {q.dtype, k.dtype, v.dtype} <= set(DTYPES):
        raise TypeError(f"the kernels compute in float32: found q, k, v in {q.dtype}, {k.dtype}, {v.dtype}")
    return _TritonAttention.apply(q, k, v, None if rows is None else rows.contiguous())


@triton.jit
def _read(pointer, stride, row, head, mask, d: tl.constexpr, D: tl.constexpr):
    """One head of the given rows, (BLOCK, D) in float32; zeros where masked and in the columns beyond d."""
    column = tl.arange(0, D)
    at = pointer + row.to(tl.int64)[:, None] * stride + head * d + column[None, :]  # int32 ends at 2 G numbers
    return tl.load(at, mask=mask[:, None] & (column < d)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _write(pointer, row, head, mask, x, d: tl.constexpr, D: tl.constexpr):
    """The reverse, to a contiguous tensor."""
    column = tl.arange(0, D)
    at = pointer + row.to(tl.int64)[:, None] * tl.num_programs(1) * d + head * d + column[None, :]
    tl.store(at, x.to(pointer.dtype.element_ty), mask=mask[:, None] & (column < d)[None, :])


@triton.jit
def _neighbour(cell, live, height, width, i):
    """The i-th of the nine cells around and including each cell, and where there is one: not outside the grid."""
    dy, dx = i // 3 - 1, i % 3 - 1
    y, x = cell // width % height + dy, cell % width + dx
    return cell + dy * width + dx, live & (y >= 0) & (y < height) & (x >= 0) & (x < width)


@triton.jit(do_not_specialize=["count"])  # the number of selected cells differs from step to step
def _forward(q, k, v, rows, out, lse, q_stride, k_stride, v_stride, count, height, width, scale,
             d: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(1).to(tl.int64)
    live = row < count
    cell = row
    if rows is not None:
        cell = tl.load(rows + row, mask=live, other=0).to(tl.int32)
    query = _read(q, q_stride, row, head, live, d, D)

    # The softmax in one pass: what is summed so far is scaled down whenever a larger logit comes.
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    mixed = tl.zeros((BLOCK, D), tl.float32)
    for i in range(9):
        other, inside = _neighbour(cell, live, height, width, i)
        logit = scale * tl.sum(query * _read(k, k_stride, other, head, inside, d, D), 1)
        larger = tl.maximum(largest, logit)
        shrink, weight = tl.exp(largest - larger), tl.exp(logit - larger)
        total = shrink * total + weight
        mixed = shrink[:, None] * mixed + weight[:, None] * _read(v, v_stride, other, head, inside, d, D)
        largest = larger
    tl.store(lse + head * count + row, largest + tl.log(total), mask=live)
    _write(out, row, head, live, mixed / total[:, None], d, D)


@triton.jit(do_not_specialize=["count"])
def _backward_q(q, k, v, rows, grad, lse, delta, grad_q, q_stride, k_stride, v_stride, grad_stride,
                count, height, width, scale, d: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(1).to(tl.int64)
    live = row < count
    cell = row
    if rows is not None:
        cell = tl.load(rows + row, mask=live, other=0).to(tl.int32)
    query = _read(q, q_stride, row, head, live, d, D)
    grad_out = _read(grad, grad_stride, row, head, live, d, D)
    log_total = tl.load(lse + head * count + row, mask=live, other=0.0)

    # delta is known only after all nine; so sum_j p (g - delta) k is summed in its two parts.
    mean_g = tl.zeros((BLOCK,), tl.float32)
    mean_gk = tl.zeros((BLOCK, D), tl.float32)
    mean_k = tl.zeros((BLOCK, D), tl.float32)
    for i in range(9):
        other, inside = _neighbour(cell, live, height, width, i)
        key = _read(k, k_stride, other, head, inside, d, D)
        p = tl.exp(scale * tl.sum(query * key, 1) - log_total)
        pg = p * tl.sum(grad_out * _read(v, v_stride, other, head, inside, d, D), 1)
        mean_g += pg
        mean_gk += pg[:, None] * key
        mean_k += p[:, None] * key
    tl.store(delta + head * count + row, mean_g, mask=live)
    _write(grad_q, row, head, live, scale * (mean_gk - mean_g[:, None] * mean_k), d, D)


@triton.jit(do_not_specialize=["count"])
def _backward_kv(q, k, v, place, grad, lse, delta, grad_k, grad_v, q_stride, k_stride, v_stride, grad_stride,
                 count, cells, height, width, scale, d: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(1).to(tl.int64)
    live = cell < cells
    key = _read(k, k_stride, cell, head, live, d, D)
    value = _read(v, v_stride, cell, head, live, d, D)
    sum_k = tl.zeros((BLOCK, D), tl.float32)
    sum_v = tl.zeros((BLOCK, D), tl.float32)
    for i in range(9):
        row, asks = _neighbour(cell, live, height, width, i)
        if place is not None:
            row = tl.load(place + row, mask=asks, other=-1)
            asks = row >= 0
        # Where nobody asks, query and grad_out are zeros, and so is what they add.
        query = _read(q, q_stride, row, head, asks, d, D)
        grad_out = _read(grad, grad_stride, row, head, asks, d, D)
        at = head * count + row
        p = tl.exp(scale * tl.sum(query * key, 1) - tl.load(lse + at, mask=asks, other=0.0))
        g = tl.sum(grad_out * value, 1)
        sum_k += (p * (g - tl.load(delta + at, mask=asks, other=0.0)))[:, None] * query
        sum_v += p[:, None] * grad_out
    _write(grad_k, cell, head, live, scale * sum_k, d, D)
    _write(grad_v, cell, head, live, sum_v, d, D)


def _matrix(x):
    """(..., heads, d) -> (cells, heads·d), the last dimension contiguous: a view of a slice of a projection."""
    x = x.flatten(-2).flatten(0, -2)
    return x if x.stride(1) == 1 else x.contiguous()


def _launch(kernel, cells, k, *arguments):
    """Run a kernel for `cells` cells and all heads of k; `arguments` are its own, without what follows from k."""
    height, width, heads, d = k.shape[1:]
    with torch.cuda.device_of(k):  # Triton launches on the current device, whatever the tensors are on
        kernel[(triton.cdiv(cells, BLOCK), heads)](*arguments, height, width, d**-0.5, d=d,
                                                   D=triton.next_power_of_2(d), BLOCK=BLOCK)


class _TritonAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, rows):
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        matrices = [_matrix(x) for x in (q, k, v)]
        count, heads = len(matrices[0]), k.shape[3]
        lse = torch.empty(heads, count, dtype=torch.float32, device=q.device)
        _launch(_forward, count, k, *matrices, rows, out, lse, *(x.stride(0) for x in matrices), count)
        ctx.save_for_backward(q, k, v, rows, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, rows, lse = ctx.saved_tensors
        grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
        *qkv, grad = (_matrix(x) for x in (q, k, v, grad))
        strides = [x.stride(0) for x in (*qkv, grad)]
        count, cells = len(qkv[0]), len(qkv[1])
        place = None
        if rows is not None:  # where in `rows` a cell is, or -1
            place = torch.full((cells,), -1, dtype=torch.int32, device=rows.device)
            place[rows.long()] = torch.arange(count, dtype=torch.int32, device=rows.device)
        delta = torch.empty_like(lse)
        _launch(_backward_q, count, k, *qkv, rows, grad, lse, delta, grads[0], *strides, count)
        _launch(_backward_kv, cells, k, *qkv, place, grad, lse, delta, *grads[1:], *strides, count, cells)
        return *grads, None
