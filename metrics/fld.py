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
EPOCHS, RATE = 50, 0.5  # of the fit, by Adam
STILL = 5e-4  # the fit ends when the last FLAT losses lie as close as this to the newest, after epoch FIRST
FLAT, FIRST = 5, 6
LIMIT = 40.0  # log-variances stay in [-LIMIT, LIMIT]
ORIGIN = 0.81  # factor on the squared distances of the origin component
ENTRIES = 2**22  # of a matrix of distances in work at a time: 32 MB
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

    All are standardised by the test set's mean and deviation. `seed`: of the halves of `train` in the baseline, and
    of which centres and batches, when there are more than 10,000. The baseline of the same train, test and seed may
    be given, e.g. from another generator's result. Its halves are chance: over splits of 400 features of 64
    dimensions FLD varies by 0.4. GG has no part in that.
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
    """The log-variance of each of m centres (m, d) that makes the training features likely -> (m,)."""
    d = centres.shape[1]
    distances, nearest, origin = _distances(centres, train, standardise)
    log_variances = ((nearest + 1e-3) / d).log()
    origin_log_variance = torch.zeros(1, dtype=torch.float64, device=centres.device)
    adam = torch.optim.Adam([log_variances, origin_log_variance], lr=RATE)
    losses = []
    for epoch in range(EPOCHS):
        order, total = torch.arange(len(train)), 0.0
        if len(train) > BATCH:
            order = torch.randperm(len(train), generator=generator(seed, "fld batches", epoch))
        for batch in order.split(BATCH):
            loss, *gradients = 0.0, torch.zeros_like(log_variances), torch.zeros_like(origin_log_variance)
            for rows in batch.split(_rows(len(centres))):
                part, *parts = _loss(distances(rows), origin[rows], log_variances, origin_log_variance, d)
                loss += part
                for gradient, share in zip(gradients, parts, strict=True):
                    gradient += share / (len(batch) * d)
            total += loss / d
            log_variances.grad, origin_log_variance.grad = gradients
            adam.step()
            log_variances.clamp_(-LIMIT, LIMIT)
            origin_log_variance.clamp_(-LIMIT, LIMIT)
        losses.append(total / len(train))
        if len(losses) > FIRST and max(abs(loss - losses[-1]) for loss in losses[-FLAT:]) < STILL:
            break
    return log_variances


def _distances(centres, train, standardise):
    """Squared distances of training features: a function from indices to (rows, m); to the nearest, per centre; to
    the origin, (n, 1), reduced by ORIGIN.

    The fit needs nothing else. They are kept if they fit in KEPT, else each epoch computes them from the features.
    """
    n, m = len(train), len(centres)
    mean = standardise(train.mean(0, dtype="float64")[None])
    kept = torch.empty(n, m, dtype=torch.float64, device=centres.device) if n * m <= KEPT else None
    nearest = torch.full((m,), math.inf, dtype=torch.float64, device=centres.device)
    origin = torch.empty(n, 1, dtype=torch.float64, device=centres.device)
    for rows in blocks(n, _rows(m)):
        x = standardise(train[rows])
        found = squared_distances(x, centres)
        nearest = torch.minimum(nearest, found.amin(0))
        origin[rows] = ORIGIN * squared_distances(x, mean)
        if kept is not None:
            kept[rows] = found
    if kept is not None:
        return (lambda rows: kept if len(rows) == n else kept[rows]), nearest, origin
    return (lambda rows: squared_distances(standardise(train[rows.numpy()]), centres)), nearest, origin


def _rows(centres):
    """How many training features are compared with all centres at a time."""
    return max(1, ENTRIES // centres)


def _loss(distances, origin, log_variances, origin_log_variance, d):
    """Sum over n features of −log(Σ_j N(x; centre_j, σ_j²) / m + N(x; origin, σ²)), and its gradients.

    distances (n, m), origin (n, 1) -> a number, (m,), (1,). The origin component takes the features that no centre
    is near, lest a centre grow wide for their sake. It counts in the fit only, and without a weight.
    By a log-variance s, log N changes by (distance · exp(−s) − d) / 2 times the component's share in the sum.
    """
    scaled = _log_normal(distances, log_variances, d, -math.log(len(log_variances)))  # (n, m)
    alone = _log_normal(origin, origin_log_variance, d)  # (n, 1)
    highest = torch.maximum(scaled.amax(1, keepdim=True), alone)
    shares = scaled.sub_(highest).exp_()  # in place, as all below: allocating would take as long as computing
    origin_shares = (alone - highest).exp()
    total = shares.sum(1, keepdim=True) + origin_shares
    loss = -(total.log() + highest).sum().item()
    weights = 1 / total[:, 0]  # (n,)
    origin_shares = origin_shares[:, 0] * weights
    share = weights @ shares  # (m,)
    reach = weights @ shares.mul_(distances)
    gradient = (share * d - reach * (-log_variances).exp()) / 2
    origin_reach = (origin_shares @ origin) * (-origin_log_variance).exp()
    return loss, gradient, (origin_shares.sum() * d - origin_reach) / 2


def _log_normal(distances, log_variances, d, add=0.0):
    """log N(x; centre, exp(log_variance) · 1) + add, from squared distances (n, m) in d dimensions."""
    constant = add - d / 2 * (log_variances + math.log(2 * math.pi))
    return torch.addcmul(constant, distances, -0.5 * (-log_variances).exp())


def _mean_nll(centres, log_variances, features, standardise):
    """Mean over the features of −log(Σ_j N(x; centre_j, σ_j²) / m) / d."""
    total, (m, d) = 0.0, centres.shape
    for rows in blocks(len(features), _rows(m)):
        distances = squared_distances(standardise(features[rows]), centres)
        total -= _log_normal(distances, log_variances, d, -math.log(m)).logsumexp(1).sum().item()
    return total / (len(features) * d)
