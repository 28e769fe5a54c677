"""The local rule of GeCA: the weights of one step and its parts.

One cell per latent pixel; a cell holds [input | output | hidden] channels. The input is x_t and never moves; output
and hidden together are the living *state*. One step (paper Sec. 2; published geca.py `f`):

    e = embedding of the cell + position code                      every cell
    z = e + gate1 · attention(modulated norm of e)                 3x3 neighbourhood
    z = z + gate2 · MLP(modulated norm of z)
    state += fire · linear(modulated norm of z)                    each cell fires with probability 1/2
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
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


class Recorder:
    """F.linear that remembers its results, in order."""

    def __init__(self):
        self.results = []

    def __call__(self, x, weight, bias=None):
        self.results.append(F.linear(x, weight, bias))
        return self.results[-1]


class Replay:
    """F.linear whose results are known already: costs nothing now, and its gradients in backward."""

    def __init__(self, results):
        self.results = iter(results)

    def __call__(self, x, weight, bias=None):
        known = next(self.results)
        return _KnownLinear.apply(x.to(known.dtype), weight.to(known.dtype), bias, known)


class _KnownLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, known):
        ctx.save_for_backward(x, weight)
        return known.view_as(known)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows, (needs_x, needs_weight, needs_bias, _) = grad.flatten(0, -2), ctx.needs_input_grad
        return (grad @ weight if needs_x else None, rows.T @ x.flatten(0, -2) if needs_weight else None,
                rows.sum(0) if needs_bias else None, None)


def modulate(x, shift, scale):
    """adaLN: x·(1 + scale) + shift."""
    return torch.addcmul(shift, x, 1 + scale)


@lru_cache(maxsize=8)
def position_code(cells, width, device):
    """PE(n): sines in the even and cosines in the odd places, (cells, width); n counts cells row by row.

    The published frequencies differ between a sine and its cosine: place j has 10000^(-j/width).
    """
    place = torch.arange(width, dtype=torch.float64)
    angle = torch.arange(cells, dtype=torch.float64)[:, None] * 10000 ** (-place / width)
    return torch.where(place % 2 == 0, angle.sin(), angle.cos()).float().to(device)


class LocalRule(nn.Module):
    """The weights of one step, under their published names, and its parts; automaton/engines.py puts them together.

    Tensors are (N, R, …): R cells of each of N images, all of them or any selection. `linear` is F.linear, or what
    takes its place to remember results (Recorder) or to use those remembered (Replay).
    """

    def __init__(self, in_channels, state_channels, width, mlp_width):
        super().__init__()
        self.in_channels, self.heads = in_channels, width // HEAD_WIDTH
        self.cell_to_embedding = nn.Linear(in_channels + state_channels, width)
        self.transformer = Transformer(width, mlp_width)
        self.final_layer = FinalLayer(width, state_channels)
        self.checkpoint_steps = True  # in training, compute each step again in backward instead of keeping it

    def compile_parts(self):
        """Fuse the kernels of each part with torch.compile; for any number of cells, so that it happens once."""
        for name in ("tables", "mlp", "update"):
            setattr(self, name, torch.compile(getattr(self, name), dynamic=True))

    def step_parameters(self):
        """The parameters that a step uses, once for all steps."""
        return [self.cell_to_embedding.weight, *self.transformer.layers.parameters(),
                *self.final_layer.linear.parameters()]

    def base(self, x):
        """x (N, C, H, W) -> (N, H·W, D): the input's share of the embedding and the position code."""
        base = F.linear(x.flatten(2).transpose(1, 2), self.cell_to_embedding.weight[:, : self.in_channels],
                        self.cell_to_embedding.bias)
        return base + position_code(base.shape[1], base.shape[2], base.device).to(base.dtype)

    def modulation(self, c):
        """c (N, D) -> Modulation."""
        signals = torch.cat([self.transformer.adaLN_modulation(c), self.final_layer.adaLN_modulation(c)], -1)
        return Modulation(*signals[:, None].chunk(8, dim=-1))

    def embed(self, base, state):
        """base (N, R, D), state (N, R, S) -> e (N, R, D)."""
        return base + F.linear(state, self.cell_to_embedding.weight[:, self.in_channels:])

    def project(self, e, m, which, linear=F.linear):
        """e (N, R, D) -> what `which` names: "q" the queries, "kv" keys and values; (N, R, D) each."""
        attention = self.transformer.layers[0][0]
        z = modulate(attention.norm(e), m.shift1, m.scale1)
        first, width = "qkv".index(which), e.shape[-1]
        weight = attention.fn.to_qkv.weight[first * width: (first + len(which)) * width]
        return linear(z, weight).split(width, -1)

    def tables(self, base, state, m, linear=F.linear):
        """What neighbours and later steps look up: embeddings, keys and values, each (N, R, D)."""
        e = self.embed(base, state)
        return e, *self.project(e, m, "kv", linear)

    def attend(self, q, k, v, rows, grid):
        """q (R', D) of the cells `rows` (R',) of all images (None: of all cells), k, v (N, H·W, D) -> (R', D)."""
        k, v = (t.unflatten(1, grid).unflatten(-1, (self.heads, HEAD_WIDTH)) for t in (k, v))
        q = q.unflatten(-1, (self.heads, HEAD_WIDTH))
        return neighbourhood_attention(q.view_as(k) if rows is None else q, k, v, rows).reshape(len(q), -1)

    def attended(self, e, k, v, m, rows, grid, linear=F.linear):
        """The block after its attention: e (N, R, D) of the cells `rows` (None: all), k, v (N, H·W, D) -> (N, R, D)."""
        out = self.transformer.layers[0][0].fn.to_out[0]
        (q,) = self.project(e, m, "q", linear)
        seen = self.attend(q.flatten(0, 1), k, v, rows, grid).view_as(e)
        return torch.addcmul(e, m.gate1, linear(seen, out.weight, out.bias))

    def mlp(self, z, m, linear=F.linear):
        """The MLP of the block on what it attended to: (N, R, D) -> (N, R, D)."""
        mlp = self.transformer.layers[0][1]
        return mlp.fn(modulate(mlp.norm(z), m.shift2, m.scale2), linear)

    def update(self, z, mlp, m):
        """Both -> the update of the state, (N, R, S)."""
        z = torch.addcmul(z, m.gate2, mlp)
        normed = F.layer_norm(z, z.shape[-1:], eps=1e-6)
        return self.final_layer.linear(modulate(normed, m.shift3, m.scale3))

    def step_update(self, e, k, v, m, rows, grid, linear=F.linear):
        """All of it: e (N, R, D), k, v (N, H·W, D) -> the update of the state of the cells `rows`, (N, R, S)."""
        z = self.attended(e, k, v, m, rows, grid, linear)
        return self.update(z, self.mlp(z, m, linear), m)
