"""Is one classifier better than another? A permutation test on the predictions of both for the same test images.

`compare` tests mAP and macro F1(sen/spe). The hypothesis, given the trained networks, is that it does not matter which
of the two models made which prediction (for mAP: gave which rank). Nothing is assumed of folds and labels, which are
not independent: all folds are tested on the same images. `bootstrap` gives intervals. Units (patients) are swapped and
drawn whole, because images of one patient resemble each other.
"""

import numpy as np
import torch
from scipy import stats

from core.random import generator
from metrics.classification import harmonic_mean

PERMUTATIONS = 50_000  # **** after Holm's correction for four methods needs 40,000
REPLICATES = 1000
STARS = ((1e-4, "****"), (1e-3, "***"), (1e-2, "**"), (5e-2, "*"))  # as in the paper's Table 2
AT_ONCE = 500  # permutations; what they need at a time stays in the processor's cache


def stars(p):
    """`*` for p < .05 up to `****` for p < .0001; nothing for more, or for no p."""
    return next((mark for limit, mark in STARS if p is not None and p < limit), "")


def holm(p_values):
    """Holm's correction for several methods: p-values -> adjusted p-values, in their order.

    The i-th smallest (from 0) of m is multiplied by m − i; none is smaller than one before it, none is above 1.
    """
    p_values = np.asarray(p_values, np.float64)
    order = np.argsort(p_values, kind="stable")
    raised = np.maximum.accumulate(p_values[order] * (len(order) - np.arange(len(order))))
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(raised, 1)
    return adjusted.tolist()


# ---- scores of many weighted copies of a set


def cumulative(scores, labels, weights):
    """True and false positives at every distinct threshold, descending: (n,), (n,), (B, n) -> twice (B, m)."""
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)  # equal scores count together
    positive, weights = np.asarray(labels)[order] > 0, weights[:, order]
    return (np.cumsum(weights * chosen, axis=1)[:, ends] for chosen in (positive, ~positive))


def average_precision(tp, fp):
    """Sum of the precisions, each times the step in recall: (B, m), (B, m) -> (B,); NaN where a class is missing."""
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.nan_to_num(tp / (tp + fp))  # 0 / 0 where no image counts yet: it adds nothing
        ap = (np.diff(tp, axis=1, prepend=0) * precision).sum(axis=1) / tp[:, -1]
    return np.where(fp[:, -1] > 0, ap, np.nan)


def roc_auc(tp, fp):
    """Area under the ROC curve by trapezoids: (B, m), (B, m) -> (B,); NaN where a class is missing."""
    before = np.hstack([np.zeros((len(tp), 1)), tp[:, :-1]])
    area = (np.diff(fp, axis=1, prepend=0) * (tp + before) / 2).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return area / (tp[:, -1] * fp[:, -1])


def threshold_scores(predicted, labels, weights):
    """Sen, Spe, F1 for B weightings: (n, K) of 0/1 twice, (B, n) -> three arrays (B, K), NaN as above."""
    predicted, labels = np.asarray(predicted, np.float64), np.asarray(labels, np.float64)
    tp, positives = weights @ (predicted * labels), weights @ labels
    tn, negatives = weights @ ((1 - predicted) * (1 - labels)), weights @ (1 - labels)
    with np.errstate(divide="ignore", invalid="ignore"):
        scores = tp / positives, tn / negatives, 2 * tp / (tp + positives + negatives - tn)
    return [np.where((positives > 0) & (negatives > 0), score, np.nan) for score in scores]


# ---- permutation test


def permutation_test(difference, units, permutations=PERMUTATIONS, seed=0):
    """Two-sided p of a difference of two models under swapping their predictions: (difference, p).

    `difference(swap)` takes (B, n) of 0/1, which images are swapped, to (B,); `units` (n,) names what is swapped as a
    whole. The identity counts as one of the permutations: p = (1 + those at least as far from 0) / (1 + all).
    """
    names, unit = np.unique(np.asarray(units), return_inverse=True)
    observed = float(difference(np.zeros((1, len(unit))))[0])
    extreme = 0
    for start in range(0, permutations, AT_ONCE):
        coins = torch.randint(2, (min(AT_ONCE, permutations - start), len(names)),
                              generator=generator(seed, "permutation", start))
        values = difference(coins.double().numpy()[:, unit.reshape(-1)])
        extreme += int((abs(values) >= abs(observed) - 1e-9).sum())  # equal up to rounding is equal
    return observed, (1 + extreme) / (1 + permutations)


def defined(labels):
    """Which labels have positive and negative images: (n, K) -> (K,) of bool."""
    labels = np.asarray(labels)
    return labels.any(axis=0) & ~labels.all(axis=0)


