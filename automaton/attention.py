"""3x3 neighbourhood attention with a zero-padded border *inside* the softmax.

Each cell of an H x W grid attends to the nine cells around and including itself. A neighbour outside the grid is
a zero key and a zero value: its logit is 0 and it still takes its share of the softmax (published geca.py,
`LocalAttention`; NATTEN and the usual FlexAttention recipes treat the border otherwise and change the model).

Nothing is copied nine times. Queries against keys and weights against values are both "look up nine rows of a table and
combine them", which is what PyTorch's embedding bag computes in one pass; so are all gradients, each as a sum over the
nine cells that look at a cell. On a GPU a Triton kernel does the same (automaton/triton_attention.py).
"""

from functools import lru_cache

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def neighbourhood_attention(q, k, v, rows=None):
    """Softmax over nine of q·k / sqrt(d), applied to v.

    k, v (N, H, W, heads, d) and q alike -> (N, H, W, heads, d). With `rows` (R,), different numbers of cells counted
    over all N·H·W, only these cells attend: q (R, heads, d) -> (R, heads, d).
    """
    if q.is_cuda and q.dtype != torch.float64 and _triton() is not None:
        return _triton()(q, k, v, rows)
    if rows is None:
        every = torch.arange(q.shape[:3].numel(), device=q.device)
        return _NeighbourhoodAttention.apply(q.flatten(0, 2), k, v, every).view_as(q)
    return _NeighbourhoodAttention.apply(q, k, v, rows)


@lru_cache(maxsize=1)
def _triton():
    """The Triton kernels, or None on a machine without Triton."""
    try:
        from automaton.triton_attention import neighbourhood_attention_triton
    except ImportError:
        return None
    return neighbourhood_attention_triton


@lru_cache(maxsize=8)
def _grid_neighbours(h, w, device):
    """Of each of H·W cells the nine neighbours, row by row: numbers (L, 9) int64, and (L, 9) bool: inside the grid.

    The opposite of neighbour j is neighbour 8 − j. Outside the grid the number means nothing.
    """
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    dy, dx = torch.meshgrid(torch.arange(-1, 2), torch.arange(-1, 2), indexing="ij")
    y, x = y.reshape(-1, 1) + dy.flatten(), x.reshape(-1, 1) + dx.flatten()  # (L, 9)
    inside = (y >= 0) & (y < h) & (x >= 0) & (x < w)
    return (y.clamp(0, h - 1) * w + x.clamp(0, w - 1)).to(device), inside.to(device)


def neighbours(rows, h, w):
    """The same of cells `rows` (R,) of a batch, numbered through all its images."""
    number, inside = _grid_neighbours(h, w, rows.device)
    cell = rows % (h * w)
    return number[cell] + (rows - cell)[:, None], inside[cell]


def _of_heads(numbers, heads):
    """Rows (R, 9) of a table with a row per cell -> rows (R · heads, 9) of a table with a row per cell and head."""
    return (numbers[:, None] * heads + torch.arange(heads, device=numbers.device)[:, None]).flatten(0, 1)


def _products(x, table, places):
    """x (B, d), table (T, d), places (B, 9) -> (B, 9): the product of each x with nine rows of the table.

    It is the gradient of an embedding bag to its weights, which PyTorch offers only under this internal name.
    """
    starts = torch.arange(0, places.numel(), 9, device=places.device)
    bag = torch.empty(0, dtype=torch.long, device=places.device)  # PyTorch fills it in
    flat = torch.ops.aten._embedding_bag_per_sample_weights_backward(x, table, places.flatten(), starts, bag, 0)
    return flat.view_as(places)


def _mixtures(weights, table, places):
    """weights (B, 9), table (T, d), places (B, 9) -> (B, d): sums of nine weighted rows of the table."""
    return F.embedding_bag(places, table, mode="sum", per_sample_weights=weights)


class _NeighbourhoodAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, rows):
        ctx.save_for_backward(q, k, v, rows)
        exact_q, k, v = _exact(q, k, v)
        weights, places, _ = _weights(exact_q, k, rows)
        return _mixtures(weights, _table(v), places).view_as(q).to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        *kept, rows = ctx.saved_tensors
        q, k, v, grad = _exact(*kept, grad)
        weights, places, inside = _weights(q, k, rows)
        grad_weights = _products(_table(grad), _table(v), places) * inside
        grad_logits = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))  # of the softmax
        grad_logits *= q.shape[-1] ** -0.5
        grad_q = _mixtures(grad_logits, _table(k), places).view_as(q)
        # What a cell gave as a neighbour: of each of the nine that may have looked at it the row, if it attended.
        every = torch.arange(k.shape[:3].numel(), device=k.device)
        number, there = (t.flip(1) for t in neighbours(every, *k.shape[1:3]))
        row = torch.full_like(every, -1).index_copy(0, rows, every[:len(rows)])
        row = torch.where(there, row[number], -1)  # (M, 9)
        looked = _of_heads(row.clamp(min=0), k.shape[3])
        which = looked * 9 + torch.arange(9, device=k.device)  # row, head and its j-th neighbour: the cell itself
        there = (row >= 0).repeat_interleave(k.shape[3], 0)
        grad_k = _mixtures(grad_logits.take(which) * there, _table(q), looked).view_as(k)
        grad_v = _mixtures(weights.take(which) * there, _table(grad), looked).view_as(v)
        return (*(g.to(kept[0].dtype) for g in (grad_q, grad_k, grad_v)), None)


def _exact(*tensors):
    """Half precision is not enough for the softmax, nor for its backward, a difference of near equals."""
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def _table(x):
    """(..., heads, d) -> one row of d per cell and head."""
    return x.reshape(-1, x.shape[-1])


def _weights(q, k, rows):
    """q (R, heads, d), k (N, H, W, heads, d) -> weights (R · heads, 9), 0 outside the grid; places; inside."""
    number, inside = neighbours(rows, *k.shape[1:3])
    places = _of_heads(number, k.shape[3])
    inside = inside.to(q.dtype).repeat_interleave(k.shape[3], 0)
    logits = _products(_table(q * q.shape[-1] ** -0.5), _table(k), places) * inside  # outside: a key of 0
    weights = logits.T.contiguous().softmax(0).T  # softmax over a long axis of nine short ones is several times faster
    return weights * inside, places, inside  # … and a value of 0
