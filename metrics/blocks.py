"""Pairs of two sets of features in blocks, so that memory does not grow with the product of their sizes."""

import numpy as np

from core.errors import UserError

SIDE = 2048  # rows and columns of a block: 32 MB in float64


def blocks(n, size=None):
    """Slices that cover range(n), each at most `size` (SIDE) long."""
    size = size or SIDE
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def tiles(pairs, x, y=None):
    """Yield (rows, columns, pairs(x[rows], y[columns])) for all blocks of the (n, m) matrix of two sets.

    Only the two blocks are held in float64. Without y: the pairs of x with itself, and of a symmetric matrix
    only blocks on and above the diagonal; those above it (rows != columns) stand for two.
    """
    for i, rows in enumerate(blocks(len(x))):
        left = np.asarray(x[rows], np.float64)
        for columns in blocks(len(x))[i:] if y is None else blocks(len(y)):
            yield rows, columns, pairs(left, np.asarray((x if y is None else y)[columns], np.float64))


def squared_distances(x, y):
    """|x_i − y_j|² for all pairs of rows, arrays or tensors: (n, d), (m, d) -> (n, m)."""
    return ((x * x).sum(1)[:, None] + (y * y).sum(1) - 2 * (x @ y.T)).clip(0)  # rounding may fall below 0


def moments(x):
    """Mean and standard deviation (dividing by n − 1) of the columns, in float64: (n, d) -> (d,), (d,)."""
    mean = np.mean(x, axis=0, dtype=np.float64)
    squares = sum(np.square(x[rows] - mean).sum(0) for rows in blocks(len(x)))
    return mean, np.sqrt(squares / (len(x) - 1))


def check_features(least=2, **sets):
    """Arrays (n, d) of one d, all numbers finite, n at least `least`; raises UserError. sets: real=..., ..."""
    sets = {name: np.asarray(features) for name, features in sets.items()}
    for name, features in sets.items():
        if features.ndim != 2 or len(features) < least:
            raise UserError(f"{name} features: found shape {features.shape}, expected (n, d) with n of at least "
                            f"{least}; score more images")
        if not all(np.isfinite(features[rows]).all() for rows in blocks(len(features))):
            raise UserError(f"{name} features: found NaN or infinity, expected finite numbers; check the weights of "
                            "the feature network")
    widths = {name: features.shape[1] for name, features in sets.items()}
    if len(set(widths.values())) > 1:
        raise UserError(f"features of different spaces: found {widths} dimensions, expected one space for all; "
                        "extract them again")
    return list(sets.values())
