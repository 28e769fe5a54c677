"""Classifier-free guidance and gene heredity: the wrapper that turns a labelled model into what a sampler calls."""

import torch

from core.random import on_device, per_image


class ImageNoise:
    """Standard normal noise of a batch in which every image has its own generator."""

    def __init__(self, generators, device):
        self.generators, self.device = generators, device

    def __call__(self, shape):
        """(C, H, W) -> (N, C, H, W)."""
        return on_device(per_image(torch.randn, tuple(shape), self.generators), self.device)


class GuidedDenoiser:
    """Classifier-free guidance around a labelled model (Ho & Salimans 2022), and gene heredity.

    ε = ε_null + scale·(ε_label − ε_null) on all channels, the variance is that of the labelled half; both halves
    go through the model in one batch and keep separate states. At scale 1 the null half is left out.
    `generators` holds two lists, one generator per image for each half. Every call starts from the state the
    previous one left by the same rule, whatever the scale: hidden channels inherited, output seeded afresh.
    `unguided_state="whole"` is the published rule where there is no guidance: all channels inherited (`forward`,
    geca.py:486-489, fed with its own state by gaussian_diffusion.py:617-618), so that its scale 1 is not the limit
    of scales above 1.

    `interval` (low, high): the original steps t, ends included, at which there is guidance (Kynkäänniemi et al. 2024).
    At others only the labelled half is computed, and the null half keeps the state it has.
    """

    def __init__(self, model, y, scale, generators, unguided_state="hidden", interval=None):
        self.model, self.y, self.scale, self.generators, self.interval = model, y, scale, generators, interval
        self.inherits_whole = scale == 1 and unguided_state == "whole"

    def __call__(self, x, t, state):
        """x (N, C, H, W), t (N,), state of both halves (a pair, each (N, S, H, W) or None) or None -> out, state."""
        n, (state, null_state) = len(x), state or (None, None)
        generators, null_generators = map(list, self.generators)
        if not self.guides(t):
            out, state = self.call(x, t, self.y, [state], generators)
            return out, (state, null_state)
        out, after = self.call(x.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([self.y, torch.zeros_like(self.y)]),
                               [state, null_state], generators + null_generators)
        (eps, variance), (eps_null, _) = (half.chunk(2, dim=1) for half in out.float().chunk(2))
        guided = torch.cat([eps_null + self.scale * (eps - eps_null), variance], 1)
        return guided, (None, None) if after is None else (after[:n], after[n:])

    def guides(self, t):
        """Is there guidance at this step (the same for all images)?"""
        if self.scale == 1 or self.interval is None:
            return self.scale != 1
        return self.interval[0] <= int(t[0]) <= self.interval[1]

    def call(self, x, t, y, states, generators):
        """The model on one half or two; `states` are what each half left."""
        state = self.living_state(x, states, generators) if hasattr(self.model, "inherit") else None
        return self.model(x, t, y, state, generators)

    def living_state(self, x, states, generators):
        """What each half inherits, or a single living cell where it has not lived before."""
        seeds = self.model.draw_seed(len(x), generators)  # whether they are used or not: later draws must not move
        halves = []
        for state, seed in zip(states, on_device(seeds, x.device).chunk(len(states)), strict=True):
            if state is None:
                halves.append(self.model.initial_state(len(seed), *x.shape[2:], seed))
            else:
                halves.append(state if self.inherits_whole else self.model.inherit(state, seed))
        return torch.cat(halves)
