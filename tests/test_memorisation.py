"""metrics/memorisation.py: by hand, by brute force, and in expectation where nothing is memorised."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from helpers import gaussian, noise_images, save_images
from PIL import Image

from core.errors import UserError
from evaluation.evaluation import pixel_hashes
from evaluation.pictures import closest
from metrics import memorisation as module
from metrics.memorisation import (
    Pair,
    authentic,
    close_share,
    closest_pairs,
    exact_copies,
    memorisation,
    nearest,
    nearest_other,
)


def all_distances(a, b):
    return np.linalg.norm(a[:, None].astype(np.float64) - b[None], axis=2)


# ---- nearest neighbours

def test_nearest_by_brute_force(monkeypatch):
    monkeypatch.setattr(module, "ROWS", 7)  # several blocks, the last one shorter
    a, b = gaussian(0, 40), gaussian(1, 30)
    expected = all_distances(a, b)
    index, gap = nearest(a, b)
    assert np.array_equal(index, expected.argmin(axis=1))
    assert gap == pytest.approx(expected.min(axis=1))

    among = all_distances(a, a)
    np.fill_diagonal(among, np.inf)
    assert nearest_other(a) == pytest.approx(among.min(axis=1))


def test_copies_have_distance_zero():
    """Also far from the origin, where |x|² − 2xy + |y|² leaves rounding of 1e-3; and an image that is there thrice."""
    real = gaussian(0, 50, 768) + 300
    real[[7, 20]] = real[3]
    assert not nearest(real, real)[1].any()
    own = nearest_other(real)
    assert np.flatnonzero(own == 0).tolist() == [3, 7, 20]


# ---- shares with an expected value

def test_close_share_by_hand():
    """39 test images at 1, 2, ... 39: k = ⌊0.05 · 40⌋ = 2, the threshold 2, the expected share 2 / 40.

    Of four samples at 1.5, 1.9, 2 and 50 two are below it.
    """
    found = close_share([1.5, 50, 1.9, 2], np.arange(39, 0, -1))
    assert (found.value, found.expected) == (0.5, 0.05)
    few = close_share([0.5, 9], [1, 2, 3])  # of three test images the threshold is the smallest
    assert (few.value, few.expected) == (0.5, 0.25)
    # One sample below the smaller of two distances: each of three values is the smallest equally often.
    assert close_share([0], [1, 2]).p == pytest.approx(1 / 3)
    assert close_share([9], [1, 2]).p == 1


def test_without_memorisation_the_share_is_as_expected():
    """Three sets of one distribution, drawn 400 times: the average, and how often the range holds the value."""
    shares = []
    for i in range(400):
        train, test, generated = (gaussian([i, j], n, 3) for j, n in enumerate((60, 39, 50)))
        shares.append(close_share(all_distances(generated, train).min(1), all_distances(test, train).min(1)))
    values = np.array([share.value for share in shares])
    assert abs(values.mean() - shares[0].expected) < 4 * values.std() / 20
    assert 0.92 < np.mean([share.low <= share.value <= share.high for share in shares]) < 0.985
    assert 0.02 < np.mean([share.p < 0.05 for share in shares]) < 0.085


def test_copies_are_seen():
    train, test = gaussian(0, 300), gaussian(1, 200)
    copies = train[:200] + 0.1 * gaussian(2, 200)
    few = np.concatenate([copies[:30], gaussian(3, 170)])
    copied, mixed, real = (memorisation(train, test, x) for x in (copies, few, gaussian(4, 200)))
    assert copied.close.value > 0.99 and copied.close.p < 1e-6
    assert copied.authentic_percent < 1 < 40 < real.authentic_percent
    assert mixed.close.p < 1e-4 < 0.05 < real.close.p  # 15 % of copies


# ---- AuthPct

def test_authentic_by_hand():
    """On a line: training at 0, 1, 5, 5; nearest others 1, 1, 0, 0. The sample at 1.5 is nearer to 1 than 0 is; 2.5
    is not; 7 is authentic; 5, a copy of what is there twice, is not, nor is −1, as far from 0 as 1 is."""
    train = np.array([[0], [1], [5], [5]], np.float32)
    samples = np.array([[1.5], [2.5], [7], [5], [-1]], np.float32)
    index, gap = nearest(samples, train)
    assert authentic(index, gap, nearest_other(train)).tolist() == [False, True, True, False, False]
    assert memorisation(train, train[:2], samples).authentic_percent == 40


# ---- exact copies

def test_exact_copies(tmp_path):
    """By their pixels: another file format and another file make no difference, one grey level does."""
    images = noise_images(4)
    images[3] = images[0]
    images[3, 0, 0, 0] ^= 1
    paths = save_images(images, tmp_path / "generated")
    train = save_images(noise_images(3, seed=1), tmp_path / "train")
    for target, source in ((train[1], 2), (train[2], 1)):
        Image.fromarray(images[source]).save(target, compress_level=0)
    Image.fromarray(images[2]).save(tmp_path / "copy.bmp")
    hashes = pixel_hashes([*train, tmp_path / "copy.bmp"], 16)
    assert exact_copies(pixel_hashes(paths, 16), hashes) == ((1, 2), (2, 1))
    assert exact_copies(pixel_hashes(paths[:1], 16), []) == ()


# ---- the closest pairs

def test_closest_pairs():
    index, gap = np.array([4, 2, 9, 2]), np.array([0.5, 0.25, 3.0, 0.5])
    assert closest_pairs(index, gap, 3) == (Pair(1, 2, 0.25), Pair(0, 4, 0.5), Pair(3, 2, 0.5))
    assert len(closest_pairs(index, gap, 16)) == 4
    train, generated = gaussian(0, 30), gaussian(1, 50)
    found = memorisation(train, train[:5], generated, count=4).closest
    expected = all_distances(generated, train)
    order = expected.min(1).argsort()[:4]
    assert [(p.sample, p.training) for p in found] == [(i, expected[i].argmin()) for i in order]
    assert [p.distance for p in found] == pytest.approx(expected.min(1)[order])


@pytest.fixture
def files(tmp_path):
    """Flat images: generated 10, 20, 30, training 100, 25, 12, 60."""
    return [save_images([np.full((8, 8, 3), v, np.uint8) for v in values], tmp_path / name)
            for name, values in (("generated", (10, 20, 30)), ("train", (100, 25, 12, 60)))]


def as_dict(pair, lpips=None):
    return asdict(pair) | {"lpips": lpips}


def test_picture(files):
    """Training image above its sample, and a distance below that."""
    pairs = [as_dict(Pair(0, 2, 0.2)), as_dict(Pair(2, 0, 0.1))]
    plain = np.asarray(closest(pairs, *files, 8).picture())[:, :, 0]
    columns = [plain[:, -71], plain[:, -71 - 134]]  # tiles of 128 pixels, a gap of 6
    assert [[v for v in dict.fromkeys(c.tolist()) if (c == v).sum() > 100] for c in columns] == [[100, 30], [12, 10]]
    assert plain[134:145, -134:].min() == 255  # nothing but paper below the first row ...
    assert (plain[-16:, -134:] < 200).any()  # ... and ink below the second
    more = closest([as_dict(Pair(0, 2, 0.2), 0.125)] * 10, *files, 8).picture()
    assert 8 * 134 < more.width < 9 * 134 + 100 and more.height > 4 * 128  # eight in a row, then two


# ---- as a whole

def test_result_is_json_and_does_not_depend_on_the_layout_of_the_arrays():
    train, test, generated = gaussian(0, 80), gaussian(1, 20), gaussian(2, 40)
    result = memorisation(train, test, generated)
    written = json.loads(json.dumps(asdict(result)))
    assert len(written["closest"]) == 16 and set(written["closest"][0]) == {"sample", "training", "distance"}
    assert memorisation(train.astype(np.float64), test[:, ::-1][:, ::-1], generated) == result


def test_one_sample_and_one_test_image_suffice():
    assert len(memorisation(gaussian(0, 2), gaussian(1, 1), gaussian(2, 1)).closest) == 1


@pytest.mark.parametrize("n, m, g", [(1, 1, 1), (2, 0, 1), (2, 1, 0)])
def test_too_few_images(n, m, g):
    with pytest.raises(UserError, match=f"{n} training, {m} test and {g} generated"):
        memorisation(gaussian(0, n), gaussian(1, m), gaussian(2, g))
