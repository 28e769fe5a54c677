"""The yardstick: GeCA as one would write it first. Same weights, same result, nothing saved.

Every cell is computed at every step; position code, modulation and the whole embedding are computed anew at each of
them; keys and values are copied nine times (`unfold`), and autograd keeps what it likes. It is somewhat faster than the
published code, which does the same.
"""

import torch
from torch.nn import functional as F

from automaton.rule import HEAD_WIDTH


def position_code(cells, width):
    place = torch.arange(width, dtype=torch.float32)
    angle = torch.arange(cells, dtype=torch.float32)[:, None] * 10000 ** (-place / width)
    return torch.where(place % 2 == 0, angle.sin(), angle.cos())


def attention(layer, z, height, width):
    """(N, L, D) -> (N, L, D): softmax over nine gathered copies of keys and values."""
    n, cells, channels = z.shape
    heads = channels // HEAD_WIDTH

    def copies(x):  # (N, L, D) -> (N, heads, L, 9, d)
        x = F.unfold(x.transpose(1, 2).reshape(n, channels, height, width), 3, padding=1)
        return x.view(n, heads, HEAD_WIDTH, 9, cells).permute(0, 1, 4, 3, 2)

    q, k, v = layer.to_qkv(z).chunk(3, dim=-1)
    q = q.view(n, cells, heads, 1, HEAD_WIDTH).transpose(1, 2)  # (N, heads, L, 1, d)
    share = (q @ copies(k).transpose(-1, -2) * HEAD_WIDTH**-0.5).softmax(-1)
    out = share @ copies(v)  # (N, heads, L, 1, d)
    return layer.to_out(out.squeeze(3).transpose(1, 2).reshape(n, cells, channels))


def modulated(norm, x, shift, scale):
    return norm(x) * (1 + scale) + shift


def forward(model, x, t, y, state, fire):
    """What `GeCA.forward` returns: x (N, C, H, W), state (N, S, H, W), fire (steps, N, L) -> out, state."""
    height, width = x.shape[2:]
    (attend, mlp), last = model.transformer.layers[0], model.final_layer
    for fires in fire:
        c = model.t_embedder(t) + model.y_embedder(y)
        shift1, scale1, gate1, shift2, scale2, gate2 = model.transformer.adaLN_modulation(c)[:, None].chunk(6, -1)
        shift3, scale3 = last.adaLN_modulation(c)[:, None].chunk(2, -1)
        cells = torch.cat([x, state], 1).flatten(2).transpose(1, 2)  # (N, L, C + S)
        e = model.cell_to_embedding(cells)
        e = e + position_code(height * width, e.shape[-1]).to(e)
        z = e + gate1 * attention(attend.fn, modulated(attend.norm, e, shift1, scale1), height, width)
        z = z + gate2 * mlp.fn(modulated(mlp.norm, z, shift2, scale2))
        update = last.linear(modulated(lambda r: F.layer_norm(r, r.shape[-1:], eps=1e-6), z, shift3, scale3))
        state = state + (fires[..., None] * update).transpose(1, 2).reshape(state.shape)
    return state[:, : model.out_channels], state