def map_difference(ours, theirs, labels):
    """-> a function for `permutation_test`: mAP of our scores (n, K) minus mAP of theirs.

    Swapped are ranks, not probabilities: AP looks at the order within one model alone, and mixing the probabilities of
    a bolder and a shyer model would drown the difference in their calibration.
    """
    kept = np.flatnonzero(defined(labels))
    ours, theirs = (stats.rankdata(scores, axis=0) for scores in (ours, theirs))

    def difference(swap):
        mine = np.hstack([1 - swap, swap])  # (B, 2n): which of both models' predictions are in our set
        values = []
        for k in kept:
            merged, truth = np.concatenate([ours[:, k], theirs[:, k]]), np.tile(labels[:, k], 2)
            tp, fp = cumulative(merged, truth, mine)
            all_tp, all_fp = cumulative(merged, truth, np.ones((1, len(truth))))  # what is not ours is theirs
            values.append(average_precision(tp, fp) - average_precision(all_tp - tp, all_fp - fp))
        return np.mean(values, axis=0)

    return difference


def f1_difference(ours, theirs, labels):
    """-> a function for `permutation_test`: macro F1(sen/spe) of our predictions (n, K) of 0/1 minus theirs."""
    kept = defined(labels)
    merged, truth = np.concatenate([ours, theirs])[:, kept], np.tile(labels, (2, 1))[:, kept]

    def difference(swap):
        mine = np.hstack([1 - swap, swap])
        ours, theirs = (harmonic_mean(*threshold_scores(merged, truth, w)[:2]).mean(axis=1) for w in (mine, 1 - mine))
        return ours - theirs

    return difference


def over_folds(differences):
    """The mean over folds of such functions; an image is swapped in all folds at once."""
    return lambda swap: np.mean([difference(swap) for difference in differences], axis=0)


# ---- intervals


def bootstrap(scores, labels, thresholds=0.5, units=None, replicates=REPLICATES, seed=0, level=0.95):
    """Intervals of the macro scores: probabilities and truth (n, K) -> {score: [low, high]}.

    Percentiles over sets of as many units (default: images) drawn with replacement. A label that a set has no
    positive or negative image of is left out of the means of this set.
    """
    names, unit = np.unique(np.arange(len(labels)) if units is None else np.asarray(units), return_inverse=True)
    drawn = torch.randint(len(names), (replicates, len(names)), generator=generator(seed, "bootstrap"))
    times = torch.zeros(drawn.shape).scatter_add_(1, drawn, torch.ones(drawn.shape))  # how often each was drawn
    weights = times.double().numpy()[:, unit.reshape(-1)]  # (B, n)
    sen, spe, f1 = threshold_scores(scores >= np.asarray(thresholds), labels, weights)
    counts = [tuple(cumulative(scores[:, k], labels[:, k], weights)) for k in range(labels.shape[1])]
    ap, auc = (np.stack([score(*count) for count in counts], axis=1) for score in (average_precision, roc_auc))
    scores = {"sen": sen, "spe": spe, "auc": auc, "f1": f1, "f1_sen_spe": harmonic_mean(sen, spe), "ap": ap}
    return {name: _interval(values, level) for name, values in scores.items()}


def _interval(values, level):
    """(B, K) with NaN -> [low, high] of the means over K; None where there is no mean at all."""
    kept = values[~np.isnan(values).all(axis=1)]
    if not len(kept):
        return None
    return np.percentile(np.nanmean(kept, axis=1), [50 * (1 - level), 50 * (1 + level)]).tolist()


# ---- comparison of two models


def compare(ours, theirs, labels, units, permutations=PERMUTATIONS, seed=0):
    """Two models with the same folds and test images -> differences, p-values and stars.

    `ours`, `theirs`: for each fold a dict of `scores` (n, K) and `predicted` (name of a threshold -> (n, K) of 0/1).
    `labels` (n, K) is the truth, `units` (n,) see `permutation_test`.
    """
    folds = list(zip(ours, theirs, strict=True))
    differences = {"ap": [map_difference(a["scores"], b["scores"], labels) for a, b in folds]}
    for name in ours[0]["predicted"]:
        differences[f"f1_sen_spe@{name}"] = [f1_difference(a["predicted"][name], b["predicted"][name], labels)
                                             for a, b in folds]
    tests = {}
    for score, per_fold in differences.items():
        difference, p = permutation_test(over_folds(per_fold), units, permutations, seed)
        tests[score] = {"difference": difference, "p": p, "stars": stars(p)}
    return {"units": len(set(units)), "permutations": permutations, "permutation": tests}
