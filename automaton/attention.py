"""3x3 neighbourhood attention with a zero-padded border *inside* the softmax.

Each cell of an H x W grid attends to the nine cells around and including itself. A neighbour outside the grid is
a zero key and a zero value: its logit is 0 and it still takes its share of the softmax (published geca.py,
`LocalAttention`; NATTEN and the usual FlexAttention recipes treat the border otherwise and change the model).

Keys and values are read through nine shifted views of one padded tensor and never copied nine times; the backward
pass recomputes nothing but keeps only q, k, v and the nine weights of each cell and head.
"""

import torch
from torch.nn import functional as F

OFFSETS = tuple((dy, dx) for dy in range(3) for dx in range(3))  # of the padded grid; (1, 1) is the cell itself


def neighbourhood_attention(q, k, v):
    """q, k, v (N, H, W, heads, d) -> (N, H, W, heads, d): softmax over nine of q·k / sqrt(d), applied to v."""
    return _NeighbourhoodAttention.apply(q, k, v)


def _padded(x):
    """(N, H, W, heads, d) -> (N, H + 2, W + 2, heads, d), zeros around the grid."""
    return F.pad(x, (0, 0, 0, 0, 1, 1, 1, 1))


def _views(padded):
    """The nine shifted (N, H, W, heads, d) views of a padded tensor, in the order of OFFSETS."""
    h, w = padded.shape[1] - 2, padded.shape[2] - 2
    return [padded[:, dy:dy + h, dx:dx + w] for dy, dx in OFFSETS]


class _NeighbourhoodAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        scale = q.shape[-1] ** -0.5
        logits = torch.stack([(q * key).sum(-1) for key in _views(_padded(k))], -1)  # (N, H, W, heads, 9)
        exact = torch.promote_types(q.dtype, torch.float32)  # half precision is not enough for the softmax
        weights = (scale * logits.to(exact)).softmax(-1).to(q.dtype)
        out = torch.zeros_like(q)
        for i, value in enumerate(_views(_padded(v))):
            out.addcmul_(weights[..., i, None], value)
        ctx.save_for_backward(q, k, v, weights)
        return out

    @staticmethod
    def backward(ctx, grad):
        # The backward of a softmax is a difference of near equals, and nine terms are summed: not in half precision.
        kept = ctx.saved_tensors[0].dtype
        exact = torch.promote_types(kept, torch.float32)
        q, k, v, weights, grad = (tensor.to(exact) for tensor in (*ctx.saved_tensors, grad))
        scale = q.shape[-1] ** -0.5
        padded_k, padded_v = _padded(k), _padded(v)
        grad_weights = torch.stack([(grad * value).sum(-1) for value in _views(padded_v)], -1)
        inner = (weights * grad_weights).sum(-1, keepdim=True)
        grad_logits = scale * weights * (grad_weights - inner)  # backward of the softmax
        grad_q, grad_k, grad_v = torch.zeros_like(q), torch.zeros_like(padded_k), torch.zeros_like(padded_v)
        views = zip(_views(padded_k), _views(grad_k), _views(grad_v), strict=True)
        for i, (key, to_key, to_value) in enumerate(views):
            grad_q.addcmul_(grad_logits[..., i, None], key)
            to_key.addcmul_(grad_logits[..., i, None], q)
            to_value.addcmul_(weights[..., i, None], grad)
        inside = (slice(None), slice(1, -1), slice(1, -1))  # what fell outside the grid is dropped
        return grad_q.to(kept), grad_k[inside].to(kept), grad_v[inside].to(kept)
