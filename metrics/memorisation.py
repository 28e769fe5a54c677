"""Are the generated images copies of patients? Answers on arrays of features (from evaluation/features.py).

    found = memorisation(train, test, generated)  # features (n, D), (m, D), (g, D) of one space
    exact = exact_duplicates(pixel_hashes(generated_paths, size), pixel_hashes(train_paths, size))
    picture(found.closest, generated_paths, train_paths, size)

`train` are the images that the generator has seen, `test` real ones of other patients, from the same sources: they
say how near to the training images an image comes that was not copied from them.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.stats import betabinom, mannwhitneyu, norm
from sklearn.metrics import pairwise_distances_chunked
from sklearn.neighbors import NearestNeighbors

from core.errors import UserError
from core.random import generator
from dataset.images import load_image
from dataset.pictures import stack
from metrics.lpips import distances

CLOSE = 0.05  # share of test images that count as close to the training images
ALIKE = 0.01  # share of training images that count as near duplicates of another
CENTRAL = 0.95  # of `low` to `high` of a share
BLOCK_MIB = 64  # of distances that are held at once
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
    lpips: float | None = None


@dataclass(frozen=True)
class NearDuplicates:
    """Samples that are as near to another sample as the nearest 1 % of real images are to another real one."""

    threshold: float  # distance in feature space
    samples: int  # how many have such a neighbour
    share: float
    expected: float  # the share among as many real images, or among all training images if they are fewer
    groups: tuple  # of indices; within one, a chain of near duplicates leads from each to each


@dataclass(frozen=True)
class ExactDuplicates:
    """Images whose pixels are the same, to the bit."""

    samples: int  # how many samples have a twin among the samples
    groups: tuple  # of their indices
    copies: tuple  # (sample, training image), the first of each sample


@dataclass(frozen=True)
class Memorisation:
    """What `memorisation` found; plain numbers and tuples, so that it can be written as JSON."""

    training_images: int
    test_images: int
    samples: int
    close: Share  # see `close_share`
    closer_than_test: Share  # see `closer_probability`
    nearest_is_training: Share  # see `nearest_is_training`
    authentic_percent: float  # AuthPct, see `authentic`
    authentic_percent_test: float  # the same of the test images: what no copying looks like
    near_duplicates: NearDuplicates
    closest: tuple  # of Pair, the nearest first


def memorisation(train, test, generated, count=16, seed=0):
    """Features of training, test and generated images, (n, D), (m, D), (g, D) -> Memorisation.

    count: pairs in `closest`. seed: which training images are taken for the threshold of near duplicates if there
    are more of them than samples, since the more images, the nearer is the nearest. Raises UserError.
    """
    train, test, generated = (np.ascontiguousarray(x, np.float32) for x in (train, test, generated))
    if len(train) < 2 or not len(test) or not len(generated):
        raise UserError(f"memorisation: found {len(train)} training, {len(test)} test and {len(generated)} generated "
                        "images, expected at least 2, 1 and 1")
    (index,), (gap,) = (x.T for x in nearest(generated, train))  # (g,): of each sample
    (test_index,), (test_gap,) = (x.T for x in nearest(test, train))
    to_test_index, to_test_gap = (x[:, 0] for x in nearest(generated, test))
    train_gap = nearest_other(train)

    alike = train_gap
    if 2 <= len(generated) < len(train):
        draw = generator(seed, "near duplicates")
        alike = nearest_other(train[torch.randperm(len(train), generator=draw)[:len(generated)].numpy()])
    of_all = np.where(gap <= to_test_gap, index, len(train) + to_test_index)
    return Memorisation(
        training_images=len(train), test_images=len(test), samples=len(generated),
        close=close_share(gap, test_gap),
        closer_than_test=closer_probability(gap, test_gap),
        nearest_is_training=nearest_is_training(of_all, len(train), len(test)),
        authentic_percent=100 * float(authentic(index, gap, train_gap).mean()),
        authentic_percent_test=100 * float(authentic(test_index, test_gap, train_gap).mean()),
        near_duplicates=near_duplicates(generated, alike),
        closest=closest_pairs(index, gap, count),
    )


def nearest(queries, reference, k=1):
    """The k nearest reference images of each query, Euclidean: (m, D), (n, D) -> indices and distances (m, k).

    Where there are fewer than k reference images, all of them. Found in blocks: memory does not grow with m · n.
    Distances are computed again by subtraction, so that a copy has exactly 0.
    """
    search = NearestNeighbors(n_neighbors=min(k, len(reference)), algorithm="brute").fit(reference)
    index = search.kneighbors(queries, return_distance=False)
    return index, _distances(queries, reference, index)


def nearest_other(images):
    """The distance of each image to the nearest other one: (n, D) -> (n,)."""
    search = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(images)
    return _distances(images, images, search.kneighbors(return_distance=False))[:, 0]  # no queries: never itself


def _distances(queries, reference, index):
    """Distances of queries (m, D) and reference[index], index (m, k) -> (m, k)."""
    found = np.empty(index.shape)
    for start in range(0, len(queries), ROWS):
        rows = slice(start, start + ROWS)
        for column in range(index.shape[1]):
            other = np.asarray(reference[index[rows, column]], np.float64)
            found[rows, column] = np.linalg.norm(queries[rows] - other, axis=1)
    return found


def close_share(gap, test_gap, quantile=CLOSE):
    """The share of samples that come closer to the training images than nearly every test image does.

    gap (g,), test_gap (m,): distance of each sample, and of each test image, to its nearest training image. Few
    copies among many samples show here, and hardly in `closer_probability`. The threshold is the k-th smallest of
    the test images' distances, k = ⌊quantile · (m + 1)⌋, at least 1. If samples are distributed as test images are,
    the number of samples below it is beta-binomial (g; k, m + 1 − k), whatever the distances are distributed like,
    and the expected share is k / (m + 1). That counts the chance in both sets; a binomial interval around 5 % would
    take the threshold as known. Samples must be independent: near duplicates make p too small.
    """
    gap, test_gap = np.asarray(gap), np.sort(test_gap)
    g, m = len(gap), len(test_gap)
    k = max(1, int(quantile * (m + 1)))
    below = int((gap < test_gap[k - 1]).sum())
    law = betabinom(g, k, m + 1 - k)
    low, high = (float(v) / g for v in law.interval(CENTRAL))
    return Share(below / g, k / (m + 1), low, high, float(law.sf(below - 1)))


def closer_probability(gap, test_gap):
    """How often a sample is closer to the training images than a test image is: P(gap < test_gap) + ½ P(equal).

    gap (g,), test_gap (m,) as in `close_share`. ½ if samples are distributed as test images are; near 1 if most are
    copies. The range is that of the Mann-Whitney statistic, whose variance is then (g + m + 1) / (12 g m).
    Dull samples, all near the centre of the real ones, have near neighbours too and raise this share and
    `close_share` without a copy among them: `nearest_is_training` tells the two apart.
    """
    g, m = len(gap), len(test_gap)
    statistic, p = mannwhitneyu(test_gap, gap, alternative="greater")
    value, spread = float(statistic) / (g * m), ((g + m + 1) / (12 * g * m)) ** 0.5
    low, high = norm.interval(CENTRAL, 0.5, spread)
    return Share(value, 0.5, max(0.0, float(low)), min(1.0, float(high)), float(p))


def nearest_is_training(index, n, m):
    """The share of samples whose nearest real image is one that the generator has seen.

    index (g,): of each sample's nearest among n training (0 to n − 1) and m test images (n to n + m − 1). If the
    generator knew no more of its training images than of the test images, which was which would be chance, and the
    share n / (n + m); however dull, few or alike the samples are. Its variance is that of a sum over n of n + m real
    images, drawn without replacement, of how many samples each has next to it: n m / (N (N − 1)) · Σ (c_r − c̄)².
    Where a patient has several images, all on one side of the split, the true range is somewhat wider.
    """
    total = n + m
    next_to = np.bincount(index, minlength=total) / len(index)  # c_r / g of each real image
    variance = n * m / (total * (total - 1)) * ((next_to - 1 / total) ** 2).sum()
    law = norm(n / total, max(variance, 1e-12) ** 0.5)
    value, (low, high) = float(next_to[:n].sum()), law.interval(CENTRAL)
    return Share(value, n / total, max(0.0, float(low)), min(1.0, float(high)), float(law.sf(value)))


def authentic(index, gap, train_gap):
    """Which samples are authentic: (m,) bool; their percentage is AuthPct.

    index, gap (m,): nearest training image of each sample, and its distance; train_gap (n,): distance of each
    training image to the nearest other one. A sample is authentic if it lies farther from its training image than
    the nearest other training image does. Alaa, van Breugel, Saveliev & van der Schaar, "How faithful is your
    synthetic data?", ICML 2022, Sec. 4. Equality does not suffice, as in the usual implementations: a copy of an
    image that is twice in the training set is no less a copy. 100 % is not to be expected: see the test images'.
    """
    return gap > train_gap[index]


def closest_pairs(index, gap, count=16):
    """The `count` samples that are nearest to a training image -> Pairs; index, gap (g,) as from `nearest`."""
    order = np.argsort(gap, kind="stable")[:count]
    return tuple(Pair(int(i), int(index[i]), float(gap[i])) for i in order)


def near_duplicates(images, real_gap, quantile=ALIKE):
    """Which of the images (g, D) have another as near as the nearest real ones have -> NearDuplicates.

    real_gap (r,): distance of each of r real images to the nearest other one, best r = g. The threshold is one of
    them, at their 1 % quantile; the nearest come in twos, so that what is expected is counted, not taken as 1 %.
    Images are compared in blocks; what is kept of a block is only which images hang together.
    """
    real_gap = np.asarray(real_gap)
    threshold = float(np.quantile(real_gap, quantile, method="lower"))
    images = np.asarray(images, np.float32)
    # Features alike to the bit must count at a threshold of 0 too, and have this much rounding between them.
    reach = max(threshold, 1e-6 * float(np.sqrt(np.mean(images**2, dtype=np.float64) * images.shape[1])))
    group, start = np.arange(len(images)), 0
    for block in pairwise_distances_chunked(images, working_memory=BLOCK_MIB):  # (rows, g)
        row, column = np.nonzero(block <= reach)
        edges = (np.ones(len(row), bool), (group[start + row], group[column]))
        group = connected_components(coo_matrix(edges, (len(images),) * 2), directed=False)[1][group]
        start += len(block)
    groups = _groups(group)
    samples = sum(map(len, groups))
    return NearDuplicates(threshold, samples, samples / len(images), float(np.mean(real_gap <= threshold)), groups)


def pixel_hashes(paths, image_size, workers=4):
    """SHA-256 of the pixels of each image file, as this program sees it: cropped to image_size, 8-bit RGB."""
    def digest(path):
        return hashlib.sha256(load_image(path, image_size).tobytes()).hexdigest()

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(digest, paths))


def exact_duplicates(generated, train):
    """Hashes of the pixels of samples and of training images, from `pixel_hashes` -> ExactDuplicates."""
    groups, first = _groups(generated), {}
    for i, value in enumerate(train):
        first.setdefault(value, i)
    copies = tuple((i, first[value]) for i, value in enumerate(generated) if value in first)
    return ExactDuplicates(sum(map(len, groups)), groups, copies)


def _groups(keys):
    """Indices of equal keys, in groups of two and more; in the order of their first members."""
    members = {}
    for i, key in enumerate(keys):
        members.setdefault(key, []).append(i)
    return tuple(tuple(group) for group in members.values() if len(group) > 1)


def nearest_by_lpips(distance, paths, train_paths, candidates, image_size, batch_size=32, progress=None):
    """The nearest training image of each of q images by LPIPS -> indices and distances (q,).

    Only among candidates (q, k), indices of training images, as from `nearest` in feature space: LPIPS of all pairs
    would take days. distance: from `metrics.lpips.open_lpips`. With the same of the test images, the distances can
    be given to `close_share` and `closer_probability`.
    """
    candidates = np.asarray(candidates)
    first = [path for path in paths for _ in range(candidates.shape[1])]
    second = [train_paths[i] for i in candidates.ravel()]
    values = distances(distance, first, second, image_size, batch_size, progress).reshape(candidates.shape)
    best = values.argmin(axis=1)[:, None]
    return tuple(np.take_along_axis(x, best, axis=1)[:, 0] for x in (candidates, values))


def with_lpips(pairs, distance, generated_paths, train_paths, image_size, batch_size=32):
    """The same pairs, each with the LPIPS of its two images."""
    ends = [generated_paths[p.sample] for p in pairs], [train_paths[p.training] for p in pairs]
    values = distances(distance, *ends, image_size, batch_size)
    return tuple(replace(p, lpips=float(value)) for p, value in zip(pairs, values, strict=True))


def picture(pairs, generated_paths, train_paths, image_size):
    """Pairs side by side -> PIL image: the training image above, the sample and its distance below."""
    sets = [[load_image(train_paths[p.training], image_size) for p in pairs],
            [load_image(generated_paths[p.sample], image_size) for p in pairs]]
    captions = [f"{p.distance:.3g}" + (f", LPIPS {p.lpips:.2f}" if p.lpips is not None else "") for p in pairs]
    return stack(sets, ["training", "generated"], [[""] * len(pairs), captions], min(8, len(pairs)))
