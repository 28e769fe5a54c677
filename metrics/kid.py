"""KID, the kernel distance between two sets of images, on arrays of features (from evaluation/features.py).

Binkowski, Sutherland, Arbel & Gretton, "Demystifying MMD GANs", ICLR 2018, Sec. 4. The paper's Table 1 gives
it in units of 1e-3, over 100 subsets of ⌊n_generated / 4⌋ images.
"""

import numpy as np
import torch

from core.errors import UserError
from core.random import generator
from metrics.blocks import tiles

SUBSETS = 100  # as in the paper


def polynomial_kernel(x, y):
    """k(x, y) = (x·y / d + 1)³ for all pairs: (m, d), (n, d) -> (m, n)."""
    base = x @ y.T / x.shape[1] + 1
    return base * base * base  # NumPy's power takes ten times as long


def polynomial_mmd(x, y):
    """Unbiased estimate of the squared maximum mean discrepancy of two samples: (m, d), (n, d) -> a number.

    mean over i ≠ j of k(x_i, x_j)  +  mean over i ≠ j of k(y_i, y_j)  −  2 · mean over i, j of k(x_i, y_j).
    Its expectation is 0 for two samples of one distribution, so single values may be negative.
    """
    x, y = np.asarray(x), np.asarray(y)
    return float(mmd_of_subsets(x, y, np.ones((1, len(x)), bool), np.ones((1, len(y)), bool))[0])


def mmd_of_subsets(x, y, in_x, in_y):
    """The same for B pairs of subsets in one pass over the kernel: (m, d), (n, d), bool (B, m), (B, n) -> (B,).

    in_x[b, i]: is x_i in the b-th subset? No matrix larger than a block of tiles() is held.
    """
    m, n = in_x.sum(1), in_y.sum(1)
    across = sum(_sums(k, in_x[:, rows], in_y[:, columns]) for rows, columns, k in tiles(polynomial_kernel, x, y))
    return _off_diagonal(x, in_x) / (m * (m - 1)) + _off_diagonal(y, in_y) / (n * (n - 1)) - 2 * across / (m * n)


def _off_diagonal(x, members):
    """Sums over i ≠ j of k(x_i, x_j) within each subset: (n, d), (B, n) -> (B,)."""
    total = 0.0
    for rows, columns, k in tiles(polynomial_kernel, x):
        if rows == columns:
            np.fill_diagonal(k, 0)
        total += (1 if rows == columns else 2) * _sums(k, members[:, rows], members[:, columns])
    return total


def _sums(k, left, right):
    """Sum of k (m, n) over the rows in `left` and the columns in `right`, bool (B, m), (B, n) -> (B,)."""
    return ((left.astype(np.float64) @ k) * right).sum(1)


def draw_subsets(n_real, n_generated, subset_size, subsets, seed):
    """Yield `subsets` pairs of index arrays, each (subset_size,): which real, which generated images.

    Drawn without replacement within a subset, afresh for each.
    """
    for i in range(subsets):
        draw = generator(seed, "kid subset", i)
        yield tuple(torch.randperm(n, generator=draw)[:subset_size].numpy() for n in (n_real, n_generated))


def check_subset_size(subset_size, **counts):
    """Raise UserError unless subsets of this size can be drawn; counts: real=80, generated=80, ..."""
    images = ", ".join(f"{n} {kind}" for kind, n in counts.items())
    if subset_size < 2:
        raise UserError(f"KID subsets of {subset_size}: found {images} images, expected subsets of at least 2 "
                        "(a fourth of the generated images); generate 8 or more, or give --subset-size")
    if subset_size > min(counts.values()):
        raise UserError(f"KID subsets of {subset_size}: found {images} images, expected no set smaller than "
                        f"a subset; give --subset-size {min(counts.values())} or smaller")


def kid(real, generated, subset_size, subsets=SUBSETS, seed=0):
    """Features (n, d), (m, d) -> mean and standard deviation of the squared MMD over random subsets.

    The standard deviation divides by `subsets`, as torchmetrics' KernelInceptionDistance does. The subsets overlap: it
    describes the spread of one subset's estimate, not the uncertainty of the mean.
    """
    check_subset_size(subset_size, real=len(real), generated=len(generated))
    real, generated = np.asarray(real), np.asarray(generated)
    drawn = list(draw_subsets(len(real), len(generated), subset_size, subsets, seed))
    if subsets * subset_size**2 < len(real) * len(generated):  # few pairs are in any subset
        values = [polynomial_mmd(real[i], generated[j]) for i, j in drawn]
    else:  # each pair is in several: its kernel is computed once
        first, second = zip(*drawn, strict=True)
        values = mmd_of_subsets(real, generated, membership(first, len(real)), membership(second, len(generated)))
    return float(np.mean(values)), float(np.std(values))


def membership(subsets, n):
    """B index arrays into n images -> bool (B, n)."""
    members = np.zeros((len(subsets), n), bool)
    for row, indices in zip(members, subsets, strict=True):
        row[indices] = True
    return members
