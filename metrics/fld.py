"""FLD and the generalisation gap (GG) on arrays of features (from evaluation/features.py).

Jiralerspong, Bose, Gemp, Qin, Bachrach & Gidel, "Feature Likelihood Divergence", NeurIPS 2023. The generated
features are the centres of a mixture of Gaussians whose variances are fitted to the training features. A copy of
a training image ends with a tiny variance and makes its original very likely, but no test image: the gap

    GG = 100 · (NLL_train − NLL_test)    per dimension

is then far below 0. Near or above 0, the generator is no nearer to the images it has seen than to unseen ones.
FLD = 100 · (NLL_test − baseline) is a distance: 0 for a generator as good as real images, larger is worse. The
paper of GeCA gives GG on DINOv2 features in its Table 1.
"""

import math
from dataclasses import dataclass

import torch

from core.random import generator
from metrics.blocks import blocks, check_features, moments, squared_distances

CENTRES = 10_000  # generated features that are used, at most
BATCH = 10_000  # training features per step of the fit
EPOCHS, LEARNING_RATE = 50, 0.5  # of the fit, by Adam
STILL = 5e-4  # the fit ends when the last FLAT losses lie as close as this to the newest, after epoch FIRST
FLAT, FIRST = 5, 6
LIMIT = 40.0  # log-variances stay in [-LIMIT, LIMIT]
ORIGIN = 0.9**2  # factor on the squared distances of the origin component
ENTRIES = 2**18  # of a matrix of distances in work at a time: 2 MB, which stay in the processor's cache
KEPT = 2**25  # entries of a matrix that is kept through all epochs: 256 MB; a larger one is computed in each


@dataclass(frozen=True)
class Likelihoods:
    """FLD, GG (`gap`), and what they come from: negative log-likelihoods per dimension, in nats."""

    gap: float  # 100 · (nll_train − nll_test)
    fld: float  # 100 · (nll_test − baseline)
    nll_train: float
    nll_test: float
    baseline: float  # of the test features, where one half of the training features takes the place of the generated


def fld(train, test, generated, seed=0, device="cpu", baseline=None):
    """Features (n, d), (m, d), (k, d) -> Likelihoods. Raises UserError for fewer than 4, 2 and 1 of them.

    All are standardised by the test set's mean and standard deviation. `seed` decides how `train` is divided for the
    baseline, and which centres and batches are drawn when there are more than 10,000. The baseline of the same train,
    test and seed may be given, e.g. from another generator's result. It depends on the division: over divisions of 400
    features of 64 dimensions FLD varies by 0.4. GG does not.
    """
    train, test, generated = check_features(1, train=train, test=test, generated=generated)
    check_features(4, train=train)
    check_features(2, test=test)
    if baseline is None:
        order = torch.randperm(len(train), generator=generator(seed, "fld halves")).numpy()
        half = len(train) // 2
        baseline = baseline_nll(train[order[:half]], train[order[half:]], test, seed, device)
    nll_test, nll_train = _likelihoods(generated, train, test, (test, train), seed, device)
    return Likelihoods(100 * (nll_train - nll_test), 100 * (nll_test - baseline), nll_train, nll_test, baseline)


def baseline_nll(centres, others, test, seed=0, device="cpu"):
    """NLL per dimension of test features under real centres: two halves of the training set, fitted to the second."""
    return _likelihoods(centres, others, test, (test,), seed, device)[0]


def _likelihoods(centres, train, test, evaluated, seed, device):
    """NLL per dimension of each set of `evaluated` under the mixture at `centres` fitted to `train`."""
    standardise = _standardiser(test, device)
    if len(centres) > CENTRES:
        centres = centres[torch.randperm(len(centres), generator=generator(seed, "fld centres"))[:CENTRES].numpy()]
    centres = standardise(centres)
    log_variances = _fit(centres, train, standardise, seed)
    return [_mean_nll(centres, log_variances, features, standardise) for features in evaluated]


