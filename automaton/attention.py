"""3x3 neighbourhood attention with a zero-padded border *inside* the softmax.

Each cell of an H x W grid attends to the nine cells around and including itself. A neighbour outside the grid is
a zero key and a zero value: its logit is 0 and it still takes its share of the softmax (published geca.py,
`LocalAttention`; NATTEN and the usual FlexAttention recipes treat the border otherwise and change the model).

The textbook way copies keys and values nine times (`unfold`, as in automaton/reference.py). Here nothing is copied:
queries against keys, and weights against values, both read nine rows of a matrix by index and combine them. PyTorch's
embedding bag does that in one pass; where there is a compiler (`fused`), torch.compile makes of nine gathers one loop
over all of it, in the numbers' own precision. The gradients have the same form. On a GPU a Triton kernel takes over
(automaton/triton_attention.py, which also writes the formulas out).
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def neighbourhood_attention(q, k, v, rows=None, fused=False):
    """softmax(q·k / sqrt(d)) over the nine neighbours, applied to v.

    k, v (N, H, W, heads, d) and q alike -> (N, H, W, heads, d). With `rows` (R,), distinct indices into the N·H·W
    cells of the batch, only these cells attend: q (R, heads, d) -> (R, heads, d). `fused`: by torch.compile, on a CPU.
    """
    if q.is_cuda and q.dtype != torch.float64 and _triton() is not None:
        return _triton()(q, k, v, rows)
    if rows is None:
        every = torch.arange(q.shape[:3].numel(), device=q.device)
        return _NeighbourhoodAttention.apply(q.flatten(0, 2), k, v, every, fused).view_as(q)
    return _NeighbourhoodAttention.apply(q, k, v, rows, fused)


@lru_cache(maxsize=1)
def _triton():
    """The Triton implementation, or None on a machine without Triton."""
    try:
        from automaton.triton_attention import neighbourhood_attention_triton
    except ImportError:
        return None
    return neighbourhood_attention_triton


@lru_cache(maxsize=8)
def _grid_neighbours(h, w, device):
    """Neighbours of every cell of one H x W grid: their indices (H·W, 9) int64, and inside (H·W, 9) bool.

    Cells are counted row by row; so are the nine places, from top left (0) to bottom right (8). Place 4 is the cell
    itself, and place 8 - j lies opposite place j. Where a neighbour would lie outside the grid, `inside` is False and
    the index points to some cell of the grid whose contribution must be multiplied by 0.
    """
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    dy, dx = torch.meshgrid(torch.arange(-1, 2), torch.arange(-1, 2), indexing="ij")
    y, x = y.reshape(-1, 1) + dy.flatten(), x.reshape(-1, 1) + dx.flatten()  # (H·W, 9)
    inside = (y >= 0) & (y < h) & (x >= 0) & (x < w)
    return (y.clamp(0, h - 1) * w + x.clamp(0, w - 1)).to(device), inside.to(device)


def neighbours(rows, h, w):
    """Neighbours of the cells `rows` (R,) of a batch of grids: indices into all N·H·W cells (R, 9), inside (R, 9)."""
    index, inside = _grid_neighbours(h, w, rows.device)
    cell = rows % (h * w)  # within its image; rows - cell is where the image begins
    return index[cell] + (rows - cell)[:, None], inside[cell]


def _per_head(index, heads):
    """Indices of cells (R, 9) -> indices of (cell, head) pairs (R·heads, 9), as `_matrix` orders them."""
    return (index[:, None] * heads + torch.arange(heads, device=index.device)[:, None]).flatten(0, 1)


def _matrix(x):
    """(..., heads, d) -> (cells · heads, d)."""
    return x.reshape(-1, x.shape[-1])


class Bags:
    """The two sums by PyTorch's embedding bag, and the softmax beside them."""

    @staticmethod
    def dot_products(x, cells, index):
        """x (R, heads, d), cells (M, heads, d), index (R, 9) -> (R, heads, 9): x[r] · cells[index[r, j]].

        This is the gradient of an embedding bag to its weights, which PyTorch offers only under this internal name.
        """
        index = _per_head(index, x.shape[1]).flatten()
        starts = torch.arange(0, len(index), 9, device=index.device)  # each bag has nine entries
        bag = torch.empty(0, dtype=torch.long, device=index.device)  # which bag an entry belongs to: filled in there
        flat = torch.ops.aten._embedding_bag_per_sample_weights_backward(_matrix(x), _matrix(cells), index, starts, bag,
                                                                         0)
        return flat.view(*x.shape[:2], 9)

    @staticmethod
    def weighted_sums(weights, cells, index):
        """weights (R, heads, 9), cells (M, heads, d), index (R, 9) -> (R, heads, d): weighted sums of nine cells."""
        return F.embedding_bag(_per_head(index, weights.shape[1]), _matrix(cells), mode="sum",
                               per_sample_weights=weights.flatten(0, 1)).view(*weights.shape[:2], -1)

    @staticmethod
    def softmax(logits):
        """(R, heads, 9), over the last: over a long axis of nine short ones it is several times faster."""
        return logits.flatten(0, 1).T.contiguous().softmax(0).T.view(logits.shape)


