"""Sampling loops, and the one wrapper that turns a labelled model into what they call.

A loop calls `denoise(x, t, state) -> (out, state)` once per visited step, with the original step t (N,), and
hands the state on. The noise of each step comes from `noise(shape)`, called once per step whether or not the
step uses it, so that the draws do not depend on the sampler. `regrid(x, state, t)`, if given, is called before
each step with its original t (an int) and may move both to another grid (diffusion/multiscale.py).
"""

import numpy as np
import torch

from pipeline.seeds import on_device, per_image


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


@torch.no_grad()
def sample_loop(step, diffusion, denoise, x, noise, on_step=None, regrid=None):
    """Visit all steps from the noisiest to 0, each by `step(p, x, i, noise)`: x_T (N, C, H, W) -> x_0."""
    state = None
    for k in reversed(range(diffusion.num_timesteps)):
        i = torch.full((len(x),), k)  # on the CPU: a GPU works on while the host looks things up
        if regrid:
            x, state = regrid(x, state, int(diffusion.timestep_map[k]))
        out, state = denoise(x, diffusion.original(i, x.device), state)
        p = diffusion.p_mean_variance(out, x, i)
        x = step(p, x, i, noise(x.shape[1:]))
        if on_step:
            on_step(i, p)
    return x


def p_sample_loop(diffusion, denoise, x, noise, eta=0.0, on_step=None, regrid=None):
    """Ancestral sampling (DDPM alg. 2, learned variance): x_T (N, C, H, W) -> x_0. `eta` is DDIM's alone."""
    return sample_loop(lambda p, x, i, noise: p_sample(p, i, noise), diffusion, denoise, x, noise, on_step, regrid)


def p_sample(p, i, noise):
    """Draw x_{i-1} from a Prediction; at i = 0 its mean."""
    return p.mean + unless_last(i, noise) * torch.exp(0.5 * p.log_variance)


def unless_last(i, noise):
    """The noise of a step, which is not added at i = 0."""
    return noise * (i != 0).view(-1, 1, 1, 1).to(noise.device, non_blocking=True)


def ddim_sample_loop(diffusion, denoise, x, noise, eta=0.0, on_step=None, regrid=None):
    """DDIM: deterministic at eta = 0, as noisy as DDPM at eta = 1: x_T (N, C, H, W) -> x_0."""
    return sample_loop(lambda p, x, i, noise: ddim_sample(diffusion, p, x, i, noise, eta), diffusion, denoise, x,
                       noise, on_step, regrid)


def ddim_sample(diffusion, p, x, i, noise, eta=0.0):
    """One DDIM step (Song et al. 2020, eqs. 12 and 16)."""
    here, there = diffusion.alphas_cumprod, diffusion.alphas_cumprod_prev
    sigma = diffusion.at(eta * np.sqrt((1 - there) / (1 - here) * (1 - here / there)), i, x)
    previous = diffusion.at(there, i, x)
    direction = torch.sqrt(1 - previous - sigma**2) * diffusion.predict_eps(x, i, p.pred_xstart)
    return torch.sqrt(previous) * p.pred_xstart + direction + unless_last(i, noise) * sigma


def dpmpp_sample_loop(diffusion, denoise, x, noise, eta=0.0, on_step=None, regrid=None):
    """DPM-Solver++(2M) (Lu et al. 2022, alg. 2): deterministic, of second order: x_T (N, C, H, W) -> x_0."""
    return sample_loop(MultistepSolver(diffusion), diffusion, denoise, x, noise, on_step, regrid)


class MultistepSolver:
    """The step of DPM-Solver++(2M): x_0 is extrapolated from its last two predictions, in λ = log(√ᾱ / √(1 − ᾱ)).

    The first step, the last (where λ is infinite) and one onto another grid are of first order: DDIM's.
    """

    def __init__(self, diffusion):
        self.diffusion = diffusion
        here, there = diffusion.alphas_cumprod, diffusion.alphas_cumprod_prev
        with np.errstate(divide="ignore"):
            self.h = (np.log(there / (1 - there)) - np.log(here / (1 - here))) / 2  # how far each step goes in λ
        self.before = None  # x_0 as predicted at the step before, and how far that step went

    def __call__(self, p, x, i, noise):
        k, xstart = int(i[0]), p.pred_xstart
        estimate = xstart
        if self.before is not None and self.before[0].shape == xstart.shape and np.isfinite(self.h[k]):
            earlier, h = self.before
            estimate = xstart + self.h[k] / (2 * h) * (xstart - earlier)
        self.before = xstart, self.h[k]
        here, there = self.diffusion.alphas_cumprod[k], self.diffusion.alphas_cumprod_prev[k]
        return ((1 - there) / (1 - here)) ** 0.5 * x - there**0.5 * np.expm1(-self.h[k]) * estimate


SAMPLERS = {"ddpm": p_sample_loop, "ddim": ddim_sample_loop, "dpmpp": dpmpp_sample_loop}  # --sampler
