"""Classifier-free guidance and gene heredity: the wrapper that turns a labelled model into what a sampler calls.

Gene heredity (paper Sec. 2): between denoising steps the automaton's living state is inherited. `--heredity` says how:

    published   the hidden channels are inherited at every step, the output channels grow anew from one seed cell
    none        every step starts from a single living cell, as a training step without heredity does
    below:T     published at steps t < T, none above: where the image is mostly noise, nothing is worth inheriting
    whole       published where there is guidance; without guidance (scale 1) all channels are inherited. This is what
                the published unguided path does (`forward`, geca.py:486-489, fed with its own state by
                gaussian_diffusion.py:617-618), so that its scale 1 is not the limit of scales above 1
"""

import torch

from core.errors import UserError
from core.random import on_device, per_image

HEREDITY = ("published", "none", "whole")  # and below:T
# What older settings call it; where it was left open (None), validation samples were not part of what is trained.
RENAMED = {"unguided_state": ("heredity", {"hidden": "published", "whole": "whole"}),
           "heredity": ("heredity", {None: "published"})}


def inherits(heredity, t):
    """Does the denoising step t (an int) take over what the previous one left?"""
    if heredity.startswith("below:"):
        return t < int(heredity.removeprefix("below:"))
    return heredity != "none"


def next_state(model, state, seed_noise, grid):
    """The state that a call of an automaton starts from: inherited from `state`, or of one living cell if it is None.

    state (n, S, h, w) or None, seed_noise (n, 2C), grid (h, w) -> (n, S, h, w). Sampling uses it between denoising
    steps, training (`--train-heredity`) between the two passes of one step.
    """
    if state is None:
        return model.initial_state(len(seed_noise), *grid, seed_noise)
    return model.inherit(state, seed_noise)


def guided(out, scale):
    """What the conditional and, after them, the unconditional copies say, out (2N, 2C, H, W) -> (N, 2C, H, W)."""
    (eps, variance), (eps_null, _) = (part.chunk(2, dim=1) for part in out.float().chunk(2))
    return torch.cat([eps_null + scale * (eps - eps_null), variance], 1)


class ImageNoise:
    """Standard normal noise of a batch in which every image has its own generator."""

    def __init__(self, generators, device):
        self.generators, self.device = generators, device

    def __call__(self, shape):
        """(C, H, W) -> (N, C, H, W)."""
        return on_device(per_image(torch.randn, tuple(shape), self.generators), self.device)


class GuidedDenoiser:
    """Classifier-free guidance around a labelled model (Ho & Salimans 2022), and gene heredity.

    ε = ε_null + scale · (ε_cond − ε_null) on all channels; the variance is the conditional one. The conditional and
    the unconditional copy of an image go through the model in one batch and keep separate states. At scale 1 the
    unconditional copy is left out.

    `generators` holds two lists, one generator per image for the conditional and one for the unconditional copy: they
    decide seed cells and which cells fire. `heredity`: see the head of this file.
    `interval` (low, high): the original steps t, ends included, at which there is guidance (Kynkäänniemi et al. 2024).
    At others only the conditional copy is computed, and the unconditional one keeps the state it has.
    """

    def __init__(self, model, y, scale, generators, heredity="published", interval=None):
        self.model, self.y, self.scale, self.generators = model, y, scale, generators
        self.heredity, self.interval = heredity, interval

    def __call__(self, x, t, state):
        """x (N, C, H, W), t (N,) on the CPU, the same for all, state: a pair (conditional, unconditional), each
        (N, S, H, W) or None, or None at the first step -> out (N, 2C, H, W), such a pair."""
        n, step, (cond, null) = len(x), int(t[0]), state or (None, None)
        t, (generators, null_generators) = on_device(t, x.device), map(list, self.generators)
        if not self.guides(step):
            out, cond = self.call(x, step, t, self.y, [cond], generators)
            return out, (cond, null)
        y = torch.cat([self.y, torch.zeros_like(self.y)])  # (2N, K): the null label is all zeros
        out, after = self.call(x.repeat(2, 1, 1, 1), step, t.repeat(2), y, [cond, null],
                               generators + null_generators)
        return guided(out, self.scale), (None, None) if after is None else (after[:n], after[n:])

    def guides(self, t):
        """Is there guidance at the original step t?"""
        if self.scale == 1 or self.interval is None:
            return self.scale != 1
        return self.interval[0] <= t <= self.interval[1]

    def call(self, x, step, t, y, states, generators):
        """The model on one or both copies of the images; `states` are what the previous call left of each copy."""
        state = self.living_state(x, step, states, generators) if hasattr(self.model, "inherit") else None
        return self.model(x, t, y, state, generators)

    def living_state(self, x, t, states, generators):
        """What each copy starts from, by `heredity`: (copies · n, S, h, w)."""
        seeds = self.model.draw_seed(len(x), generators)  # whether they are used or not: later draws must not move
        copies = []
        for state, seed in zip(states, on_device(seeds, x.device).chunk(len(states)), strict=True):
            if self.heredity == "whole" and self.scale == 1 and state is not None:
                copies.append(state)
            else:
                inherited = state if inherits(self.heredity, t) else None
                copies.append(next_state(self.model, inherited, seed, x.shape[2:]))
        return torch.cat(copies)


def parse_heredity(text):
    """A value of `--heredity`, checked. Raises UserError."""
    name, colon, step = text.partition(":")
    if text not in HEREDITY and not (name == "below" and step.isdecimal() and int(step) <= 1000):
        raise UserError(f"--heredity {text}: expected {', '.join(HEREDITY)} or below:T with a diffusion step T of at "
                        "most 1000")
    return f"below:{int(step)}" if colon else text
