"""`--multi_scale`: noisy steps on coarse grids, as published: a quarter of the side for t in (666, 999], half for
(333, 666], the whole for [0, 333]. A cell's neighbourhood is then wide while the large shapes are decided."""

from torch.nn import functional as F


def reduction(t):
    """By how much the grid's side is divided at the original step t."""
    return 4 if t > 666 else 2 if t > 333 else 1


def shrink(x, t):
    """A clean latent (C, H, W) on the grid of step t."""
    factor = reduction(t)
    return x if factor == 1 else F.avg_pool2d(x, factor)


def enlarge(x, states, t, side):
    """x (N, C, h, w) and states upsampled bilinearly to the grid of step t; `side` at t = 0.

    states: None, or those of the conditional and the unconditional copy, each (N, S, h, w) or None.
    """
    wanted = side // reduction(t)
    if x.shape[-1] == wanted:
        return x, states

    def upsample(cells):
        return F.interpolate(cells, size=(wanted, wanted), mode="bilinear", align_corners=False)

    return upsample(x), states and tuple(None if state is None else upsample(state) for state in states)
