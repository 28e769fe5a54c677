"""metrics/fld.py: against the published values, a plain version by autograd, and what it promises."""

import math
from dataclasses import astuple

import numpy as np
import pytest
import torch
from helpers import GOLDEN_METRICS

from core.errors import UserError
from metrics import fld as module
from metrics.fld import baseline_nll, fld


def normal(seed, n, d=64):
    return np.random.RandomState(seed).standard_normal((n, d))


def reference_sets(name):
    train, test, generated = normal(0, 400), normal(1, 200), normal(2, 300)
    return train, test, {"independent": generated, "shifted": 1.2 * generated + 0.5,
                         "memorised": train[:300] + 0.05 * normal(3, 300)}[name]


@pytest.fixture(scope="module")
def reference_baseline():
    """The published code drew its halves of `train` by the second permutation of RandomState(0)."""
    train, test, _ = reference_sets("independent")
    draw = np.random.RandomState(0)
    order = [draw.permutation(400) for _ in range(2)][1]
    return baseline_nll(train[order[:200]], train[order[200:]], test)


@pytest.mark.parametrize("name", ["independent", "shifted"])
def test_equals_the_published_values(name, reference_baseline):
    found = fld(*reference_sets(name), baseline=reference_baseline)
    assert found.gap == pytest.approx(GOLDEN_METRICS[name]["gap"], rel=0.01)
    assert found.fld == pytest.approx(GOLDEN_METRICS[name]["test"], rel=0.01)
    assert found.fld + found.gap == pytest.approx(GOLDEN_METRICS[name]["train"], rel=0.01)


@pytest.mark.parametrize("noise", [0, 0.05])
def test_copies_of_training_images(noise):
    """`memorised` of the reference, and exact copies."""
    train, test, _ = reference_sets("memorised")
    found = fld(train, test, train[:300] + noise * normal(3, 300))
    assert found.gap < -5000 and found.fld > 5000
    assert all(math.isfinite(value) for value in astuple(found))


def test_a_tenth_of_copies_is_seen():
    train, test, generated = reference_sets("independent")
    mixed = np.concatenate([generated[:270], train[:30]])
    assert fld(train, test, mixed).gap < 10 * fld(train, test, generated).gap < 0


def by_autograd(centres, train, test, evaluated):
    """The same fit with every number spelt out and gradients by torch."""
    mean, std = test.mean(0), test.std(0, correction=1)
    centres, train, evaluated = ((x - mean) / std for x in (centres, train, evaluated))
    m, d = centres.shape

    def log_mixture(x, log_variances):
        parts = torch.distributions.Normal(centres, (log_variances / 2).exp()[:, None]).log_prob(x[:, None])
        return parts.sum(2).logsumexp(1) - math.log(m)

    nearest = ((train[:, None] - centres) ** 2).sum(2).amin(0)
    log_variances = ((nearest + 1e-3) / d).log().requires_grad_()
    origin = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    adam, losses = torch.optim.Adam([log_variances, origin], lr=0.5), []
    while len(losses) < 50:
        around = torch.distributions.Normal(0.0, (origin / 2).exp()).log_prob(0.9 * (train - train.mean(0))).sum(1)
        loss = -torch.logaddexp(log_mixture(train, log_variances), around).mean() / d
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
        if len(losses) > 6 and max(abs(x - losses[-1]) for x in losses[-5:]) < 5e-4:
            break
    return -log_mixture(evaluated, log_variances).mean().item() / d, len(losses)


@pytest.mark.parametrize("d", [3, 20])
def test_equals_a_plain_version(d):
    train, test, generated = normal(0, 30, d), normal(1, 20, d), 1.1 * normal(2, 25, d) + 0.2
    tensors = [torch.as_tensor(x) for x in (generated, train, test)]
    found = fld(train, test, generated)
    nll_test, epochs = by_autograd(*tensors, tensors[2])
    assert 7 < epochs < 50  # the fit ended before its last epoch, by itself
    assert found.nll_test == pytest.approx(nll_test, rel=1e-6)
    assert found.nll_train == pytest.approx(by_autograd(*tensors, tensors[1])[0], rel=1e-6)
    assert found.gap == pytest.approx(100 * (found.nll_train - found.nll_test))
    assert found.fld == pytest.approx(100 * (found.nll_test - found.baseline))
    assert baseline_nll(train[:15], train[15:], test) == pytest.approx(
        by_autograd(tensors[1][:15], tensors[1][15:], tensors[2], tensors[2])[0], rel=1e-6)


