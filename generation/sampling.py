"""From a model and labels to images.

Image number k is a function of (weights, options, labels, k): every draw comes from generators keyed by its number,
so it is the same on any number of processes and at any batch size.
"""

from dataclasses import dataclass
from functools import partial

import torch

from core.random import generator, per_image
from core.runtime import autocast
from diffusion import create_diffusion, multiscale, samplers
from generation.guidance import GuidedDenoiser, ImageNoise
from presets import PAPER_SAMPLING


@dataclass(frozen=True)
class SamplingOptions:
    """How to sample; the defaults are those of the paper's Table 1."""

    steps: int = PAPER_SAMPLING["num_sampling_steps"]
    sampler: str = PAPER_SAMPLING["sampler"]  # one of diffusion/samplers.py
    eta: float = 0.0  # noise of ddim: none at 0, that of ddpm at 1
    cfg_scale: float = PAPER_SAMPLING["cfg_scale"]  # guidance; 1 is none
    cfg_interval: tuple | None = None  # diffusion steps between which there is guidance; None: all
    heredity: str = "published"  # see generation/guidance.py
    shared_fire: bool = False  # the same cells are seeded and fire in the conditional and the unconditional copy
    multi_scale: bool = False  # noisy steps on coarser grids, for a model that was trained so
    seed: int = 0
    precision: str = "fp32"  # of the denoiser; the diffusion and the decoder compute in float32
    batch_size: int = 32


@torch.no_grad()
def sample_latents(model, labels, ids, cells, options, device, on_step=None):
    """Guided sampling: labels (N, K), ids = the N image numbers -> latents (N, C, cells, cells)."""
    diffusion = create_diffusion(str(options.steps))
    noise = [generator(options.seed, "noise", i) for i in ids]
    unconditional = "cells" if options.shared_fire else "null cells"
    life = [[generator(options.seed, purpose, i) for i in ids] for purpose in ("cells", unconditional)]
    denoise = GuidedDenoiser(model, labels.to(device), options.cfg_scale, life, options.heredity, options.cfg_interval)
    side, regrid = cells, None
    if options.multi_scale:
        side = cells // multiscale.reduction(int(diffusion.timestep_map[-1]))
        regrid = partial(multiscale.enlarge, side=cells)
    x = per_image(torch.randn, (model.in_channels, side, side), noise).to(device)
    more = {"eta": options.eta} if options.sampler == "ddim" else {}
    return samplers.SAMPLERS[options.sampler](diffusion, denoise, x, ImageNoise(noise, device), on_step, regrid, **more)


def sample_images(model, codec, labels, ids, cells, options, device, progress=None):
    """Yield (ids, uint8 images (n, H, W, 3)) batch by batch; `progress`, a tqdm bar, counts images times steps."""
    on_step = None if progress is None else lambda i, prediction: progress.update(len(i))
    for start in range(0, len(ids), options.batch_size):
        part = slice(start, start + options.batch_size)
        with autocast(options.precision, device):
            latents = sample_latents(model, labels[part], ids[part], cells, options, device, on_step)
        yield ids[part], codec.decode(latents).cpu().numpy()
