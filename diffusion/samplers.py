"""Sampling loops, and the one wrapper that turns a labelled model into what they call.

A loop calls `denoise(x, t, state) -> (out, state)` once per visited step, with the original step t (N,), and
hands the state on. The noise of each step comes from `noise(shape)`, called once per step whether or not the
step uses it, so that the draws do not depend on the sampler. `regrid(x, state, t)`, if given, is called before
each step with its original t (an int) and may move both to another grid (diffusion/multiscale.py).
"""

import numpy as np
import torch


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
