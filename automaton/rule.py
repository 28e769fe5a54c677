"""The local rule of GeCA: the weights of one step, under their published names, and the parts it consists of.

automaton/reference.py writes the rule out as a whole and numbers its steps (1) to (6); the numbers below are the same.
Here it is cut into the parts that automaton/engines.py computes for some cells only.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from automaton.attention import neighbourhood_attention

HEAD_WIDTH = 64


class Attention(nn.Module):
    """Weights of the attention: q, k, v without bias (rows q | k | v, each head-major), output with bias."""

    def __init__(self, width):
        super().__init__()
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Identity())  # published name: to_out.0


class FeedForward(nn.Module):
    """Linear -> exact GELU -> Linear."""

    def __init__(self, width, mlp_width):
        super().__init__()  # published names: net.0 and net.3 (a dropout of 0 lies between)
        self.net = nn.Sequential(nn.Linear(width, mlp_width), nn.GELU(), nn.Identity(), nn.Linear(mlp_width, width))

    def forward(self, x, linear=F.linear):
        x = self.net[1](linear(x, self.net[0].weight, self.net[0].bias))
        return linear(x, self.net[3].weight, self.net[3].bias)


class PreNorm(nn.Module):
    """A layer norm and what follows it."""

    def __init__(self, width, fn):
        super().__init__()
        self.norm = nn.LayerNorm(width)  # affine, eps 1e-5
        self.fn = fn


class Transformer(nn.Module):
    """One block and the modulation (adaLN-Zero) that all steps share."""

    def __init__(self, width, mlp_width):
        super().__init__()
        attention, mlp = Attention(width), FeedForward(width, mlp_width)
        self.layers = nn.ModuleList([nn.ModuleList([PreNorm(width, attention), PreNorm(width, mlp)])])
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))


class FinalLayer(nn.Module):
    """From a cell's embedding to the update of its state."""

    def __init__(self, width, state_channels):
        super().__init__()
        self.linear = nn.Linear(width, state_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))


class Modulation(NamedTuple):
    """What the condition does to every cell of an image, at all steps; each (N, 1, D)."""

    shift1: torch.Tensor
    scale1: torch.Tensor
    gate1: torch.Tensor
    shift2: torch.Tensor
    scale2: torch.Tensor
    gate2: torch.Tensor
    shift3: torch.Tensor
    scale3: torch.Tensor


class Cache(NamedTuple):
    """What neighbours read of every cell: its key and value; each (N, L, D)."""

    k: torch.Tensor
    v: torch.Tensor


def modulate(x, shift, scale):
    """adaLN: x·(1 + scale) + shift."""
    return torch.addcmul(shift, x, 1 + scale)


@lru_cache(maxsize=8)
def position_code(cells, width, device):
    """PE(n) of the n-th cell, row by row: sines in the even columns, cosines in the odd ones; (cells, width).

    Column j has the frequency 10000^(-j/width). (In most transformers, a sine and the cosine next to it share one.)
    """
    column = torch.arange(width, dtype=torch.float64)
    angle = torch.arange(cells, dtype=torch.float64)[:, None] * 10000 ** (-column / width)  # (cells, width)
    return torch.where(column % 2 == 0, angle.sin(), angle.cos()).float().to(device)


def line_code(height, width, channels, device):
    """As published: a cell's number in reading order, coded; (height · width, channels).

    It says nothing of rows as such: the cell below is `width` cells further on, and on a grid of another width all but
    the first row have other codes.
    """
    return position_code(height * width, channels, device)


