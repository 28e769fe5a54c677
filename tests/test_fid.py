"""metrics/fid.py: by hand, against torchmetrics, and by the definition with a matrix root."""

import numpy as np
import pytest
import scipy.linalg
import torch
from helpers import PassThrough, gaussian
from torchmetrics.image.fid import FrechetInceptionDistance

from core.errors import UserError
from metrics import blocks
from metrics.fid import fid


def test_by_hand():
    """One dimension: (μ₁ − μ₂)² + (σ₁ − σ₂)². Means 1 and 5, variances (dividing by n − 1) 1 and 4."""
    assert fid([[0.0], [1.0], [2.0]], [[3.0], [5.0], [7.0]]) == pytest.approx(16 + 1)


@pytest.mark.parametrize("n", [500, 40])
def test_equals_torchmetrics(n):
    real, generated = gaussian(0, n), 1.3 * gaussian(1, n, shift=0.3) ** 2
    metric = FrechetInceptionDistance(feature=PassThrough())
    metric.update(torch.as_tensor(real), real=True)
    metric.update(torch.as_tensor(generated), real=False)
    assert fid(real, generated) == pytest.approx(metric.compute().item(), rel=1e-5)


@pytest.mark.parametrize("sizes", [(30, 30), (10, 30), (30, 10), (10, 12)])
def test_fewer_images_than_dimensions(sizes):
    """Singular covariances: the root of Σ₁^½ Σ₂ Σ₁^½, which is symmetric. Where n ≤ d another factor is used."""
    real, generated = (gaussian(i, n, 20, shift=i) for i, n in enumerate(sizes))
    first, second = (np.cov(x.T.astype(np.float64)) for x in (real, generated))
    values, axes = scipy.linalg.eigh(first)
    root = axes * np.sqrt(values.clip(0)) @ axes.T
    overlap = np.sqrt(scipy.linalg.eigvalsh(root @ second @ root).clip(0)).sum()
    means = np.square(real.mean(0, dtype=float) - generated.mean(0, dtype=float)).sum()
    assert fid(real, generated) == pytest.approx(means + np.trace(first + second) - 2 * overlap, rel=1e-5)


@pytest.mark.parametrize("n", [50, 5])
def test_nothing_lies_between_a_set_and_itself(n):
    real = gaussian(0, n) * 100
    assert fid(real, real[::-1]) == pytest.approx(0, abs=1e-8)


def test_rotations_and_order_do_not_matter():
    real, generated = gaussian(0, 60), gaussian(1, 50, shift=1)
    turn = np.linalg.qr(gaussian(2, 8).astype(np.float64))[0]
    assert fid(real @ turn, generated[::-1] @ turn) == pytest.approx(fid(real, generated), rel=1e-9)
    assert fid(generated, real) == pytest.approx(fid(real, generated), rel=1e-9)


def test_blocks_change_nothing(monkeypatch):
    real, generated = gaussian(0, 60), gaussian(1, 50, shift=1)
    whole = fid(real, generated)
    monkeypatch.setattr(blocks, "SIDE", 7)
    assert fid(real, generated) == pytest.approx(whole, rel=1e-12)


def test_one_image_has_no_covariance():
    with pytest.raises(UserError, match="generated features: found shape"):
        fid(gaussian(0, 9), gaussian(1, 1))
