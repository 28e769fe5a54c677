"""metrics/uncertainty.py: intervals hold what they promise, swaps by hand, p-values under both hypotheses."""

import numpy as np
import pytest
from helpers import gaussian

from core.errors import UserError
from metrics import blocks
from metrics.fid import fid
from metrics.kid import polynomial_mmd
from metrics.uncertainty import images_needed, kid_interval, over_runs, paired_difference, subsample_interval


def test_interval_of_a_mean():
    """Its standard error is that of the mean, and 95 % of the intervals hold the true mean."""
    held, n = 0, 40
    for i in range(200):
        x = np.random.default_rng([1, i]).exponential(3, (n, 1))
        found = subsample_interval(np.mean, x, draws=100, seed=i)
        held += found["interval"][0] <= 3 <= found["interval"][1]
        assert found["value"] == x.mean()
        assert found["standard_error"] == pytest.approx(x.std(ddof=1) / np.sqrt(n), rel=0.3)
    assert 176 <= held <= 199  # 190 expected, standard deviation 3


def test_interval_of_a_difference_of_two_sets():
    """Both sets vary: the variances of their means add up."""
    x, y = gaussian(0, 400, 1), 3 * gaussian(1, 100, 1)
    found = subsample_interval(lambda a, b: a.mean() - b.mean(), x, y, draws=1000)
    assert found["standard_error"] == pytest.approx(np.sqrt(x.var() / 400 + y.var() / 100), rel=0.1)
    same = subsample_interval(lambda a, b: a.mean() - b.mean(), x, x, draws=1000)  # not the same halves of both
    assert same["standard_error"] == pytest.approx(np.sqrt(x.var() / 200), rel=0.1)


def test_interval_of_a_score_that_depends_on_the_number_of_images():
    """FID of 30 images is far above that of 60; that must not push the interval away."""
    real, generated = gaussian(0, 60, 20), gaussian(1, 60, 20)
    found = subsample_interval(fid, real, generated, draws=60)
    assert fid(real[:30], generated[:30]) > found["value"] + 4 * found["standard_error"]
    assert found["interval"][0] < found["value"] < found["interval"][1]


def test_kid_interval_is_the_interval_of_the_unbiased_estimate():
    real, generated = gaussian(0, 31), gaussian(1, 22, shift=0.5)
    plain = subsample_interval(polynomial_mmd, real, generated, draws=50, seed=3)
    fast = kid_interval(real, generated, draws=50, seed=3)
    assert fast["value"] == pytest.approx(plain["value"])
    assert fast["interval"] == pytest.approx(plain["interval"])
    assert fast["standard_error"] == pytest.approx(plain["standard_error"])


def test_kid_interval_holds_the_truth():
    """N(0, 1) against N(½, 1) in d = 4 dimensions. With k = (xᵀy / d + 1)³, the squared MMD is

    3 |Δ₁|² / d + 3 |Δ₂|² / d² + |Δ₃|² / d³, where Δ are the differences of first, second and third moments.
    """
    d, one = 4, np.eye(4)
    shift = np.full(d, 0.5)
    third = np.einsum("i,j,k", shift, shift, shift) + sum(
        np.einsum(f"{pair},{single}->ijk", one, shift) for pair, single in (("ij", "k"), ("ik", "j"), ("jk", "i")))
    truth = (3 * (shift**2).sum() / d + 3 * (np.outer(shift, shift) ** 2).sum() / d**2 + (third**2).sum() / d**3)
    held, values, errors = 0, [], []
    for i in range(150):
        x, y = gaussian([2, i], 150, d), gaussian([3, i], 150, d, 0.5)
        found = kid_interval(x, y, draws=100, seed=i)
        held += found["interval"][0] <= truth <= found["interval"][1]
        values.append(found["value"])
        errors.append(found["standard_error"])
    assert 131 <= held <= 149
    assert np.mean(values) == pytest.approx(truth, abs=4 * np.std(values) / np.sqrt(150))
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.2)


