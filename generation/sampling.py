"""From a model and labels to images.

Image number k is a function of (weights, options, labels, k): every draw comes from generators keyed by its number,
so it is the same on any number of processes and at any batch size.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch

from automaton.graphs import recorded
from core.errors import UserError
from core.random import generator, per_image
from core.runtime import PRECISIONS, autocast
from diffusion import create_diffusion, multiscale, samplers
from generation.guidance import GuidedDenoiser, ImageNoise, parse_heredity
from presets import PAPER_SAMPLING


@dataclass(frozen=True)
class SamplingOptions:
    """How to sample; the defaults are those of the paper's Table 1.

    Raises UserError for values that mean nothing, or contradict each other.
    """

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

    def __post_init__(self):
        for name, allowed in (("sampler", samplers.SAMPLERS), ("precision", PRECISIONS)):
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} {getattr(self, name)}: expected one of {', '.join(allowed)}")
        for name, low, high in (("steps", 1, 1000), ("batch_size", 1, math.inf), ("cfg_scale", 0, math.inf),
                                ("eta", 0, 1)):
            if not low <= getattr(self, name) <= high:
                raise UserError(f"{name} {getattr(self, name)}: expected a number from {low} to {high}")
        parse_heredity(self.heredity)
        if self.eta and self.sampler != "ddim":
            raise UserError(f"--eta {self.eta}: belongs to --sampler ddim, found {self.sampler}; leave it out")
        if self.cfg_interval and (self.cfg_scale == 1 or self.cfg_interval[0] > self.cfg_interval[1]):
            given = f"--cfg-interval {self.cfg_interval[0]} {self.cfg_interval[1]}"
            why = "needs --cfg-scale other than 1" if self.cfg_scale == 1 else "expected LOW not above HIGH"
            raise UserError(f"{given}: {why}")


@torch.no_grad()
def sample_latents(model, labels, ids, cells, options, device, on_step=None, before_step=None):
    """Guided sampling: labels (N, K), ids = the N image numbers -> latents (N, C, cells, cells).

    `cells`: the side of the grid, or (rows, columns) for a model that works on any grid. `on_step(i, prediction)` sees
    every step; `before_step(x, state, t)` -> x, state may interfere (generation/damage.py), on one grid only.
    """
    diffusion = create_diffusion(str(options.steps))
    noise = [generator(options.seed, "noise", i) for i in ids]
    unconditional = "cells" if options.shared_fire else "null cells"
    life = [[generator(options.seed, purpose, i) for i in ids] for purpose in ("cells", unconditional)]
    denoise = GuidedDenoiser(model, labels.to(device), options.cfg_scale, life, options.heredity, options.cfg_interval)
    grid, regrid = (cells, cells) if isinstance(cells, int) else cells, before_step
    if options.multi_scale:
        grid = [cells // multiscale.reduction(int(diffusion.timestep_map[-1]))] * 2
        regrid = partial(multiscale.enlarge, side=cells)
    x = per_image(torch.randn, (model.in_channels, *grid), noise).to(device)
    more = {"eta": options.eta} if options.sampler == "ddim" else {}
    return samplers.SAMPLERS[options.sampler](diffusion, denoise, x, ImageNoise(noise, device), on_step, regrid, **more)


def sample_images(model, codec, labels, ids, cells, options, device, progress=None, on_step=None, before_step=None):
    """Yield (ids, uint8 images (n, H, W, 3)) batch by batch; `progress`, a tqdm bar, counts images times steps.

    `on_step` and `before_step` as in `sample_latents`.
    """
    def after(i, prediction):
        if progress is not None:
            progress.update(len(i))
        if on_step is not None:
            on_step(i, prediction)

    for start in range(0, len(ids), options.batch_size):
        part = slice(start, start + options.batch_size)
        with autocast(options.precision, device), recorded(device):
            latents = sample_latents(model, labels[part], ids[part], cells, options, device, after, before_step)
        if not latents.isfinite().all():
            raise UserError("the samples are not finite: nothing is written; try another --precision or checkpoint")
        yield ids[part], codec.decode(latents).cpu().numpy()
