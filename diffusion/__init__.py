"""Gaussian diffusion with a linear schedule, ε-prediction and learned-range variance."""

from diffusion.gaussian import GaussianDiffusion
from diffusion.schedule import linear_betas, respace, space_timesteps

__all__ = ["GaussianDiffusion", "create_diffusion"]


def create_diffusion(timestep_respacing="", diffusion_steps=1000):
    """The process of the paper: `diffusion_steps` linear betas, of which sampling may visit only some.

    `timestep_respacing`: "" for all steps, "250" evenly spaced, "ddim50" fixed stride, "100,100,50" by section.
    Raises ValueError where the schedule has no such steps.
    """
    betas = linear_betas(diffusion_steps)
    steps = space_timesteps(diffusion_steps, str(timestep_respacing or diffusion_steps))
    return GaussianDiffusion(respace(betas, steps), steps)