def test_intervals_are_a_function_of_the_seed():
    x, y = gaussian(0, 30), gaussian(1, 30)
    assert kid_interval(x, y, 20, seed=1) == kid_interval(x, y, 20, seed=1)
    assert kid_interval(x, y, 20, seed=1)["interval"] != kid_interval(x, y, 20, seed=2)["interval"]


@pytest.mark.parametrize("side", [2048, 7])
def test_the_difference_is_that_of_both_estimates(monkeypatch, side):
    monkeypatch.setattr(blocks, "SIDE", side)
    real, first, second = gaussian(0, 25), gaussian(1, 20, shift=0.2), gaussian(2, 20, shift=0.4)
    expected = polynomial_mmd(real, first) - polynomial_mmd(real, second)
    assert paired_difference(real, first, second)[0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("shift, most", [(0, 12), (0.5, 20), (1, 20)])
def test_equally_good_generators_are_seldom_told_apart(shift, most):
    """Also where they differ: equally far from the real images, on opposite sides. 10 of 200 expected at p = 0.05."""
    found = 0
    for i in range(200):
        label = 0.5 * gaussian([4, i], 60, 4)
        first, second = (label + gaussian([5, i, j], 60, 4) + (-1) ** j * shift for j in range(2))
        real = np.sqrt(1.25) * gaussian([6, i], 60, 4)
        found += paired_difference(real, first, second)[1] < 0.05
    assert found <= most


def test_a_better_generator_is_found():
    real, good, bad = gaussian(0, 60), gaussian(1, 60), gaussian(2, 60, shift=0.7)
    difference, p, low, high = paired_difference(real, good, bad)
    assert low < difference < high < 0 and p < 0.01
    assert paired_difference(real, bad, good) == pytest.approx((-difference, p, -high, -low))
    wins = sum(paired_difference(gaussian([7, i], 80), gaussian([8, i], 80), gaussian([9, i], 80, shift=0.5))[1] < 0.05
               for i in range(40))
    assert wins > 30


@pytest.mark.parametrize("shift", [0.2, 0.3, 0.4])
def test_the_interval_leaves_out_zero_where_p_is_below_5_percent(shift):
    """One and the same normal distribution: p = 0.05 exactly where an end of the interval is 0."""
    _, p, low, high = paired_difference(gaussian(0, 40), gaussian(1, 40), gaussian(2, 40, shift=shift))
    assert (low > 0 or high < 0) == (p < 0.05)


def test_a_generator_against_itself():
    real, same = gaussian(0, 20), gaussian(1, 20)
    assert paired_difference(real, same, same.copy()) == (0, 1, 0, 0)


def test_comparison_needs_pairs():
    with pytest.raises(UserError, match="found 9 and 8 images, expected pairs"):
        paired_difference(gaussian(0, 9), gaussian(1, 9), gaussian(2, 8))


def test_interval_needs_four_images():
    for interval in (lambda x: subsample_interval(np.mean, x), lambda x: kid_interval(gaussian(0, 9), x)):
        with pytest.raises(UserError, match="at least 4"):
            interval(gaussian(1, 3))


def test_over_runs_by_hand():
    """1, 2, 3, 4: variance 5/3, standard error √(5/12), t of 3 degrees of freedom 3.182446."""
    found = over_runs([1, 2, 3, 4])
    assert (found.n, found.mean, found.std) == (4, 2.5, pytest.approx((5 / 3) ** 0.5))
    assert found.error == pytest.approx((5 / 12) ** 0.5)
    assert (found.low, found.high) == pytest.approx((2.5 - 2.054260, 2.5 + 2.054260))


def test_one_run_has_no_spread():
    found = over_runs([7.0])
    assert (found.mean, found.std, found.error, found.low, found.high) == (7, None, None, None, None)


def test_images_needed():
    assert images_needed(100, 3.0, 1.0) == 900
    errors = [kid_interval(gaussian(0, n), gaussian(1, n, shift=1), 200)["standard_error"] for n in (100, 900)]
    assert images_needed(100, errors[0], errors[1]) == pytest.approx(900, rel=0.4)
