"""3x3 neighbourhood attention with a zero-padded border *inside* the softmax.

Each cell of an H x W grid attends to the nine cells around and including itself. A neighbour outside the grid is
a zero key and a zero value: its logit is 0 and it still takes its share of the softmax (published geca.py,
`LocalAttention`; NATTEN and the usual FlexAttention recipes treat the border otherwise and change the model).

The textbook way copies keys and values nine times (`unfold`, as in automaton/reference.py). Here nothing is copied:
queries against keys, and weights against values, both read nine rows of a matrix by index and combine them. PyTorch's
embedding bag does that in one pass. The gradients have the same form. On a GPU a Triton kernel takes over
(automaton/triton_attention.py, which also writes the formulas out).
"""

from functools import lru_cache

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def neighbourhood_attention(q, k, v, rows=None):
    """softmax(q·k / sqrt(d)) over the nine neighbours, applied to v.

    k, v (N, H, W, heads, d) and q alike -> (N, H, W, heads, d). With `rows` (R,), distinct indices into the N·H·W
    cells of the batch, only these cells attend: q (R, heads, d) -> (R, heads, d).
    """
    if q.is_cuda and q.dtype != torch.float64 and _triton() is not None:
        return _triton()(q, k, v, rows)
    if rows is None:
        every = torch.arange(q.shape[:3].numel(), device=q.device)
        return _NeighbourhoodAttention.apply(q.flatten(0, 2), k, v, every).view_as(q)
    return _NeighbourhoodAttention.apply(q, k, v, rows)


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


def _dot_products(x, matrix, index):
    """x (B, d), matrix (M, d), index (B, 9) -> (B, 9): x[b] · matrix[index[b, j]].

    This is the gradient of an embedding bag to its weights, which PyTorch offers only under this internal name.
    """
    starts = torch.arange(0, index.numel(), 9, device=index.device)  # each bag has nine entries
    bag = torch.empty(0, dtype=torch.long, device=index.device)  # which bag an entry belongs to: PyTorch fills it in
    flat = torch.ops.aten._embedding_bag_per_sample_weights_backward(x, matrix, index.flatten(), starts, bag, 0)
    return flat.view_as(index)


def _weighted_sums(weights, matrix, index):
    """weights (B, 9), matrix (M, d), index (B, 9) -> (B, d): the sum over j of weights[b, j] · matrix[index[b, j]]."""
    return F.embedding_bag(index, matrix, mode="sum", per_sample_weights=weights)


class _NeighbourhoodAttention(torch.autograd.Function):
    """Keeps only its inputs for backward, which computes the attention weights again."""

    @staticmethod
    def forward(ctx, q, k, v, rows):
        ctx.save_for_backward(q, k, v, rows)
        exact_q, k, v = _at_least_float32(q, k, v)
        weights, index, _ = _attention_weights(exact_q, k, rows)
        return _weighted_sums(weights, _matrix(v), index).view_as(q).to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        *qkv, rows = ctx.saved_tensors
        q, k, v, grad = _at_least_float32(*qkv, grad)
        heads = k.shape[3]
        weights, index, inside = _attention_weights(q, k, rows)  # each (R·heads, 9)

        # Through the weighted sum and the softmax, on the side of the cells that attend.
        grad_weights = _dot_products(_matrix(grad), _matrix(v), index) * inside
        grad_logits = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))
        grad_logits *= q.shape[-1] ** -0.5  # the scale of the logits
        grad_q = _weighted_sums(grad_logits, _matrix(k), index).view_as(q)

        # Keys and values, on the side of the cells that are attended to: which rows of q attend to a cell? A cell is
        # place j of the neighbour that lies at its own place 8 - j, hence the flip. So the gradient of its key is the
        # sum over j of grad_logits[that neighbour's row, j] · q[that neighbour's row]: nine rows again, found by index,
        # with a fixed order of summation. The value has weights and grad in place of grad_logits and q.
        cells = torch.arange(k.shape[:3].numel(), device=k.device)
        attending, exists = (t.flip(1) for t in neighbours(cells, *k.shape[1:3]))  # (M, 9), M = N·H·W
        row_of_cell = torch.full_like(cells, -1).index_copy(0, rows, cells[:len(rows)])  # (M,), -1: does not attend
        row = torch.where(exists, row_of_cell[attending], -1)  # (M, 9)
        attends = (row >= 0).repeat_interleave(heads, 0)  # (M·heads, 9)
        row = _per_head(row.clamp(min=0), heads)  # (M·heads, 9) into the R·heads rows of weights, q and grad
        entry = row * 9 + torch.arange(9, device=k.device)  # … and there the j-th of the nine: the cell itself
        grad_k = _weighted_sums(grad_logits.take(entry) * attends, _matrix(q), row).view_as(k)
        grad_v = _weighted_sums(weights.take(entry) * attends, _matrix(grad), row).view_as(v)
        return (*(g.to(qkv[0].dtype) for g in (grad_q, grad_k, grad_v)), None)


def _at_least_float32(*tensors):
    """Half precision is not enough for the softmax, nor for its backward, a difference of nearly equal numbers."""
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def _matrix(x):
    """(..., heads, d) -> (cells · heads, d)."""
    return x.reshape(-1, x.shape[-1])


def _attention_weights(q, k, rows):
    """q (R, heads, d), k (N, H, W, heads, d) -> weights, index into `_matrix(k)`, inside; each (R·heads, 9).

    Outside the grid a weight is 0, which stands for the value of 0 there; its share of the softmax is lost.
    """
    heads = k.shape[3]
    index, inside = neighbours(rows, *k.shape[1:3])  # (R, 9)
    index, inside = _per_head(index, heads), inside.to(q.dtype).repeat_interleave(heads, 0)  # (R·heads, 9)
    logits = _dot_products(_matrix(q * q.shape[-1] ** -0.5), _matrix(k), index) * inside  # outside: a key of 0
    weights = logits.T.contiguous().softmax(0).T  # softmax over a long axis of nine short ones is several times faster
    return weights * inside, index, inside
