"""FID, the Fréchet distance of two sets of images, on arrays of features (from evaluation/features.py).

Heusel, Ramsauer, Unterthiner, Nessler & Hochreiter, NeurIPS 2017: the squared 2-Wasserstein distance of the two
Gaussians that have the sets' means and covariances. With few images it is far too large (the covariance of n images
has rank n − 1): compare values of equally many images only, and see KID, which has no such bias.
"""

import numpy as np

from metrics.blocks import blocks, check_features


def fid(real, generated):
    """|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½): features (n, d), (m, d) -> a number. Covariances divide by n − 1.

    With Σ₁ = AᵀA and Σ₂ = BᵀB, tr (Σ₁Σ₂)^½ is the sum of the singular values of ABᵀ. No root is taken of an eigenvalue
    that should be 0 and is rounding, which is what makes the root of a singular Σ₁Σ₂ unstable.
    """
    (mean, a), (other_mean, b) = (_mean_and_factor(x) for x in check_features(real=real, generated=generated))
    root = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(np.square(mean - other_mean).sum() + np.square(a).sum() + np.square(b).sum() - 2 * root)


def _mean_and_factor(x):
    """Features (n, d) -> their mean (d,) and a matrix A (min(n, d), d) such that AᵀA is their covariance."""
    n, d = x.shape
    mean = x.mean(0, dtype=np.float64)
    if n <= d:
        return mean, (x - mean) / np.sqrt(n - 1)
    covariance = sum(part.T @ part for part in (x[rows] - mean for rows in blocks(n))) / (n - 1)
    variances, axes = np.linalg.eigh(covariance)
    return mean, np.sqrt(variances.clip(0))[:, None] * axes.T