class Gathers:
    """The same as torch.compile can fuse it: one place of the nine after another."""

    @staticmethod
    def dot_products(x, cells, index):
        return torch.stack([(x * cells[index[:, j]]).sum(-1) for j in range(9)], -1)

    @staticmethod
    def weighted_sums(weights, cells, index):
        return sum(weights[..., j, None] * cells[index[:, j]] for j in range(9))

    @staticmethod
    def softmax(logits):
        return logits.softmax(-1)


def _weights(q, k, index, inside, sums):
    """q (R, heads, d), k (M, heads, d), index and inside (R, 9) -> attention weights (R, heads, 9).

    Outside the grid a weight is 0, which stands for the value of 0 there; its share of the softmax is lost.
    """
    logits = sums.dot_products(q * q.shape[-1] ** -0.5, k, index) * inside[:, None]  # outside: a key of 0
    return sums.softmax(logits) * inside[:, None]


def _forward(q, k, v, index, inside, sums=Bags):
    """q (R, heads, d), k, v (M, heads, d) of M = N·H·W cells, the neighbours of R cells (R, 9) -> (R, heads, d)."""
    exact_q, k, v = _at_least_float32(q, k, v)
    return sums.weighted_sums(_weights(exact_q, k, index, inside, sums), v, index).to(q.dtype)


def _backward(q, k, v, grad, index, inside, row, attends, sums=Bags):
    """Gradients of q, k and v.

    `row` (M, 9): the row of q that attends to a cell from each of its nine places; `attends` (M, 9): is there one?
    """
    dtype = q.dtype
    q, k, v, grad = _at_least_float32(q, k, v, grad)
    weights = _weights(q, k, index, inside, sums)  # (R, heads, 9)

    # Through the weighted sum and the softmax, on the side of the cells that attend.
    grad_weights = sums.dot_products(grad, v, index) * inside[:, None]
    grad_logits = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))
    grad_logits = grad_logits * q.shape[-1] ** -0.5  # the scale of the logits
    grad_q = sums.weighted_sums(grad_logits, k, index)

    # Keys and values, on the side of the cells that are attended to: a cell is place j of the neighbour that lies at
    # its own place 8 - j. So the gradient of its key is the sum over j of grad_logits[that neighbour's row, j] ·
    # q[that neighbour's row]: nine rows again, found by index, with a fixed order of summation. The value has weights
    # and grad in place of grad_logits and q.
    def seen(weights):
        return torch.stack([weights[row[:, j], :, j] for j in range(9)], -1) * attends[:, None]  # (M, heads, 9)

    grad_k, grad_v = sums.weighted_sums(seen(grad_logits), q, row), sums.weighted_sums(seen(weights), grad, row)
    return tuple(g.to(dtype) for g in (grad_q, grad_k, grad_v))


class _Passes(NamedTuple):
    """The functions above, or what torch.compile makes of them."""

    forward: Callable = _forward
    backward: Callable = _backward


def _forward_by_gathers(*inputs):
    return _forward(*inputs, Gathers)


def _backward_by_gathers(*inputs):
    return _backward(*inputs, Gathers)


@lru_cache(maxsize=1)
def _fused():
    """For any number of cells, so that it happens once."""
    return _Passes(*(torch.compile(part, dynamic=True) for part in (_forward_by_gathers, _backward_by_gathers)))


class _NeighbourhoodAttention(torch.autograd.Function):
    """Keeps only its inputs for backward, which computes the attention weights again."""

    @staticmethod
    def forward(ctx, q, k, v, rows, fused):
        ctx.save_for_backward(q, k, v, rows)
        ctx.fused = fused
        passes = _fused() if fused else _Passes()
        return passes.forward(q, k.flatten(0, 2), v.flatten(0, 2), *neighbours(rows, *k.shape[1:3]))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, rows = ctx.saved_tensors
        cells = torch.arange(k.shape[:3].numel(), device=k.device)
        attending, exists = (t.flip(1) for t in neighbours(cells, *k.shape[1:3]))  # (M, 9), M = N·H·W
        row_of_cell = torch.full_like(cells, -1).index_copy(0, rows, cells[:len(rows)])  # (M,), -1: does not attend
        row = torch.where(exists, row_of_cell[attending], -1)  # (M, 9)
        passes = _fused() if ctx.fused else _Passes()
        grad_q, grad_k, grad_v = passes.backward(
            q, k.flatten(0, 2), v.flatten(0, 2), grad, *neighbours(rows, *k.shape[1:3]), row.clamp(min=0), row >= 0)
        return grad_q, grad_k.view_as(k), grad_v.view_as(v), None, None


def _at_least_float32(*tensors):
    """Half precision is not enough for the softmax, nor for its backward, a difference of nearly equal numbers."""
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]