def plane_code(height, width, channels, device):
    """Ours: the row coded by the first half of the channels, the column by the second; (height · width, channels)."""
    row, column = (position_code(cells, channels // 2, device) for cells in (height, width))
    return torch.cat([row[:, None].expand(-1, width, -1), column.expand(height, -1, -1)], -1).flatten(0, 1)


POSITION_CODES = {"published": line_code, "2d": plane_code}  # --position-code


class LocalRule(nn.Module):
    """The weights of one step, under their published names, and its parts; automaton/engines.py puts them together.

    Shapes: N images of L = H·W cells; of each image R cells, all of them or any selection. `base` (N, R, D) is the part
    of a cell's embedding that no step changes, `state` (N, R, S) its output and hidden channels, `m` the modulation.
    `linear` is F.linear, or stands in for it: engines.py records the results of matrix products, and replays them.
    """

    def __init__(self, in_channels, state_channels, width, mlp_width, position_code="published"):
        super().__init__()
        if position_code not in POSITION_CODES:
            raise ValueError(f"position code {position_code}: expected {' or '.join(POSITION_CODES)}")
        self.position_code = position_code
        self.in_channels, self.heads = in_channels, width // HEAD_WIDTH
        self.cell_to_embedding = nn.Linear(in_channels + state_channels, width)
        self.transformer = Transformer(width, mlp_width)
        self.final_layer = FinalLayer(width, state_channels)
        self.fused = False  # see compile_parts
        self.checkpoint_steps = True  # in training, recompute most of each step in backward instead of keeping it

    def compile_parts(self):
        """Let torch.compile fuse the kernels of each part of a step; with gradients, on a CPU, those of attention."""
        self.fused = True

    def step_parameters(self):
        """The parameters that every step uses (those of `base` and `modulation` are used once per call)."""
        return [self.cell_to_embedding.weight, *self.transformer.layers.parameters(),
                *self.final_layer.linear.parameters()]

    def base(self, x):
        """(1), the fixed part: x (N, C, H, W) -> input columns of W_e · x + b_e + PE, (N, L, D)."""
        base = F.linear(x.flatten(2).transpose(1, 2), self.cell_to_embedding.weight[:, : self.in_channels],
                        self.cell_to_embedding.bias)  # (N, L, D)
        return base + POSITION_CODES[self.position_code](*x.shape[2:], base.shape[2], base.device).to(base.dtype)

    def modulation(self, c):
        """(2): c (N, D) -> Modulation."""
        signals = torch.cat([self.transformer.adaLN_modulation(c), self.final_layer.adaLN_modulation(c)], -1)  # (N, 8D)
        return Modulation(*signals[:, None].chunk(len(Modulation._fields), dim=-1))

    def embed(self, base, state):
        """(1), complete: base (N, R, D), state (N, R, S) -> e (N, R, D)."""
        return base + F.linear(state, self.cell_to_embedding.weight[:, self.in_channels:])

    def project(self, e, m, which, linear=F.linear):
        """(3), the projections: e (N, R, D) -> queries (which="q"), keys and values ("kv") or all three,
        (N, R, D) each."""
        attention = self.transformer.layers[0][0]
        z = modulate(attention.norm(e), m.shift1, m.scale1)  # (N, R, D)
        first, width = "qkv".index(which), e.shape[-1]
        weight = attention.fn.to_qkv.weight[first * width: (first + len(which)) * width]
        return linear(z, weight).split(width, -1)

    def cache(self, base, state, m, linear=F.linear):
        """base (N, R, D), state (N, R, S) -> Cache of these cells, each (N, R, D)."""
        return Cache(*self.project(self.embed(base, state), m, "kv", linear))

    def query(self, base, state, m, linear=F.linear):
        """base (N, R, D), state (N, R, S) -> embeddings and queries of these cells, (N, R, D) each."""
        e = self.embed(base, state)
        return e, *self.project(e, m, "q", linear)

    def attend(self, q, k, v, rows, grid):
        """(3), the 3x3 attention: k, v (N, L, D); q (R, D) of the cells `rows` (R,) of the batch -> (R, D).

        Without `rows` all cells attend, q (N·L, D).
        """
        k, v = (t.unflatten(1, grid).unflatten(-1, (self.heads, HEAD_WIDTH)) for t in (k, v))  # (N, H, W, heads, d)
        q = q.unflatten(-1, (self.heads, HEAD_WIDTH))  # (R, heads, d)
        q = q.view_as(k) if rows is None else q
        return neighbourhood_attention(q, k, v, rows, self.fused).flatten(-2).flatten(0, -2)

    def step_update(self, base, state, k, v, m, rows, grid, linear=F.linear):
        """(3) to (5): base (N, R, D) and state (N, R, S) of the cells `rows` (N·R,), None: all; k, v (N, L, D) -> their
        update (N, R, S)."""
        e, q = self.query(base, state, m, linear)  # (N, R, D) each
        attended = self.attend(q.flatten(0, 1), k, v, rows, grid).view_as(q)  # (N, R, D)
        return self.update(e, attended, m, linear)

    def update(self, e, attended, m, linear=F.linear):
        """(3) from the attention's output on, (4) and (5): e, attended (N, R, D) -> (N, R, S)."""
        out, mlp = self.transformer.layers[0][0].fn.to_out[0], self.transformer.layers[0][1]
        z = torch.addcmul(e, m.gate1, linear(attended, out.weight, out.bias))  # (N, R, D)
        z = torch.addcmul(z, m.gate2, mlp.fn(modulate(mlp.norm(z), m.shift2, m.scale2), linear))  # (N, R, D)
        normed = F.layer_norm(z, z.shape[-1:], eps=1e-6)  # no affine weights
        return self.final_layer.linear(modulate(normed, m.shift3, m.scale3))