@pytest.mark.parametrize("kept", [0, 10**6])
def test_blocks_change_nothing(monkeypatch, kept):
    sets = normal(0, 60, 8), normal(1, 50, 8), normal(2, 40, 8)
    whole = fld(*sets)
    monkeypatch.setattr(module, "ENTRIES", 7 * 40)  # seven training features at a time
    monkeypatch.setattr(module, "KEPT", kept)
    assert astuple(fld(*sets)) == pytest.approx(astuple(whole), rel=1e-6)


def test_many_features_are_drawn_by_the_seed(monkeypatch):
    """More centres and training features than are used at a time."""
    sets = normal(0, 90, 8), normal(1, 50, 8), normal(2, 70, 8)
    whole = fld(*sets)
    monkeypatch.setattr(module, "CENTRES", 40)
    monkeypatch.setattr(module, "BATCH", 20)
    found = fld(*sets)
    assert fld(*sets) == found
    assert fld(*sets, seed=1).nll_test != found.nll_test
    assert found.nll_test == pytest.approx(whole.nll_test, abs=0.05) and found.nll_test != whole.nll_test


def test_units_and_order_of_the_features_do_not_matter():
    train, test, generated = reference_sets("shifted")
    expected, columns = fld(train, test, generated), np.random.RandomState(5).permutation(64)
    changed = [(3 * x - 7)[:, columns] for x in (train, test, generated[::-1])]
    assert fld(*changed).gap == pytest.approx(expected.gap, rel=1e-3)
    assert fld(*changed).fld == pytest.approx(expected.fld, rel=1e-3)


def test_float32_features_suffice():
    sets = reference_sets("shifted")
    assert fld(*(x.astype(np.float32) for x in sets)).gap == pytest.approx(fld(*sets).gap, rel=1e-3)


def test_a_dimension_that_never_varies_in_the_test_set():
    """Only its constant is subtracted, so that 0.1 stays 0.1 and adds nothing to the distances."""
    sets = normal(0, 40, 8), normal(1, 30, 8), normal(2, 20, 8)
    constant = [np.hstack([x, np.full((len(x), 1), 0.1, x.dtype)]) for x in sets]
    with_noise = [np.hstack([x, np.full((len(x), 1), 5.0)]) for x in sets]
    assert all(math.isfinite(value) for value in astuple(fld(*constant)))
    assert fld(*constant) == fld(*with_noise)


def test_baseline_is_shared_and_seeded():
    sets = normal(0, 60, 8), normal(1, 50, 8), normal(2, 40, 8)
    found = fld(*sets)
    assert fld(*sets, baseline=found.baseline) == found
    assert fld(*sets, seed=1).baseline != found.baseline
    assert fld(*sets, seed=1).gap == found.gap


@pytest.mark.parametrize("sizes, named", [((3, 9, 9), "train"), ((9, 1, 9), "test"), ((9, 9, 0), "generated")])
def test_too_few(sizes, named):
    with pytest.raises(UserError, match=f"{named} features: found shape"):
        fld(*(normal(i, n, 4) for i, n in enumerate(sizes)))


def test_features_that_cannot_be_compared():
    broken = normal(1, 9, 4)
    broken[3, 2] = np.nan
    with pytest.raises(UserError, match="test features: found NaN"):
        fld(normal(0, 9, 4), broken, normal(2, 9, 4))
    with pytest.raises(UserError, match="different spaces"):
        fld(normal(0, 9, 4), normal(1, 9, 5), normal(2, 9, 4))
