"""GeCA in one screen: the definition of the model, computed as it is written. Read this first.

Each pixel of the latent is a cell with C input, 2C output and `hidden` channels. The input is the noisy latent x_t and
stays; output and hidden channels are the cell's living state. Life starts in the centre cell, with noise in its output
channels, and grows by `steps` applications of one local rule (paper Sec. 2; published geca.py:382-425):

    (1)  e = W_e · [input, state] + b_e + PE(n)             embedding of cell n = row · W + column
    (2)  shift, scale, gate = Linear(SiLU(c))               modulation by step t and labels, the same at all steps
    (3)  z = e + gate1 · Attn(LN(e) · (1 + scale1) + shift1)    over the 3 x 3 neighbourhood
    (4)  z ← z + gate2 · MLP(LN(z) · (1 + scale2) + shift2)
    (5)  update = Linear(LN(z) · (1 + scale3) + shift3)
    (6)  state ← state + fire · update                      every cell fires with probability 1/2, and else rests

At the end the output channels are the answer: noise prediction and variance interpolation. Nothing is saved here: every
cell is computed at every step and autograd keeps what it likes. automaton/engines.py computes the same for less; tests
compare it with this file, and benchmarks measure it against this file.
"""

import torch
from torch.nn import functional as F

from automaton.rule import HEAD_WIDTH


def forward(model, x, t, y, fire, state=None, seed_noise=None):
    """What `GeCA.forward` (models.py) computes, with its random draws as arguments.

    x (N, C, H, W), t (N,), y (N, K), fire (steps, N, L) bool with L = H·W -> out (N, 2C, H, W), state (N, S, H, W),
    S = 2C + hidden. Starts from `state` (N, S, H, W) or else from one living cell, seed_noise (N, 2C).
    """
    n, channels, height, width = x.shape
    if state is None:
        state = x.new_zeros(n, 2 * channels + model.hidden, height, width)                       # (N, S, H, W)
        state[:, : 2 * channels, height // 2, width // 2] = seed_noise
    cells = torch.cat([x, state], 1).flatten(2).transpose(1, 2)                                  # (N, L, C + S)
    (attend, mlp), last = model.transformer.layers[0], model.final_layer

    c = model.t_embedder(t) + model.y_embedder(y)                                                # (N, D)
    signals = model.transformer.adaLN_modulation(c)[:, None]                                     # (2) (N, 1, 6D)
    shift1, scale1, gate1, shift2, scale2, gate2 = signals.chunk(6, -1)                          #     (N, 1, D) each
    shift3, scale3 = last.adaLN_modulation(c)[:, None].chunk(2, -1)                              #     (N, 1, D) each
    position = position_code(height * width, c.shape[-1]).to(c)                                  # (L, D)
    for fires in fire:                                                                           # (N, L)
        e = model.cell_to_embedding(cells) + position                                            # (1) (N, L, D)
        z = layer_norm(e, attend.norm) * (1 + scale1) + shift1                                   # (3) (N, L, D)
        z = e + gate1 * attention(attend.fn, z, height, width)                                   #     (N, L, D)
        inner = F.gelu(mlp.fn.net[0](layer_norm(z, mlp.norm) * (1 + scale2) + shift2))          # (4) (N, L, MLP)
        z = z + gate2 * mlp.fn.net[3](inner)                                                     #     (N, L, D)
        z = F.layer_norm(z, z.shape[-1:], eps=1e-6) * (1 + scale3) + shift3                      # (5) (N, L, D)
        update = fires[..., None] * last.linear(z)                                               # (6) (N, L, S)
        cells = torch.cat([cells[..., :channels], cells[..., channels:] + update], -1)           #     (N, L, C + S)
    state = cells[..., channels:].transpose(1, 2).reshape(state.shape)                           # (N, S, H, W)
    return state[:, : 2 * channels], state


def attention(weights, z, height, width):
    """Every cell attends to its 3 x 3 neighbourhood: z (N, L, D) -> (N, L, D).

    Outside the grid lies zero padding: a key and a value of 0, which takes its share of the softmax (geca.py,
    `LocalAttention`).
    """
    n, cells, channels = z.shape
    heads = channels // HEAD_WIDTH

    def neighbourhood(x):
        x = x.transpose(1, 2).reshape(n, channels, height, width)                                # (N, D, H, W)
        x = F.unfold(x, 3, padding=1).view(n, heads, HEAD_WIDTH, 9, cells)                       # (N, heads, d, 9, L)
        return x.permute(0, 1, 4, 3, 2)                                                          # (N, heads, L, 9, d)

    q, k, v = weights.to_qkv(z).chunk(3, -1)                                                     # (N, L, D) each
    q = q.view(n, cells, heads, 1, HEAD_WIDTH).transpose(1, 2)                                   # (N, heads, L, 1, d)
    logits = q @ neighbourhood(k).transpose(-1, -2) / HEAD_WIDTH**0.5                            # (N, heads, L, 1, 9)
    out = logits.softmax(-1) @ neighbourhood(v)                                                  # (N, heads, L, 1, d)
    return weights.to_out(out.transpose(1, 2).reshape(n, cells, channels))                       # (N, L, D)


def layer_norm(x, affine):
    return F.layer_norm(x, x.shape[-1:], affine.weight, affine.bias, eps=1e-5)


def position_code(cells, width):
    """PE(n): column j is sin (j even) or cos (j odd) of n · 10000^(-j/D); (L, D)."""
    column = torch.arange(width, dtype=torch.float64)
    angle = torch.arange(cells, dtype=torch.float64)[:, None] * 10000 ** (-column / width)       # (L, D)
    return torch.where(column % 2 == 0, angle.sin(), angle.cos())                                # (L, D)
