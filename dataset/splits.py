"""Which images train, validate and test: by patient, every label spread as evenly as its patients allow.

Iterative stratification (Sechidis, Tsoumakas and Vlahavas, "On the stratification of multi-label data", ECML
PKDD 2011, algorithm 1), with a patient in place of an example. Written here because scikit-learn stratifies
groups by a single label only (StratifiedGroupKFold).
"""

import numpy as np

from core.errors import UserError

TEST = -1
FOLDS = 5


def split_by_patient(labels, patients, folds, test_fraction, seed):
    """labels (n, K) of 0/1, patients (n,) names -> (n,) integers: TEST, or the fold that validates on it.

    A held-out test set of about `test_fraction` (none where it is 0) and `folds` equal folds of the rest; no patient is
    in two of them and none is empty. A function of `seed` and of the set of patients, not of the order of the rows.
    Raises UserError if there are fewer patients than subsets.
    """
    names, owner = np.unique(np.asarray(patients), return_inverse=True)
    shares = np.array([test_fraction] * bool(test_fraction) + [(1 - test_fraction) / folds] * folds)
    if len(names) < len(shares):
        raise UserError(
            f"--folds {folds}: found {len(names)} patient(s), expected at least {len(shares)} (one for "
            f"{'the test set and one for ' * bool(test_fraction)}each fold); give fewer folds or more patients"
        )
    # The last column counts images. It is the commonest "label", so it comes last and deals out the patients
    # who have no label at all.
    counts = np.zeros((len(names), np.shape(labels)[1] + 1))
    np.add.at(counts, owner, np.column_stack([labels, np.ones(len(owner))]))
    return _deal(counts, shares, np.random.default_rng(seed))[owner] - bool(test_fraction)


def keep_published(labels, groups, published, folds, seed):
    """Masks of the split that the authors made; published (n,) of "train", "val", "test".

    Their validation set is that of fold 0. With a number of `folds`, or where they have none, all that is not their
    test set is dealt into folds by `groups` (n,), names of patients. Returns {"train_0": (n,) bool, ..., "test": …}.
    """
    test = published == "test"
    if folds is None and (published == "val").any():
        return {"train_0": published == "train", "val_0": published == "val", "test": test}
    fold = np.full(len(test), TEST)
    fold[~test] = split_by_patient(labels[~test], groups[~test], folds or FOLDS, 0, seed)
    return masks(fold)


def deal(labels, groups, folds, test_fraction, seed):
    """Masks of a split of our own, by `groups` (n,), names of patients."""
    return masks(split_by_patient(labels, groups, folds or FOLDS, test_fraction, seed))


def masks(fold):
    """(n,) of TEST or a fold -> {"test": (n,) bool, "train_0": …, "val_0": …, …}."""
    splits = {"test": fold == TEST}
    for k in range(fold.max() + 1):
        splits |= {f"train_{k}": (fold != TEST) & (fold != k), f"val_{k}": fold == k}
    return splits


def _deal(counts, shares, rng):
    """counts (patients, K + 1), shares (subsets,) -> the subset of each patient."""
    need = np.outer(shares, counts.sum(axis=0))  # how many of each label each subset still lacks
    order = rng.permutation(len(counts))
    order = order[np.argsort(-counts[order, -1], kind="stable")]  # many images first: later ones even it out
    subset = np.zeros(len(counts), int)
    waiting = np.ones(len(counts), bool)
    empty = np.ones(len(shares), bool)
    while waiting.any():
        left = counts[waiting].sum(axis=0)
        rarest = np.argmin(np.where(left > 0, left, np.inf))
        for patient in order[waiting[order] & (counts[order, rarest] > 0)]:
            # The last patients are kept for the subsets that have none.
            candidates = np.flatnonzero(empty | (waiting.sum() > empty.sum()))
            chosen = _neediest(candidates, need[:, rarest], need[:, -1], rng)
            need[chosen] -= counts[patient]
            subset[patient], waiting[patient], empty[chosen] = chosen, False, False
    return subset


def _neediest(candidates, need, need_of_images, rng):
    """The candidate that lacks most of the label; among equals most images; among equals any."""
    keys = (rng.random(len(candidates)), need_of_images[candidates].round(6), need[candidates].round(6))
    return candidates[np.lexsort(keys)[-1]]
