"""metrics/kid.py: against torchmetrics, by hand, and in expectation."""

import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers import PassThrough, gaussian
from torch_fidelity.metric_kid import kid_features_to_metric
from torchmetrics.image import kid as torchmetrics_kid

from core.errors import UserError
from metrics import blocks
from metrics.kid import draw_subsets, kid, polynomial_mmd


def test_by_hand():
    """One dimension, k(x, y) = (xy + 1)³: x = (0, 1), y = (1, 2).

    k(0, 1) = 1; k(1, 2) = 27; across: k(0, 1), k(0, 2), k(1, 1), k(1, 2) = 1, 1, 8, 27, mean 9.25.
    """
    assert polynomial_mmd([[0.0], [1.0]], [[1.0], [2.0]]) == pytest.approx(1 + 27 - 2 * 9.25)


def test_the_kernel_divides_by_the_dimension():
    """x·y / d of the columns above is unchanged when every column is repeated."""
    x, y = np.array([[0.0], [1.0]]).repeat(5, axis=1), np.array([[1.0], [2.0]]).repeat(5, axis=1)
    assert polynomial_mmd(x, y) == pytest.approx(1 + 27 - 2 * 9.25)


def test_samples_of_two_sizes():
    """x = (0, 1, 2), y = (1, 2). Within x: k = 1 (0-1), 1 (0-2), 27 (1-2). Across: 1, 1, 8, 27, 27, 125."""
    assert polynomial_mmd([[0.0], [1.0], [2.0]], [[1.0], [2.0]]) == pytest.approx(29 / 3 + 27 - 2 * 189 / 6)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance`")
def test_equals_torchmetrics(monkeypatch):
    """The same features, the same subsets: KernelInceptionDistance gives the same mean and standard deviation."""
    real, generated = gaussian(0, 40), gaussian(1, 30, shift=0.3)
    drawn = [torch.as_tensor(i) for pair in draw_subsets(40, 30, 12, 20, seed=5) for i in pair]
    metric = torchmetrics_kid.KernelInceptionDistance(feature=PassThrough(), subsets=20, subset_size=12)
    metric.update(torch.as_tensor(real), real=True)
    metric.update(torch.as_tensor(generated), real=False)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randperm", lambda n: drawn.pop(0))
        mean, std = metric.compute()
    assert not drawn
    assert kid(real, generated, 12, 20, seed=5) == pytest.approx((mean.item(), std.item()), rel=2e-5)


def test_unbiased():
    """Over many pairs of samples of one distribution the estimates average to zero."""
    values = np.array([polynomial_mmd(gaussian([i, 0], 6, 4), gaussian([i, 1], 6, 4)) for i in range(3000)])
    error = values.std() / np.sqrt(len(values))
    assert abs(values.mean()) < 3 * error
    assert error < 0.03  # so that a bias would be seen: with the diagonal in the means it is 3.2


def test_larger_shift_scores_higher():
    real = gaussian(0, 200)
    values = [kid(real, gaussian(1, 200, shift=shift), 50)[0] for shift in (0, 0.25, 0.5, 1, 2)]
    assert values == sorted(values)
    assert abs(values[0]) < 0.02 < 0.1 < values[1]


def test_subsets_are_a_function_of_the_seed():
    real, generated = gaussian(0, 50), gaussian(1, 50)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = kid(real, generated, 10, seed=0)
    assert torch.equal(torch.get_rng_state(), before)  # the global stream is neither used nor moved
    torch.manual_seed(2)
    assert kid(real, generated, 10, seed=0) == first
    assert kid(real, generated, 10, seed=1) != first


def test_subsets_hold_different_images():
    pairs = list(draw_subsets(9, 7, 5, subsets=200, seed=0))
    for real, generated in pairs:
        assert len(set(real)) == len(set(generated)) == 5
    assert {i for real, _ in pairs for i in real} == set(range(9))
    assert {i for _, generated in pairs for i in generated} == set(range(7))


def test_large_features_lose_nothing():
    """Values near 100 make kernels near 1e12: in float32 the difference of their means is 4 % off."""
    x, y = gaussian(0, 20) + 100, gaussian(1, 20) + 100
    exact = float(_exact_mmd(x, y))
    assert polynomial_mmd(x, y) == pytest.approx(exact, rel=1e-6)


def _exact_mmd(x, y):
    x, y = ([[Fraction(float(v)) for v in row] for row in a] for a in (x, y))

    def total(a, b, skip):
        return sum((sum(p * q for p, q in zip(u, v, strict=True)) / 8 + 1) ** 3
                   for i, u in enumerate(a) for j, v in enumerate(b) if not (skip and i == j))

    return total(x, x, True) / 380 + total(y, y, True) / 380 - 2 * total(x, y, False) / 400


@pytest.mark.parametrize("size, remedy", [(1, "generate 8 or more"), (21, "--subset-size 20")])
def test_impossible_subset_size(size, remedy):
    with pytest.raises(UserError) as error:
        kid(gaussian(0, 30), gaussian(1, 20), size)
    message = str(error.value)
    assert remedy in message and f"subsets of {size}" in message and "30 real, 20 generated" in message
    assert "\n" not in message


def test_equals_torch_fidelity():
    """One subset that holds every image: its order is chance, its value is not."""
    real, generated = gaussian(0, 40), gaussian(1, 40, shift=0.3)
    found = kid_features_to_metric(torch.as_tensor(real).double(), torch.as_tensor(generated).double(), kid_subsets=1,
                                   kid_subset_size=40, rng_seed=0, verbose=False)
    assert polynomial_mmd(real, generated) == pytest.approx(found["kernel_inception_distance_mean"], rel=1e-10)


@pytest.mark.parametrize("size, subsets", [(5, 3), (12, 20)])
def test_both_ways_to_the_same_value(size, subsets):
    """Few pairs in any subset: each subset has its own kernel; else one for all."""
    real, generated = gaussian(0, 40), gaussian(1, 30, shift=0.3)
    values = [polynomial_mmd(real[i], generated[j]) for i, j in draw_subsets(40, 30, size, subsets, 0)]
    assert kid(real, generated, size, subsets) == pytest.approx((np.mean(values), np.std(values)), rel=1e-10)


def test_blocks_change_nothing(monkeypatch):
    real, generated = gaussian(0, 40), gaussian(1, 30, shift=0.3)
    whole = kid(real, generated, 12)
    monkeypatch.setattr(blocks, "SIDE", 7)
    assert kid(real, generated, 12) == pytest.approx(whole, rel=1e-10)
    assert polynomial_mmd([[0.0], [1.0], [2.0]], [[1.0], [2.0]]) == pytest.approx(29 / 3 + 27 - 2 * 189 / 6)


@pytest.mark.parametrize("size, subsets", [(1000, 1), (1000, 5)])
def test_memory_is_that_of_blocks(monkeypatch, size, subsets):
    monkeypatch.setattr(blocks, "SIDE", 128)
    real, generated = gaussian(0, 2000), gaussian(1, 2000)
    tracemalloc.start()
    kid(real, generated, size, subsets)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6  # the kernel of one subset at once: 8 MB
