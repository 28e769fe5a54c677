"""metrics/prdc.py: against loops over all pairs, by hand, and where rounding could decide."""

import tracemalloc
from dataclasses import astuple

import numpy as np
import pytest
from helpers import gaussian

from core.errors import UserError
from metrics import blocks
from metrics.prdc import prdc


def by_loops(real, generated, k):
    """The four scores word by word, with distances taken one by one."""
    def radius(x, i):
        return sorted(np.linalg.norm(x[i] - other) for j, other in enumerate(x) if j != i)[k - 1]

    reals, made = range(len(real)), range(len(generated))
    around_real, around = [radius(real, i) for i in reals], [radius(generated, j) for j in made]
    between = np.array([[np.linalg.norm(r - g) for g in generated] for r in real])
    precision = np.mean([any(between[i, j] <= around_real[i] for i in reals) for j in made])
    recall = np.mean([any(between[i, j] <= around[j] for j in made) for i in reals])
    density = sum(between[i, j] <= around_real[i] for i in reals for j in made)
    coverage = np.mean([any(between[i, j] <= around_real[i] for j in made) for i in reals])
    return precision, recall, density / (k * len(generated)), coverage


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("shift", [0, 0.7, 2])
@pytest.mark.parametrize("side", [2048, 11])
def test_equals_loops(monkeypatch, k, shift, side):
    monkeypatch.setattr(blocks, "SIDE", side)
    real, generated = gaussian(0, 40, 3), 0.7 * gaussian(1, 30, 3, shift)
    assert astuple(prdc(real, generated, k)) == pytest.approx(by_loops(real, generated, k), rel=1e-12)


def test_by_hand():
    """k = 1. Real 0, 1, 10, 12: balls [-1, 1], [0, 2], [8, 12], [10, 14]. Generated 0.5, 3, 11: balls to 3, .5, 3.

    0.5 is in two real balls, 3 in none, 11 in two: density 4/3, precision 2/3. All real balls have one: coverage 1.
    Generated balls [-2, 3], [.5, 5.5], [3, 19] hold 0, 1, 10, 12: recall 1.
    """
    found = prdc(np.array([[0.0], [1], [10], [12]]), np.array([[0.5], [3], [11]]), 1)
    assert astuple(found) == pytest.approx((2 / 3, 1, 4 / 3, 1))


@pytest.mark.parametrize("side", [2048, 11, 5])
def test_copies_lie_on_the_surface_of_balls(monkeypatch, side):
    """A copy is in its original's ball and on the surface of others, where 1000 leaves distances of few digits."""
    monkeypatch.setattr(blocks, "SIDE", side)
    real = gaussian(0, 50, 6) + 1000
    assert astuple(prdc(real, real.copy())) == pytest.approx((1, 1, 6 / 5, 1))  # itself and, on average, 5 others


def test_what_each_one_sees():
    real = np.concatenate([gaussian(0, 60, 4), gaussian(1, 60, 4, 50)])  # two kinds of image
    one_kind = prdc(real, gaussian(2, 60, 4))
    assert one_kind.precision > 0.8 and one_kind.recall <= 0.5 and one_kind.coverage <= 0.5
    nonsense = prdc(real, gaussian(2, 60, 4, 500))
    assert astuple(nonsense) == (0, 0, 0, 0)


def test_memory_is_that_of_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "SIDE", 128)
    real, generated = gaussian(0, 1500, 4), gaussian(1, 1500, 4)
    tracemalloc.start()
    prdc(real, generated)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6  # all pairs at once: 18 MB


def test_units_and_order_do_not_matter():
    real, generated = gaussian(0, 40, 3), gaussian(1, 30, 3, 0.7)
    assert prdc(9 - 5 * real, 9 - 5 * generated[::-1]) == prdc(real, generated)


def test_too_few_for_k_neighbours():
    with pytest.raises(UserError, match="generated features: found shape"):
        prdc(gaussian(0, 9), gaussian(1, 5))
