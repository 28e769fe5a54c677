"""Damage to an image on its way: at one diffusion step, cells lose what they were, and sampling goes on.

A damaged cell's x_t is replaced by fresh noise of variance 1, which says nothing of the image, and its living state, if
the model has one, by a dead one (all channels 0). The noise and the places depend on the seed, the image's number and
the kind of damage alone: different models of one autoencoder are damaged alike.
"""

import torch

from core.random import generator, on_device, per_image

KINDS = ("hole", "half", "random")


def damaged_cells(kind, grid, seed):
    """Which cells are damaged, the same in every image: (H, W) bool.

    hole: a square of half the height and half the width in the middle; half: the right half; random: half of all cells.
    """
    height, width = grid
    mask = torch.zeros(grid, dtype=torch.bool)
    if kind == "hole":
        mask[height // 4: height - height // 4, width // 4: width - width // 4] = True
    elif kind == "half":
        mask[:, width // 2:] = True
    else:
        chosen = torch.randperm(height * width, generator=generator(seed, "damaged cells"))[: height * width // 2]
        mask.view(-1)[chosen] = True
    return mask


class Damage:
    """The `before_step` of generation/sampling.py that damages the cells `mask` (H, W) once: at the first visited step
    that is not above the original step `at`. `at_step` is that step; None before it has happened.

    For one batch: `ids` are its image numbers, as given to the sampler.
    """

    def __init__(self, mask, at, seed, ids):
        self.mask, self.at, self.at_step = mask, at, None
        self.noise = [generator(seed, "damage", i) for i in ids]

    def __call__(self, x, state, t):
        """x (N, C, H, W), state: a pair of (N, S, H, W) or None, or None -> both, damaged if it is time."""
        if self.at_step is not None or t > self.at:
            return x, state
        self.at_step = t
        mask = self.mask.to(x.device)
        noise = on_device(per_image(torch.randn, tuple(x.shape[1:]), self.noise), x.device)
        dead = state and tuple(None if half is None else half.masked_fill(mask, 0) for half in state)
        return torch.where(mask, noise, x), dead
