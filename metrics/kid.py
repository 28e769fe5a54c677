"""KID, the kernel distance between two sets of images, on arrays of features (from metrics/features.py).

Binkowski, Sutherland, Arbel & Gretton, "Demystifying MMD GANs", ICLR 2018, Sec. 4. The paper's Table 1 gives
it in units of 1e-3, over 100 subsets of ⌊n_generated / 4⌋ images.
"""

import numpy as np
import torch

from pipeline.cli import UserError
from pipeline.seeds import generator

SUBSETS = 100  # as in the paper


def polynomial_kernel(x, y):
    """k(x, y) = (x·y / d + 1)³ for all pairs: (m, d), (n, d) -> (m, n)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def polynomial_mmd(x, y):
    """Unbiased estimate of the squared maximum mean discrepancy of two samples: (m, d), (n, d) -> a number.

    mean over i ≠ j of k(x_i, x_j)  +  mean over i ≠ j of k(y_i, y_j)  −  2 · mean over i, j of k(x_i, y_j).
    Its expectation is 0 for two samples of one distribution, so single values may be negative.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    within = _mean_off_diagonal(polynomial_kernel(x, x)) + _mean_off_diagonal(polynomial_kernel(y, y))
    return within - 2 * polynomial_kernel(x, y).mean()


def _mean_off_diagonal(k):
    n = len(k)
    return (k.sum() - np.trace(k)) / (n * (n - 1))


def draw_subsets(n_real, n_generated, subset_size, subsets, seed):
    """Yield `subsets` pairs of index arrays, each (subset_size,): which real, which generated images.

    Drawn without replacement within a subset, afresh for each.
    """
    for i in range(subsets):
        draw = generator(seed, "kid subset", i)
        yield tuple(torch.randperm(n, generator=draw)[:subset_size].numpy() for n in (n_real, n_generated))


def check_subset_size(subset_size, **counts):
    """Raise UserError unless subsets of this size can be drawn; counts: real=80, generated=80, ..."""
    found = ", ".join(f"{n} {kind}" for kind, n in counts.items())
    if subset_size < 2:
        raise UserError(f"KID subsets of {subset_size}: found {found} images, expected subsets of at least 2 "
                        "(a fourth of the generated images); generate 8 or more, or give --subset-size")
    if subset_size > min(counts.values()):
        raise UserError(f"KID subsets of {subset_size}: found {found} images, expected no set smaller than "
                        f"a subset; give --subset-size {min(counts.values())} or smaller")


def kid(real, generated, subset_size, subsets=100, seed=0):
    """Features (n, d), (m, d) -> mean and standard deviation of the squared MMD over random subsets.

    The deviation divides by `subsets`, as torchmetrics' KernelInceptionDistance does. The subsets overlap: it
    describes the spread of one subset's estimate, not the uncertainty of the mean.
    """
    check_subset_size(subset_size, real=len(real), generated=len(generated))
    real, generated = np.asarray(real, np.float64), np.asarray(generated, np.float64)
    values = [polynomial_mmd(real[i], generated[j])
              for i, j in draw_subsets(len(real), len(generated), subset_size, subsets, seed)]
    return float(np.mean(values)), float(np.std(values))
