"""metrics/significance.py: against scikit-learn, by hand, by enumeration, and where there is nothing to find."""

import itertools
import re

import numpy as np
import pytest
from conftest import ROOT
from helpers import classified_set, parse
from scipy import stats
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score, roc_auc_score

from metrics.classification import SCORES, all_scores
from metrics.significance import (
    PERMUTATIONS,
    average_precision,
    bootstrap,
    compare,
    cumulative,
    f1_difference,
    holm,
    map_difference,
    over_folds,
    permutation_test,
    roc_auc,
    stars,
)


def made(seed, n=40, labels=3, skill=1.0):
    """Labels (n, K) and the scores (n, K), of few values, of two models of that skill and of none."""
    r = np.random.default_rng(seed)
    y = (r.random((n, labels)) < 0.4).astype(float)
    a, b = (np.round(1 / (1 + np.exp(-(r.standard_normal(y.shape) + s * (2 * y - 1)))), 1) for s in (skill, 0))
    return y, a, b


# ---- weighted scores


def test_weights_are_repetitions():
    y, scores, _ = made(0)
    weights = np.random.default_rng(1).integers(0, 4, (5, 40))
    for k in range(3):
        tp, fp = cumulative(scores[:, k], y[:, k], weights)
        ap, auc = average_precision(tp, fp), roc_auc(tp, fp)
        for row, found in enumerate(zip(ap, auc, strict=True)):
            repeated = np.repeat(np.arange(40), weights[row])
            truth, said = y[repeated, k], scores[repeated, k]
            assert found == pytest.approx((average_precision_score(truth, said), roc_auc_score(truth, said)))


def test_a_missing_class_is_no_number():
    tp, fp = cumulative(np.array([0.1, 0.9]), np.array([1, 0]), np.array([[1, 0], [0, 1], [1, 1]]))
    assert np.isnan(average_precision(tp, fp)).tolist() == np.isnan(roc_auc(tp, fp)).tolist() == [True, True, False]


# ---- permutation test


def swapped(a, b, swap):
    return np.where(swap[:, None], b, a), np.where(swap[:, None], a, b)


def macro(scores, y, key):
    return all_scores(scores, y, range(y.shape[1]))["macro"][key]


def test_differences_under_swapping_are_those_of_the_swapped_sets():
    y, a, b = made(2)
    y[:, 1] = 0  # a label that cannot be scored
    swap = np.random.default_rng(0).integers(0, 2, (6, 40))
    swap[0] = 0
    ap, f1 = map_difference(a, b, y)(swap), f1_difference(a >= 0.5, b >= 0.5, y)(swap)
    ranked = [rankdata(scores, axis=0) for scores in (a, b)]
    for i, row in enumerate(swap.astype(bool)):
        ours, theirs = swapped(*ranked, row)
        assert ap[i] == pytest.approx(macro(ours, y, "ap") - macro(theirs, y, "ap"))
        ours, theirs = swapped(a, b, row)
        assert f1[i] == pytest.approx(macro(ours, y, "f1_sen_spe") - macro(theirs, y, "f1_sen_spe"))


def test_p_is_the_share_of_all_swaps():
    """Eight units: of the 256 ways to swap them, as many as enumeration finds are as far from 0."""
    y, a, b = made(3, n=16, skill=0.4)
    units = np.repeat(np.arange(8), 2)
    swaps = np.array(list(itertools.product((0, 1), repeat=8)))[:, units]
    difference = map_difference(a, b, y)
    values = difference(swaps)
    exact = np.mean(abs(values) >= abs(values[0]) - 1e-9)
    found, p = permutation_test(difference, units, 4000, seed=1)
    assert found == pytest.approx(values[0]) and 0.02 < exact < 0.98
    assert abs(p - exact) < 4 * np.sqrt(exact * (1 - exact) / 4000)


def test_p_by_hand():
    """Always as far from 0: p = 1. Only the real one is: p = 1 / (1 + all)."""
    assert permutation_test(lambda swap: np.where(swap[:, 0] > 0, -2.0, 2.0), [0], 99) == (2.0, 1.0)
    units = np.arange(60)
    assert permutation_test(lambda swap: (60 - 2 * swap.sum(axis=1)) / 60.0, units, 999)[1] == 1 / 1000


def test_a_better_model_is_found_and_a_seed_decides():
    y, a, b = made(4, n=200)
    difference = over_folds([map_difference(a, b, y), map_difference(a, b, y)])
    found, p = permutation_test(difference, range(200), 499)
    assert found > 0.1 and p == 1 / 500
    weak = map_difference(*made(5, n=30, skill=0.2)[1:], made(5, n=30, skill=0.2)[0])
    assert permutation_test(weak, range(30), 99, seed=3) == permutation_test(weak, range(30), 99, seed=3)
    assert len({permutation_test(weak, range(30), 99, seed=s)[1] for s in range(8)}) > 1


