"""Precision, recall, density and coverage on arrays of features (from evaluation/features.py).

Each image of a set has a ball that reaches to the k-th nearest other image of the set.
Precision, recall: Kynkäänniemi, Karras, Laine, Lehtinen & Aila, NeurIPS 2019. Density, coverage: Naeem, Oh, Uh, Choi &
Yoo, ICML 2020, who use k = 5: a real outlier's huge ball raises precision; density counts balls, so it weighs less.
"""

from dataclasses import dataclass

import numpy as np

from metrics.blocks import check_features, moments, squared_distances, tiles

NEAREST = 5  # k
RELATIVE, ABSOLUTE = 1e-9, 1e-13  # of a squared radius and of the mean squared distance: more than rounding can do


@dataclass(frozen=True)
class Fidelity:
    precision: float  # share of generated images inside a ball of a real one: do they look real?
    recall: float  # share of real images inside a ball of a generated one: are all kinds of image made?
    density: float  # how many balls of real images a generated image lies in, over k; may exceed 1
    coverage: float  # share of real images whose ball has a generated image in it


def prdc(real, generated, k=NEAREST):
    """Features (n, d), (m, d) -> Fidelity. Raises UserError unless n and m are above k.

    Balls are closed, as in the papers' formulas. That matters for copies, which can lie exactly on the surface of a
    ball; the slack keeps rounding, and with it the size of the blocks, from deciding there.
    """
    real, generated = check_features(k + 1, real=real, generated=generated)
    mean, std = moments(real)

    def distances(x, y):
        return squared_distances(x - mean, y - mean)  # the nearer to 0 the numbers, the less rounding

    slack = ABSOLUTE * 2 * np.square(std).sum()
    real_radii, radii = (_squared_radii(x, k, distances) * (1 + RELATIVE) + slack for x in (real, generated))
    precise, recalled, covered, inside = np.zeros(len(generated), bool), *np.zeros((2, len(real)), bool), 0
    for rows, columns, squared in tiles(distances, real, generated):
        in_real = squared <= real_radii[rows, None]
        precise[columns] |= in_real.any(0)
        covered[rows] |= in_real.any(1)
        inside += int(in_real.sum())
        recalled[rows] |= (squared <= radii[columns]).any(1)
    return Fidelity(float(precise.mean()), float(recalled.mean()), inside / (k * len(generated)), float(covered.mean()))


def _squared_radii(x, k, distances):
    """Squared distance of each image to the k-th nearest other one: (n, d) -> (n,)."""
    nearest = np.full((len(x), k), np.inf)
    for rows, columns, squared in tiles(distances, x):
        if rows == columns:
            np.fill_diagonal(squared, np.inf)
        for place, block in ((rows, squared), (columns, squared.T))[:1 if rows == columns else 2]:
            joined = np.concatenate([nearest[place], block], axis=1)
            nearest[place] = np.partition(joined, k - 1, axis=1)[:, :k]
    return nearest.max(1)