def _standardiser(test, device):
    """A function from rows of features (n, d) to a float64 tensor (n, d), z-scored by the test set.

    A dimension that is constant in the test set is only centred.
    """
    mean, std = moments(test)
    std[std <= 1e-9 * abs(mean)] = 1
    return lambda rows: torch.as_tensor((rows - mean) / std, device=device)


def _fit(centres, train, standardise, seed):
    """The log-variance of each of m centres (m, d) that makes the training features likely -> (m,).

    Minimised is the mean over the training features of −log(Σ_j N(x; centre_j, σ_j²) / m + N(0.9 x; 0, σ²)) / d. The
    second term, a component at the origin, takes the features that no centre is near, so that no centre grows wide for
    their sake; it is dropped after the fit. Autograd goes through the squared distances alone, block by block.
    """
    n, (m, d) = len(train), centres.shape
    distances, nearest = _distances(centres, train, standardise)
    log_variances = torch.cat([((nearest + 1e-3) / d).log(), nearest.new_zeros(1)])  # (m + 1,), the origin last
    log_weights = torch.full_like(log_variances, -math.log(m))
    log_weights[-1] = 0
    adam = torch.optim.Adam([log_variances.requires_grad_()], lr=LEARNING_RATE)
    losses = []
    for epoch in range(EPOCHS):
        order, total = torch.arange(n), 0.0
        if n > BATCH:
            order = torch.randperm(n, generator=generator(seed, "fld batches", epoch))
        for batch in order.split(BATCH):
            adam.zero_grad()
            for rows in batch.split(_rows(m)):
                log_parts = log_weights + _log_normal(distances(rows), log_variances, d)  # (b, m + 1)
                loss = -log_parts.logsumexp(1).sum() / d
                (loss / len(batch)).backward()
                total += loss.item()
            adam.step()
            with torch.no_grad():
                log_variances.clamp_(-LIMIT, LIMIT)
        losses.append(total / n)
        if len(losses) > FIRST and max(abs(loss - losses[-1]) for loss in losses[-FLAT:]) < STILL:
            break
    return log_variances.detach()[:-1]


def _distances(centres, train, standardise):
    """Squared distances from n training features to m centres and, as the last column, to the origin.

    The fit needs nothing else of the features. Returns a function from b indices to (b, m + 1), and the distance of
    each centre to its nearest training feature (m,). The origin is the mean of the training features. The matrix is
    kept if it fits in KEPT, else each epoch computes it again.
    """
    n, m = len(train), len(centres)
    origin = standardise(train.mean(0, dtype="float64")[None])

    def compute(rows):
        x = standardise(train[rows])
        return torch.cat([squared_distances(x, centres), ORIGIN * squared_distances(x, origin)], 1)

    kept = torch.empty(n, m + 1, dtype=torch.float64, device=centres.device) if n * m <= KEPT else None
    nearest = torch.full((m,), math.inf, dtype=torch.float64, device=centres.device)
    for rows in blocks(n, _rows(m)):
        part = compute(rows)
        nearest = torch.minimum(nearest, part[:, :-1].amin(0))
        if kept is not None:
            kept[rows] = part
    if kept is not None:
        return (lambda rows: kept if len(rows) == n else kept[rows]), nearest
    return (lambda rows: compute(rows.numpy())), nearest


def _rows(centres):
    """How many features are compared with all centres at a time."""
    return max(1, ENTRIES // centres)


def _log_normal(distances, log_variances, d):
    """log N(x; centre, exp(log_variance) · 1) from squared distances (n, m) in d dimensions."""
    constant = -d / 2 * (log_variances + math.log(2 * math.pi))
    return torch.addcmul(constant, distances, -0.5 * (-log_variances).exp())


def _mean_nll(centres, log_variances, features, standardise):
    """Mean over the features of −log(Σ_j N(x; centre_j, σ_j²) / m) / d."""
    total, (m, d) = 0.0, centres.shape
    for rows in blocks(len(features), _rows(m)):
        distances = squared_distances(standardise(features[rows]), centres)
        total -= _log_normal(distances, log_variances, d).logsumexp(1).sum().item()
    return (total / len(features) + math.log(m)) / d
