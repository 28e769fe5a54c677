"""Are the generated images copies of training images? Answers on arrays of features (from evaluation/features.py).

The training images are those that the generator has seen. Test images are real ones of other patients, from the same
sources: they say how near to the training images an image comes that was not copied from them.
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import betabinom
from sklearn.neighbors import NearestNeighbors

from core.errors import UserError

CLOSE = 0.05  # share of test images that count as close to the training images
CENTRAL = 0.95  # of `low` to `high` of a share
ROWS = 4096  # features that are subtracted at once


@dataclass(frozen=True)
class Share:
    """A share and what it would be if nothing were memorised: on average, and in 95 % of cases."""

    value: float
    expected: float
    low: float
    high: float
    p: float  # how often it would be as large as here


@dataclass(frozen=True)
class Pair:
    """A generated image and its nearest training image, by index."""

    sample: int
    training: int
    distance: float  # in feature space


@dataclass(frozen=True)
class Memorisation:
    """What `memorisation` found; plain numbers and tuples, so that it can be written as JSON."""

    close: Share  # see `close_share`
    authentic_percent: float  # AuthPct, see `authentic`
    closest: tuple  # of Pair, the nearest first


def memorisation(train, test, generated, count=16):
    """Features of training, test and generated images, (n, D), (m, D), (g, D) -> Memorisation.

    count: pairs in `closest`. Raises UserError for fewer than 2, 1 and 1 images.
    """
    train, test, generated = (np.ascontiguousarray(x, np.float32) for x in (train, test, generated))
    if len(train) < 2 or not len(test) or not len(generated):
        raise UserError(f"memorisation: found {len(train)} training, {len(test)} test and {len(generated)} generated "
                        "images, expected at least 2, 1 and 1")
    index, gap = nearest(generated, train)
    _, test_gap = nearest(test, train)
    return Memorisation(close_share(gap, test_gap), 100 * float(authentic(index, gap, nearest_other(train)).mean()),
                        closest_pairs(index, gap, count))


def nearest(queries, reference):
    """The nearest reference image of each query, Euclidean: (m, D), (n, D) -> indices and distances (m,).

    Found in blocks: memory does not grow with m · n. Distances are computed again by subtraction, so that a copy has
    exactly 0.
    """
    search = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(reference)
    index = search.kneighbors(queries, return_distance=False)[:, 0]
    return index, _distances(queries, reference, index)


def nearest_other(images):
    """The distance of each image to the nearest other one: (n, D) -> (n,)."""
    search = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(images)
    return _distances(images, images, search.kneighbors(return_distance=False)[:, 0])  # no queries: never itself


def _distances(queries, reference, index):
    """Distances of queries (m, D) and reference[index], index (m,) -> (m,)."""
    distances = np.empty(len(queries))
    for start in range(0, len(queries), ROWS):
        rows = slice(start, start + ROWS)
        other = np.asarray(reference[index[rows]], np.float64)
        distances[rows] = np.linalg.norm(queries[rows] - other, axis=1)
    return distances


def close_share(gap, test_gap, quantile=CLOSE):
    """The share of samples that come closer to the training images than nearly every test image does.

    gap (g,), test_gap (m,): distance of each sample, and of each test image, to its nearest training image. The
    threshold is the k-th smallest of the test images' distances, k = ⌊quantile · (m + 1)⌋, at least 1. If samples are
    distributed as test images are, the number of samples below it is beta-binomial (g; k, m + 1 − k), whatever the
    distances are distributed like, and the expected share is k / (m + 1). That counts the chance in both sets; a
    binomial interval around 5 % would take the threshold as known. Samples must be independent: near duplicates among
    them make p too small. Dull samples, all near the centre of the real ones, have near neighbours too and raise the
    share without a copy among them.
    """
    gap, test_gap = np.asarray(gap), np.sort(test_gap)
    g, m = len(gap), len(test_gap)
    k = max(1, int(quantile * (m + 1)))
    below = int((gap < test_gap[k - 1]).sum())
    law = betabinom(g, k, m + 1 - k)
    low, high = (float(v) / g for v in law.interval(CENTRAL))
    return Share(below / g, k / (m + 1), low, high, float(law.sf(below - 1)))


def authentic(index, gap, train_gap):
    """Which samples are authentic: (m,) bool; their percentage is AuthPct.

    index, gap (m,): nearest training image of each sample, and its distance; train_gap (n,): distance of each
    training image to the nearest other one. A sample is authentic if it lies farther from its training image than
    the nearest other training image does. Alaa, van Breugel, Saveliev & van der Schaar, "How faithful is your
    synthetic data?", ICML 2022, Sec. 4. Equality does not suffice, as in the usual implementations: a copy of an
    image that is twice in the training set is no less a copy. 100 % is not to be expected: see real images'.
    """
    return gap > train_gap[index]


def closest_pairs(index, gap, count=16):
    """The `count` samples that are nearest to a training image -> Pairs; index, gap (g,) as from `nearest`."""
    order = np.argsort(gap, kind="stable")[:count]
    return tuple(Pair(int(i), int(index[i]), float(gap[i])) for i in order)


def exact_copies(generated, train):
    """Pairs (sample, training image) of equal pixels, the first of each sample; both are lists of hashes of pixels."""
    first = {}
    for i, value in enumerate(train):
        first.setdefault(value, i)
    return tuple((i, first[value]) for i, value in enumerate(generated) if value in first)
