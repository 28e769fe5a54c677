"""Samplers: from noise x_T to a sample x_0. Each is one loop, and all are called alike.

    x_0 = ddim_sample_loop(diffusion, denoise, x_T, noise)

`denoise(x, t, state) -> (out, state)` is called once per visited step with the original step t (N,), on the CPU; what
it returns as its state it is given at the next step (None at the first). `noise(shape)` gives the noise of one step,
and is called once per step whether or not the sampler adds any: the draws that follow do not depend on the sampler.
`regrid(x, state, t)`, if given, is called before each step with its original t (an int) and may move both to another
grid (diffusion/multiscale.py). `on_step(i, prediction)`, if given, is called after each step.
"""

import numpy as np
import torch


def predict(diffusion, denoise, x, state, k, regrid=None):
    """What the model makes of x at the k-th visited step -> x on the grid of that step, state, index (N,), Prediction.

    The index stays on the CPU, where the tables are: a GPU goes on working while the host looks things up.
    """
    if regrid:
        x, state = regrid(x, state, int(diffusion.timestep_map[k]))
    i = torch.full((len(x),), k)  # (N,)
    out, state = denoise(x, diffusion.original(i), state)  # (N, 2C, H, W)
    return x, state, i, diffusion.p_mean_variance(out, x, i)


@torch.no_grad()
def p_sample_loop(diffusion, denoise, x, noise, on_step=None, regrid=None):
    """Ancestral sampling with the learned variance (DDPM, Ho et al. 2020, alg. 2): x_T (N, C, H, W) -> x_0."""
    state = None
    for k in reversed(range(diffusion.num_timesteps)):
        x, state, i, p = predict(diffusion, denoise, x, state, k, regrid)
        x = p_sample(p, i, noise(x.shape[1:]))
        if on_step:
            on_step(i, p)
    return x


def p_sample(p, i, noise):
    """Draw x_{i-1} ~ N(mean, variance) of a Prediction; at i = 0 its mean."""
    return p.mean + unless_last(i, noise) * torch.exp(0.5 * p.log_variance)


def unless_last(i, noise):
    """The noise of a step, which is not added at i = 0."""
    return noise * (i != 0).view(-1, 1, 1, 1).to(noise.device, non_blocking=True)


@torch.no_grad()
def ddim_sample_loop(diffusion, denoise, x, noise, on_step=None, regrid=None, eta=0.0):
    """DDIM (Song et al. 2020): deterministic at eta = 0, as noisy as DDPM at eta = 1: x_T (N, C, H, W) -> x_0."""
    state = None
    for k in reversed(range(diffusion.num_timesteps)):
        x, state, i, p = predict(diffusion, denoise, x, state, k, regrid)
        x = ddim_sample(diffusion, p, x, i, noise(x.shape[1:]), eta)
        if on_step:
            on_step(i, p)
    return x


def ddim_sample(diffusion, p, x, i, noise, eta=0.0):
    """One DDIM step (Song et al. 2020, eqs. 12 and 16): √ᾱ' x_0 + √(1 − ᾱ' − σ²) ε + σ noise, ᾱ' of the next level."""
    here, there = diffusion.alphas_cumprod, diffusion.alphas_cumprod_prev
    sigma = diffusion.at(eta * np.sqrt((1 - there) / (1 - here) * (1 - here / there)), i, x)
    previous = diffusion.at(there, i, x)
    direction = torch.sqrt(1 - previous - sigma**2) * diffusion.predict_eps(x, i, p.pred_xstart)
    return torch.sqrt(previous) * p.pred_xstart + direction + unless_last(i, noise) * sigma


@torch.no_grad()
def dpmpp_sample_loop(diffusion, denoise, x, noise, on_step=None, regrid=None):
    """DPM-Solver++(2M) (Lu et al. 2022, alg. 2): deterministic, of second order: x_T (N, C, H, W) -> x_0.

    x_0 is extrapolated linearly from its last two predictions, in λ = log(√ᾱ / √(1 − ᾱ)). The first step, the last
    (where λ is infinite) and one onto another grid are of first order: DDIM's.
    """
    here, there = diffusion.alphas_cumprod, diffusion.alphas_cumprod_prev
    with np.errstate(divide="ignore"):
        h = (np.log(there / (1 - there)) - np.log(here / (1 - here))) / 2  # how far each step goes in λ
    state, earlier = None, None
    for k in reversed(range(diffusion.num_timesteps)):
        x, state, i, p = predict(diffusion, denoise, x, state, k, regrid)
        noise(x.shape[1:])  # drawn for the sake of the draws that follow
        xstart = p.pred_xstart
        if earlier is not None and earlier.shape == xstart.shape and np.isfinite(h[k]):
            xstart = xstart + h[k] / (2 * h[k + 1]) * (xstart - earlier)
        earlier = p.pred_xstart
        x = ((1 - there[k]) / (1 - here[k])) ** 0.5 * x - there[k] ** 0.5 * np.expm1(-h[k]) * xstart
        if on_step:
            on_step(i, p)
    return x


SAMPLERS = {"ddpm": p_sample_loop, "ddim": ddim_sample_loop, "dpmpp": dpmpp_sample_loop}  # --sampler
