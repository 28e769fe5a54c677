"""metrics/trust.py: intervals hold what they promise, swaps by hand, p-values under both hypotheses."""

import numpy as np
import pytest
from test_kid import gaussian

from metrics import blocks
from metrics.fid import fid
from metrics.kid import polynomial_mmd
from metrics.trust import bootstrap, images_needed, kid_interval, over_runs, pair_contributions, paired_permutation
from pipeline.cli import UserError


def test_interval_of_a_mean():
    """Its standard error is that of the mean, and 95 % of the intervals hold the true mean."""
    held, n = 0, 40
    for i in range(200):
        x = np.random.default_rng([1, i]).exponential(3, (n, 1))
        found = bootstrap(np.mean, x, draws=100, seed=i)
        held += found["interval"][0] <= 3 <= found["interval"][1]
        assert found["value"] == x.mean()
        assert found["standard_error"] == pytest.approx(x.std(ddof=1) / np.sqrt(n), rel=0.3)
    assert 176 <= held <= 199  # 190 expected, deviation 3


def test_interval_of_a_difference_of_two_sets():
    """Both sets vary: the variances of their means add up."""
    x, y = gaussian(0, 400, 1), 3 * gaussian(1, 100, 1)
    found = bootstrap(lambda a, b: a.mean() - b.mean(), x, y, draws=1000)
    assert found["standard_error"] == pytest.approx(np.sqrt(x.var() / 400 + y.var() / 100), rel=0.1)
    same = bootstrap(lambda a, b: a.mean() - b.mean(), x, x, draws=1000)  # not the same halves of both
    assert same["standard_error"] == pytest.approx(np.sqrt(x.var() / 200), rel=0.1)


def test_interval_of_a_score_that_depends_on_the_number_of_images():
    """FID of 30 images is far above that of 60; that must not push the interval away."""
    real, generated = gaussian(0, 60, 20), gaussian(1, 60, 20)
    found = bootstrap(fid, real, generated, draws=60)
    assert fid(real[:30], generated[:30]) > found["value"] + 4 * found["standard_error"]
    assert found["interval"][0] < found["value"] < found["interval"][1]


def test_kid_interval_is_the_interval_of_the_unbiased_estimate():
    real, generated = gaussian(0, 31), gaussian(1, 22, shift=0.5)
    plain = bootstrap(polynomial_mmd, real, generated, draws=50, seed=3)
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
def test_a_swap_turns_the_sign_of_one_contribution(monkeypatch, side):
    monkeypatch.setattr(blocks, "SIDE", side)
    real, first, second = gaussian(0, 25), gaussian(1, 20, shift=0.2), gaussian(2, 20, shift=0.4)
    contributions = pair_contributions(real, first, second)
    for i in range(10):
        swap = np.random.default_rng(i).integers(0, 2, 20)[:, None] if i else np.zeros((20, 1), int)
        a, b = np.where(swap, second, first), np.where(swap, first, second)
        expected = polynomial_mmd(real, a) - polynomial_mmd(real, b)
        assert np.mean((1 - 2 * swap[:, 0]) * contributions) == pytest.approx(expected, rel=1e-6)


def test_p_is_uniform_for_equal_generators():
    """Pairs resemble each other, as images of one label do."""
    p_values = []
    for i in range(300):
        label = gaussian([4, i], 16, 4)
        real, first, second = (label + gaussian([5, i, j], 16, 4) for j in range(3))
        p_values.append(paired_permutation(real, first, second, draws=99, seed=i)[1])
    p_values = np.array(p_values)
    for level in (0.1, 0.25, 0.5, 0.75):  # within four deviations of a share of 300
        assert abs((p_values <= level).mean() - level) < 4 * np.sqrt(level * (1 - level) / 300)
    assert p_values.min() >= 0.01


def test_p_is_small_for_a_better_generator():
    real, good, bad = gaussian(0, 60), gaussian(1, 60), gaussian(2, 60, shift=0.7)
    difference, p = paired_permutation(real, good, bad, draws=999)
    assert difference == pytest.approx(polynomial_mmd(real, good) - polynomial_mmd(real, bad), rel=1e-6)
    assert difference < 0 and p == 0.001  # none of 999 is as large
    assert paired_permutation(real, bad, good, draws=999) == pytest.approx((-difference, p))
    small = [x * 1e-3 for x in (real, good, bad)]  # a kernel that hardly varies: differences near 1e-6
    assert paired_permutation(*small, draws=999)[1] < 0.01


def test_pairs_of_one_unit_are_swapped_together():
    """Four units can be swapped in 16 ways, two of which are as extreme as what was found."""
    real, good, bad = gaussian(0, 60), gaussian(1, 60), gaussian(2, 60, shift=0.7)
    p = paired_permutation(real, good, bad, draws=2000, units=np.arange(60) % 4)[1]
    assert p == pytest.approx(2 / 16, abs=0.03)


def test_a_generator_against_itself():
    real, same = gaussian(0, 20), gaussian(1, 20)
    assert paired_permutation(real, same, same.copy(), draws=99) == (0, 1)


def test_comparison_needs_pairs():
    with pytest.raises(UserError, match="found 9 and 8 images, expected pairs"):
        paired_permutation(gaussian(0, 9), gaussian(1, 9), gaussian(2, 8))


def test_interval_needs_four_images():
    for interval in (lambda x: bootstrap(np.mean, x), lambda x: kid_interval(gaussian(0, 9), x)):
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
    assert images_needed(100, 3.0, 1.0, power=1) == 300
    errors = [kid_interval(gaussian(0, n), gaussian(1, n, shift=1), 200)["standard_error"] for n in (100, 900)]
    assert images_needed(100, errors[0], errors[1]) == pytest.approx(900, rel=0.4)
