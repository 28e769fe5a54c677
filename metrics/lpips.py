"""Which pairs of images LPIPS is measured on, and what the distances of these pairs say about a set.

The distance itself, a network, is in evaluation/lpips.py. The paper's Table 1 shows the mean over consecutive pairs.
"""

from dataclasses import dataclass

import numpy as np
import torch

from core.random import generator


@dataclass(frozen=True)
class Spread:
    """Distances of m pairs: their mean, their standard deviation, and the standard error of the mean."""

    mean: float
    std: float  # divides by m, as the published score does
    standard_error: float | None  # None for a single pair
    pairs: int


def consecutive_pairs(n, seed):
    """n images, shuffled, each with the next: indices (n − 1, 2)."""
    order = torch.randperm(n, generator=generator(seed, "lpips order")).numpy()
    return np.stack([order[:-1], order[1:]], axis=1)


def draw_pairs(labels, count, same, seed):
    """Draw pairs of images at random, uniformly from all whose labels are equal (`same`) or else are not.

    labels (n, K) -> indices (m, 2), no pair twice; m = count, or all pairs where there are no more.
    """
    combination = np.unique(labels, axis=0, return_inverse=True)[1].reshape(-1)  # (n,): which labels an image has
    order = np.argsort(combination, kind="stable")  # (n,): images of one combination stand together, as a group
    sizes = np.bincount(combination)
    size = sizes.repeat(sizes)  # (n,): of the group at each place of `order`
    start = (np.cumsum(sizes) - sizes).repeat(sizes)  # (n,): where that group begins
    partners = size - 1 if same else len(order) - size  # (n,): how many images form a pair with the one at each place
    count = min(count, partners.sum() // 2)
    draw, pairs = generator(seed, "lpips pairs", same), {}
    while len(pairs) < count:
        # A first image in proportion to how many partners it has, then one of these: every pair is as likely.
        first = torch.multinomial(torch.as_tensor(partners).double(), int(count), True, generator=draw).numpy()
        step = (torch.rand(len(first), generator=draw, dtype=torch.float64).numpy() * partners[first]).astype(int)
        if same:  # so many places on from the first, round within its group
            second = start[first] + (first - start[first] + 1 + step) % size[first]
        else:  # so many places behind its group, round over all
            second = (start[first] + size[first] + step) % len(order)
        ends = np.sort(np.stack([order[first], order[second]], axis=1), axis=1)
        pairs |= dict.fromkeys(map(tuple, ends.tolist()))  # as keys, so that none comes twice
    return np.array(list(pairs)[:count], int).reshape(-1, 2)


def spread(values, pairs):
    """Distances (m,) of pairs (m, 2) of images -> Spread.

    Pairs that share an image are not independent: an odd one is far from both its neighbours. The error of the
    mean is that of another draw of images, so it counts, beside the m squared deviations e_p², the products
    e_p · e_q of all pairs p ≠ q with a common image. (The variance for dyadic data, Aronow, Samii & Assenova 2015;
    for a chain of pairs, (γ₀ + 2γ₁) / m with the autocovariances at lag 0 and 1.) In expectation these products
    are not negative, so where they come out below 0 they count as 0.
    """
    values, pairs = np.asarray(values, np.float64), np.asarray(pairs)
    m, deviation = len(values), values - values.mean()
    squares = (deviation**2).sum()
    per_image = np.bincount(pairs.ravel(), weights=deviation.repeat(2))  # Σ e_p over the pairs of each image
    shared = (per_image**2).sum() - 2 * squares  # each e_p² is in the sums of two images
    error = float(np.sqrt((squares + max(shared, 0)) / (m * (m - 1)))) if m > 1 else None
    return Spread(float(values.mean()), float(values.std()), error, m)
