"""Looking into one call of the automaton: its states, which cells can know of which, and its attention.

Everything here is a function of what the call was given (`fire` among it); nothing is drawn and nothing is changed.
"""

import torch
from torch.nn import functional as F

from automaton.attention import neighbours
from automaton.engines import grow
from automaton.rule import HEAD_WIDTH


def states(rule, x, state, c, fire, engine="auto"):
    """The states before, between and after the steps of `grow`, whose arguments these are: (steps + 1, N, S, H, W).

    Every beginning of the call is run with the engine itself, so that the last state is, bit for bit, what the call
    returned; it costs half as many calls as there are steps.
    """
    return torch.stack([state, *(grow(rule, x, state, c, fire[:k + 1], engine) for k in range(len(fire)))])


def attention_weights(rule, x, state, c, cell):
    """How much the cell (row, column) attends to its neighbourhood, by image and head: (N, heads, 3, 3).

    x (N, C, H, W), state (N, S, H, W), c (N, D). A place outside the grid takes its share too (automaton/attention.py):
    the nine weights always sum to 1.
    """
    n, _, height, width = x.shape
    cells = rule.base(x), state.flatten(2).transpose(1, 2), rule.modulation(c)
    k, (_, q) = rule.cache(*cells).k, rule.query(*cells)  # (N, L, D) each
    rows = torch.arange(n, device=x.device) * height * width + cell[0] * width + cell[1]  # (N,)
    index, inside = neighbours(rows, height, width)  # (N, 9) each
    q = q.flatten(0, 1)[rows].float().view(n, rule.heads, 1, HEAD_WIDTH)
    k = k.flatten(0, 1)[index].float() * inside[..., None]  # (N, 9, D): a key of 0 outside
    k = k.view(n, 9, rule.heads, HEAD_WIDTH).permute(0, 2, 3, 1)  # (N, heads, d, 9)
    return (q @ k / HEAD_WIDTH**0.5).softmax(-1).view(n, rule.heads, 3, 3)


def reached(fire, grid, cell):
    """Which cells can have been influenced by the state that `cell` began with: (steps + 1, H, W) bool.

    fire (steps, H·W) bool of one image. A cell learns something only when it fires, and then of its 3 x 3
    neighbourhood: the region grows by at most one cell per step, the automaton's speed of light.
    """
    regions = [_only(cell, grid)]
    for fires in fire.view(-1, *grid):
        regions.append(regions[-1] | fires & _widened(regions[-1]))
    return torch.stack(regions)


def sources(fire, grid, cell):
    """Which cells' states the end state of `cell` can depend on, before and after each step: (steps + 1, H, W) bool.

    The same light cone seen from its tip: the last region is the cell alone, the first the widest.
    """
    regions = [_only(cell, grid)]
    for fires in fire.view(-1, *grid).flip(0):
        regions.append(regions[-1] | _widened(regions[-1] & fires))
    return torch.stack(regions[::-1])


def _only(cell, grid):
    region = torch.zeros(grid, dtype=torch.bool)
    region[tuple(cell)] = True
    return region


def _widened(region):
    """(H, W) bool and the eight neighbours of every cell of it."""
    return F.max_pool2d(region[None].float(), 3, stride=1, padding=1)[0].bool()
