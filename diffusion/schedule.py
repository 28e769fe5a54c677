"""The noise schedule: betas, and the choice of steps that sampling visits (Nichol & Dhariwal 2021, Sec. 4)."""

import numpy as np


def linear_betas(steps):
    """Betas growing linearly from 1e-4 to 0.02 at 1000 steps (Ho et al. 2020), scaled for other lengths: float64."""
    scale = 1000 / steps
    return np.linspace(scale * 1e-4, scale * 0.02, steps)


def space_timesteps(steps, respacing):
    """Which of `steps` steps to keep: a sorted list of integers.

    "250": so many, evenly spaced from the first to the last and rounded. "ddim50": so many, by a fixed integer
    stride from 0 (Song et al. 2020). "100,100,50": the range is cut into equal sections with so many steps each.
    """
    if respacing.startswith("ddim"):
        wanted = int(respacing[len("ddim"):])
        for stride in range(1, steps + 1):
            if len(range(0, steps, stride)) == wanted:
                return list(range(0, steps, stride))
        raise ValueError(f"{respacing}: no integer stride gives {wanted} of {steps} steps")
    counts = [int(count) for count in respacing.split(",")]
    kept, start = [], 0
    for i, count in enumerate(counts):
        size = steps // len(counts) + (i < steps % len(counts))
        if not 1 <= count <= size:
            raise ValueError(f"{respacing}: found {count} steps for a section of {size}, expected 1 to {size}")
        stride = (size - 1) / (count - 1) if count > 1 else 1
        kept += [start + round(stride * k) for k in range(count)]
        start += size
    return kept


def respace(betas, kept):
    """Betas of the process that visits only the steps `kept` and has the same noise level at each of them."""
    alphas_cumprod = np.cumprod(1 - betas)[kept]
    previous = np.append(1.0, alphas_cumprod[:-1])
    return 1 - alphas_cumprod / previous