def test_uniform_where_there_is_no_difference():
    """Two models of the same skill, images of one unit alike: of 200 p-values about 5 % are below .05."""
    units, p = np.repeat(np.arange(15), 2), []
    for seed in range(200):
        r = np.random.default_rng([seed, 9])
        y = np.tile(r.random((15, 2)) < 0.5, (1, 1)).repeat(2, axis=0).astype(float)
        if not (y.any(0) & ~y.all(0)).all():
            continue
        a, b = (y + r.standard_normal((15, 2)).repeat(2, axis=0) + 0.1 * r.standard_normal(y.shape) for _ in range(2))
        p.append(permutation_test(map_difference(a, b, y), units, 199, seed)[1])
    assert len(p) > 190 and stats.kstest(p, "uniform").pvalue > 0.01


# ---- several comparisons


def test_holm_by_hand():
    """3 · .01, 2 · .03, 1 · .04, in order and never falling: .03, .06, .06."""
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.5, 0.6]) == pytest.approx([1, 1])
    assert holm([0.02]) == [0.02] and holm([]) == []


def test_stars_are_those_of_the_paper():
    assert [stars(p) for p in (None, 0.2, 0.05, 0.049, 0.0099, 0.00099, 0.000099)] == [
        "", "", "", "*", "**", "***", "****"]


# ---- intervals


def test_intervals_are_percentiles_of_resampled_sets():
    """Drawn and scored one by one, the same intervals come out up to what 100 drawings leave open."""
    scores, y = classified_set()
    scores, y = scores[:, 6:8], y[:, 6:8]
    found = bootstrap(scores, y, replicates=600, seed=0)
    r = np.random.default_rng(0)
    sets = [r.integers(0, 300, 300) for _ in range(100)]
    every = [all_scores(scores[i], y[i], range(2))["macro"] for i in sets]
    for key in SCORES:
        expected = np.percentile([row[key] for row in every], [2.5, 97.5])
        assert found[key] == pytest.approx(expected, abs=0.4 * np.ptp(expected)), key
        assert found[key][0] < macro(scores, y, key) < found[key][1]


def test_patients_are_drawn_whole():
    """Every image ten times over is no more knowledge; the patients say so."""
    scores, y = (array[:60, 6:9].repeat(10, axis=0) for array in classified_set())
    wide = bootstrap(scores, y, units=np.arange(60).repeat(10))["auc"]
    narrow = bootstrap(scores, y)["auc"]
    assert np.ptp(wide) > 2 * np.ptp(narrow)


def test_intervals_skip_what_cannot_be_scored():
    y = np.array([[0, 1], [0, 0], [0, 1], [0, 0]])
    found = bootstrap(np.array([[0.3, 0.9], [0.6, 0.1], [0.2, 0.8], [0.1, 0.4]]), y, replicates=50)
    assert found["ap"] == found["auc"] == [1, 1]  # of the second label, wherever it has both
    assert bootstrap(np.array([[0.3], [0.6]]), np.array([[0], [0]]))["ap"] is None


def test_the_documented_number_of_permutations_is_the_default():
    documented = re.search(r"swapped at random, in all folds at once, ([\d,]+) times",
                           (ROOT / "docs" / "FIDELITY.md").read_text(encoding="utf-8"))
    flags = parse("classify", ["--data-path", "data"])[1]
    assert int(documented[1].replace(",", "")) == PERMUTATIONS == flags["permutations"]


def test_compare():
    y, a, b = made(6, n=60)
    sides = [[{"scores": s, "predicted": {"0.5": s >= 0.5}} for _ in range(2)] for s in (a, b)]
    found = compare(*sides, y, range(60), 199)
    assert found["units"] == 60 and set(found["permutation"]) == {"ap", "f1_sen_spe@0.5"}
    assert found["permutation"]["ap"]["difference"] == pytest.approx(macro(a, y, "ap") - macro(b, y, "ap"))
    assert found["permutation"]["ap"]["stars"] == stars(found["permutation"]["ap"]["p"]) == "**"
    same = compare(sides[0], sides[0], y, range(60), 99)
    assert same["permutation"]["ap"] == {"difference": 0, "p": 1, "stars": ""}


def test_calibration_does_not_matter_for_map():
    """AP looks at the order within one model: a bolder or shyer model has the same p."""
    draw = np.random.default_rng(3)
    labels = (draw.random((60, 2)) < 0.4).astype(int)
    theirs, ours = (1 / (1 + np.exp(-(k * labels + draw.standard_normal((60, 2))))) for k in (0.5, 1.5))
    found = [permutation_test(map_difference(scores, theirs, labels), np.arange(60), 500)
             for scores in (ours, 0.3 * ours, ours**5)]
    assert found[1] == found[2] == pytest.approx(found[0]) and found[0][1] < 0.2
