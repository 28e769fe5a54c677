"""The local rule of GeCA and the two engines that apply it for a number of steps.

One cell per latent pixel; a cell holds [input | output | hidden] channels. The input is x_t and never moves; output
and hidden together are the living *state*. One step (paper Sec. 2; published geca.py `f`):

    e = embedding of the cell + position code                      every cell
    z = e + gate1 · attention(modulated norm of e)                 3x3 neighbourhood
    z = z + gate2 · MLP(modulated norm of z)
    state += fire · linear(modulated norm of z)                    each cell fires with probability 1/2

`dense` computes every cell of every step: the readable reference. `asynchronous` gives the same result for half the
arithmetic: a cell that does not fire needs no query, MLP or update, and a cell that did not fire in the previous step
has the embedding, key and value it had before, since neither its state nor the condition has changed.
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

    def forward(self, x):
        return self.net(x)


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
    """The weights of one step, under their published names, and the engines."""

    def __init__(self, in_channels, state_channels, width, mlp_width):
        super().__init__()
        self.in_channels, self.heads = in_channels, width // HEAD_WIDTH
        self.cell_to_embedding = nn.Linear(in_channels + state_channels, width)
        self.transformer = Transformer(width, mlp_width)
        self.final_layer = FinalLayer(width, state_channels)
        self.engine = "asynchronous"

    def grow(self, x, state, c, fire):
        """Apply the rule len(fire) times.

        x (N, C, H, W) input, state (N, S, H, W), c (N, D) condition, fire (steps, N, H·W) bool on any device: which
        cells fire -> state (N, S, H, W).
        """
        n, s, h, w = state.shape
        rows = state.flatten(2).transpose(1, 2)  # (N, L, S)
        base = F.linear(x.flatten(2).transpose(1, 2), self.cell_to_embedding.weight[:, : self.in_channels],
                        self.cell_to_embedding.bias)  # the input's share of the embedding: the same at all steps
        base = base + position_code(h * w, base.shape[-1], base.device)  # (N, L, D)
        signals = torch.cat([self.transformer.adaLN_modulation(c), self.final_layer.adaLN_modulation(c)], -1)
        m = Modulation(*signals[:, None].chunk(8, dim=-1))
        engine = {"dense": self._dense, "asynchronous": self._asynchronous}[self.engine]
        rows = engine(base, rows, m, fire, (h, w))
        return rows.transpose(1, 2).reshape(n, s, h, w)

    # The parts of one step. `rows` may be any selection of an image's cells.

    def _embed(self, base, rows):
        return base + F.linear(rows, self.cell_to_embedding.weight[:, self.in_channels:])

    def _project(self, e, m, which):
        """Embeddings (N, R, D) -> the queries, keys or values named by the slice `which` of (q, k, v)."""
        attention = self.transformer.layers[0][0]
        z = modulate(attention.norm(e), m.shift1, m.scale1)
        width = e.shape[-1]
        return F.linear(z, attention.fn.to_qkv.weight[which.start * width: which.stop * width]).split(width, -1)

    def _attend(self, q, k, v, grid):
        """q, k, v (N, H·W, D) -> (N, H·W, D)."""
        q, k, v = (t.unflatten(1, grid).unflatten(-1, (self.heads, HEAD_WIDTH)) for t in (q, k, v))
        return neighbourhood_attention(q, k, v).flatten(-2).flatten(1, 2)

    def _update(self, e, attended, m):
        """Embeddings and what they attended to -> the update of the state, (N, R, S)."""
        attention, mlp = self.transformer.layers[0]
        z = torch.addcmul(e, m.gate1, attention.fn.to_out(attended))
        z = torch.addcmul(z, m.gate2, mlp.fn(modulate(mlp.norm(z), m.shift2, m.scale2)))
        normed = F.layer_norm(z, z.shape[-1:], eps=1e-6)
        return self.final_layer.linear(modulate(normed, m.shift3, m.scale3))

    # The engines: base (N, L, D), rows (N, L, S), fire (steps, N, L) -> rows (N, L, S).

    def _dense(self, base, rows, m, fire, grid):
        for fires in fire.to(rows.device):
            e = self._embed(base, rows)
            q, k, v = self._project(e, m, slice(0, 3))
            update = self._update(e, self._attend(q, k, v, grid), m)
            rows = rows + fires[..., None] * update
        return rows

    def _asynchronous(self, base, rows, m, fire, grid):
        n, cells, width = base.shape
        put = torch.Tensor.index_copy if torch.is_grad_enabled() else torch.Tensor.index_copy_
        flat = rows.reshape(n * cells, -1)
        base_flat = base.reshape(n * cells, width)
        e = k = v = moved = None
        for index, fires in firing_rows(fire, base.device):
            if e is None:  # the first step: every cell is new
                e = self._embed(base, rows)
                k, v = (t.reshape(n * cells, width) for t in self._project(e, m, slice(1, 3)))
                e = e.reshape(n * cells, width)
            elif moved is not None:
                e_moved = self._embed(base_flat[moved].view(n, -1, width), flat[moved].view(n, -1, flat.shape[1]))
                k_moved, v_moved = self._project(e_moved, m, slice(1, 3))
                e = put(e, 0, moved, e_moved.flatten(0, 1))
                k, v = put(k, 0, moved, k_moved.flatten(0, 1)), put(v, 0, moved, v_moved.flatten(0, 1))
            moved = index
            if index is None:  # nobody fires
                continue
            e_firing = e[index].view(n, -1, width)
            (q_firing,) = self._project(e_firing, m, slice(0, 1))
            q = torch.zeros_like(k).index_copy(0, index, q_firing.flatten(0, 1))
            attended = self._attend(*(t.view(n, cells, width) for t in (q, k, v)), grid).reshape(n * cells, width)
            update = self._update(e_firing, attended[index].view(n, -1, width), m)
            moving = flat[index] + (fires * update).flatten(0, 1)
            flat = flat.index_copy(0, index, moving.to(flat.dtype))
        return flat.view(n, cells, -1)


def firing_rows(fire, device):
    """fire (steps, N, L) bool -> for each step (index (N·R,), fires (N, R, 1)), or (None, None) where nobody fires.

    R is the largest number of firing cells of any image at that step. `index` counts the cells of the whole batch;
    an image with fewer firing cells is filled up with cells that do not fire, where `fires` is 0. So every image
    has the same number of rows, and what is per image (the modulation) needs no copies.
    """
    fire = fire.cpu()  # the sizes must be known on the host
    first_cell = torch.arange(fire.shape[1])[:, None] * fire.shape[2]
    for fires in fire:
        most = int(fires.sum(1).max()) if fires.numel() else 0
        if most == 0:
            yield None, None
            continue
        chosen = fires.byte().argsort(dim=1, descending=True, stable=True)[:, :most]  # (N, R), firing cells first
        index = (chosen + first_cell).flatten()
        yield index.to(device), fires.gather(1, chosen)[..., None].to(device)
