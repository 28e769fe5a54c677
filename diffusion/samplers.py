"""Sampling loops, and the one wrapper that turns a labelled model into what they call.

A loop calls `denoise(x, t, state) -> (out, state)` once per visited step, with the original step t (N,), and
hands the state on. The noise of each step comes from `noise(shape)`, called once per step whether or not the
step uses it, so that the draws do not depend on the sampler. `regrid(x, state, t)`, if given, is called before
each step with its original t (an int) and may move both to another grid (diffusion/multiscale.py).
"""

import numpy as np
import torch

from pipeline.seeds import per_image


class ImageNoise:
    """Standard normal noise of a batch in which every image has its own generator."""

    def __init__(self, generators, device):
        self.generators, self.device = generators, device

    def __call__(self, shape):
        """(C, H, W) -> (N, C, H, W)."""
        return per_image(torch.randn, tuple(shape), self.generators).to(self.device, non_blocking=True)


class GuidedDenoiser:
    """Classifier-free guidance around a labelled model (Ho & Salimans 2022), and gene heredity.

    ε = ε_null + scale·(ε_label − ε_null) on all channels, the variance is that of the labelled half; both halves
    go through the model in one batch and keep separate states. At scale 1 the null half is left out.
    `generators` holds two lists, one generator per image for each half. Every call starts from the state the
    previous one left by the same rule, whatever the scale: hidden channels inherited, output seeded afresh.
    `unguided_state="whole"` is the published rule where there is no guidance: all channels inherited (`forward`,
    geca.py:486-489, fed with its own state by gaussian_diffusion.py:617-618), so that its scale 1 is not the limit
    of scales above 1.
    """

    def __init__(self, model, y, scale, generators, unguided_state="hidden"):
        self.model, self.scale = model, scale
        self.inherits_whole = scale == 1 and unguided_state == "whole"
        if scale == 1:
            self.y, self.generators = y, list(generators[0])
        else:
            self.y, self.generators = torch.cat([y, torch.zeros_like(y)]), [*generators[0], *generators[1]]

    def __call__(self, x, t, state):
        """x (N, C, H, W), t (N,), state (N or 2N, S, H, W) or None -> out (N, 2C, H, W), state."""
        repeats = len(self.y) // len(x)
        x, t = x.repeat(repeats, 1, 1, 1), t.repeat(repeats)
        if hasattr(self.model, "inherit"):
            state = self._living_state(x, state)
        out, state = self.model(x, t, self.y, state, self.generators)
        if repeats == 1:
            return out, state
        (eps, variance), (eps_null, _) = (half.chunk(2, dim=1) for half in out.chunk(2))
        return torch.cat([eps_null + self.scale * (eps - eps_null), variance], 1), state

    def _living_state(self, x, state):
        seed = self.model.draw_seed(len(x), self.generators)  # whether it is used or not: later draws must not move
        seed = seed.to(x.device, non_blocking=True)
        if state is None:
            return self.model.initial_state(*x.shape[:1], *x.shape[2:], seed)
        return state if self.inherits_whole else self.model.inherit(state, seed)


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


def p_sample_loop(diffusion, denoise, x, noise, on_step=None, regrid=None):
    """Ancestral sampling (DDPM alg. 2 with the learned variance): x_T (N, C, H, W) -> x_0."""
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
