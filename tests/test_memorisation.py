"""metrics/memorisation.py: by hand, by brute force, and in expectation where nothing is memorised."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image

from core.errors import UserError
from metrics import memorisation as module
from metrics.memorisation import (
    ExactDuplicates,
    Pair,
    authentic,
    close_share,
    closer_probability,
    closest_pairs,
    exact_duplicates,
    memorisation,
    near_duplicates,
    nearest,
    nearest_by_lpips,
    nearest_is_training,
    nearest_other,
    picture,
    pixel_hashes,
    with_lpips,
)


def gaussian(seed, n, d=8):
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def all_distances(a, b):
    return np.linalg.norm(a[:, None].astype(np.float64) - b[None], axis=2)


def save(images, folder):
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{i}.png" for i in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    return paths


def noise(n, seed=0, size=16):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


# ---- nearest neighbours

def test_nearest_by_brute_force(monkeypatch):
    monkeypatch.setattr(module, "ROWS", 7)  # several blocks, the last one shorter
    a, b = gaussian(0, 40), gaussian(1, 30)
    expected = all_distances(a, b)
    index, found = nearest(a, b, k=3)
    assert np.array_equal(index, expected.argsort(axis=1)[:, :3])
    assert found == pytest.approx(np.sort(expected, axis=1)[:, :3])
    assert nearest(a, b[:2], k=3)[0].shape == (40, 2)

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


def test_closer_probability_by_hand():
    """Six comparisons, 1 and 4 with 2, 3 and 4: 1 is closer in all three, 4 in none and equal in one."""
    found = closer_probability([1, 4], [2, 3, 4])
    assert found.value == pytest.approx(3.5 / 6)
    assert found.low < found.expected == 0.5 < found.high
    assert closer_probability([1, 2], [3, 4, 5]).p == pytest.approx(1 / 10)  # of 10 orders of five, the first


def test_nearest_is_training_by_hand():
    """Two training images, next to 3 and 1 of 6 samples, and one test image, next to 2.

    Expected 2/3. Shares (½, ⅙, ⅓) have squared deviations (1 + 1 + 0) / 36; variance 2 · 1 / (3 · 2) of their sum.
    """
    found = nearest_is_training(np.array([0, 0, 0, 1, 2, 2]), 2, 1)
    assert (found.value, found.expected) == pytest.approx((4 / 6, 2 / 3))
    assert found.p == pytest.approx(0.5)
    half = 1.959964 * (2 / 36 / 3) ** 0.5
    assert (found.low, found.high) == pytest.approx((2 / 3 - half, 2 / 3 + half), abs=1e-6)


def test_without_memorisation_shares_are_as_expected():
    """Three sets of one distribution, drawn 400 times: averages, and how often the range holds the value."""
    shares = {"close": [], "closer": [], "training": []}
    for i in range(400):
        train, test, generated = (gaussian([i, j], n, 3) for j, n in enumerate((60, 39, 50)))
        gap, test_gap = all_distances(generated, train).min(1), all_distances(test, train).min(1)
        shares["close"].append(close_share(gap, test_gap))
        shares["closer"].append(closer_probability(gap, test_gap))
        index = all_distances(generated, np.concatenate([train, test])).argmin(1)
        shares["training"].append(nearest_is_training(index, 60, 39))
    for name, found in shares.items():
        values = np.array([s.value for s in found])
        assert abs(values.mean() - found[0].expected) < 4 * values.std() / 20, name
        held = np.mean([s.low <= s.value <= s.high for s in found])
        assert 0.92 < held < 0.985, name
        assert 0.02 < np.mean([s.p < 0.05 for s in found]) < 0.085, name


def test_copies_are_seen_and_dullness_is_told_apart():
    train, test = gaussian(0, 300), gaussian(1, 200)
    copies = train[:200] + 0.1 * gaussian(2, 200)
    few = np.concatenate([copies[:30], gaussian(3, 170)])
    dull = 0.3 * gaussian(4, 200)
    found = {name: memorisation(train, test, x) for name, x in (("copies", copies), ("few", few), ("dull", dull))}
    for share in ("close", "closer_than_test", "nearest_is_training"):
        assert getattr(found["copies"], share).value > 0.99
        assert getattr(found["copies"], share).p < 1e-6
    assert found["copies"].authentic_percent < 1 < 40 < found["copies"].authentic_percent_test
    assert found["few"].close.p < 1e-4  # 15 % of copies
    assert found["dull"].closer_than_test.p < 1e-4
    assert found["dull"].nearest_is_training.p > 0.05


# ---- AuthPct

def test_authentic_by_hand():
    """On a line: training at 0, 1, 5, 5; nearest others 1, 1, 0, 0. The sample at 1.5 is nearer to 1 than 0 is; 2.5
    is not; 7 is authentic; 5, a copy of what is there twice, is not, nor is −1, as far from 0 as 1 is."""
    train = np.array([[0], [1], [5], [5]], np.float32)
    samples = np.array([[1.5], [2.5], [7], [5], [-1]], np.float32)
    index, gap = (x[:, 0] for x in nearest(samples, train))
    assert authentic(index, gap, nearest_other(train)).tolist() == [False, True, True, False, False]
    found = memorisation(train, train[:2], samples)
    assert (found.authentic_percent, found.authentic_percent_test) == (40, 0)


# ---- duplicates

def test_near_duplicates_by_hand(monkeypatch):
    """On a line, at most 1 apart: 0, 1, 2 hang together, so do 10 and 10.5; 5 and 20 are alone. Whatever the blocks."""
    x = np.array([[2], [10], [0], [5], [1], [10.5], [20]], np.float32)
    found = near_duplicates(x, np.array([1.0, 5, 1]))
    assert found.groups == ((0, 2, 4), (1, 5))
    assert (found.samples, found.share, found.threshold, found.expected) == (5, 5 / 7, 1.0, 2 / 3)
    monkeypatch.setattr(module, "BLOCK_MIB", 2 * 7 * 8 / 2**20)  # two rows
    assert near_duplicates(x, np.array([1.0, 5, 1])) == found
    assert near_duplicates(x, [0.9]).groups == ((1, 5),)
    assert near_duplicates(np.array([[300.1, 7], [1, 1], [300.1, 7]], np.float32), [0.0]).groups == ((0, 2),)


def test_near_duplicates_in_blocks(monkeypatch):
    """Against a search through the graph of all pairs."""
    x = gaussian(0, 120, 2)
    linked = all_distances(x, x) <= 0.15
    reached = np.linalg.matrix_power(linked.astype(float), 119) > 0
    expected = {tuple(np.flatnonzero(row).tolist()) for row in reached if row.sum() > 1}
    monkeypatch.setattr(module, "BLOCK_MIB", 10 * 120 * 8 / 2**20)
    assert set(near_duplicates(x, [0.15]).groups) == expected
    assert max(map(len, expected)) > 3


def test_as_many_near_duplicates_as_expected_where_nothing_collapses():
    """Although there are 2,000 real images, and 200 of them are less crowded: against the nearest of 2,000, 0.001."""
    found = []
    for seed in range(40):
        train = gaussian([0, seed], 2000, 4)
        found.append(memorisation(train, train[:2], gaussian([1, seed], 200, 4), seed=seed).near_duplicates)
    shares, expected = ([getattr(f, name) for f in found] for name in ("share", "expected"))
    assert 0.01 <= min(expected) <= max(expected) < 0.021  # one pair, or three images
    assert abs(np.mean(shares) - np.mean(expected)) < 3 * np.std(shares) / 40**0.5 < 0.008


def test_all_training_images_are_taken_where_they_are_fewer():
    train, few = gaussian(0, 30), gaussian(1, 30)
    found = memorisation(train, few, few).near_duplicates
    assert found.threshold == nearest_other(train).min()
    assert found.expected == 2 / 30  # the nearest pair


def test_exact_duplicates(tmp_path):
    """By their pixels: another file format and another file make no difference, one grey level does."""
    images = noise(5)
    images[3] = images[1]
    images[4] = images[0]
    images[4, 0, 0, 0] ^= 1
    paths = save(images, tmp_path / "generated")
    train = save(noise(3, seed=1), tmp_path / "train")
    for target, source in ((train[1], 2), (train[2], 1)):
        Image.fromarray(images[source]).save(target, compress_level=0)
    Image.fromarray(images[2]).save(tmp_path / "copy.bmp")
    found = exact_duplicates(pixel_hashes(paths, 16), pixel_hashes([*train, tmp_path / "copy.bmp"], 16))
    assert found == ExactDuplicates(samples=2, groups=((1, 3),), copies=((1, 2), (2, 1), (3, 2)))
    assert exact_duplicates(pixel_hashes(paths[:1], 16), []) == ExactDuplicates(0, (), ())


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


def grey_distance(images, a, b):
    """In place of LPIPS: the difference of two flat images."""
    value = images[:, 0, 0, 0].astype(np.float32)
    return np.abs(value[a] - value[b])


@pytest.fixture
def files(tmp_path):
    """Flat images: generated 10, 20, 30, training 100, 25, 12, 60."""
    made = [save([np.full((8, 8, 3), v, np.uint8) for v in values], tmp_path / name)
            for name, values in (("generated", (10, 20, 30)), ("train", (100, 25, 12, 60)))]
    return made


def test_nearest_by_lpips(files):
    index, values = nearest_by_lpips(grey_distance, *files, [[0, 3], [2, 1], [1, 0]], 8, batch_size=4)
    assert index.tolist() == [3, 1, 1]
    assert values.tolist() == [50, 5, 5]
    pairs = with_lpips((Pair(2, 0, 0.1), Pair(0, 2, 0.2)), grey_distance, *files, 8)
    assert pairs == (Pair(2, 0, 0.1, 70.0), Pair(0, 2, 0.2, 2.0))
    json.dumps([asdict(pair) for pair in pairs])  # plain numbers


def test_picture(files):
    """Training image above its sample, and a distance below that."""
    pairs = (Pair(0, 2, 0.2), Pair(2, 0, 0.1))
    plain = np.asarray(picture(pairs, *files, 8))[:, :, 0]
    columns = [plain[:, -71], plain[:, -71 - 134]]  # tiles of 128 pixels, a gap of 6
    assert [[v for v in dict.fromkeys(c.tolist()) if (c == v).sum() > 100] for c in columns] == [[100, 30], [12, 10]]
    assert plain[134:145, -134:].min() == 255  # nothing but paper below the first row ...
    assert (plain[-16:, -134:] < 200).any()  # ... and ink below the second
    more = picture(tuple(Pair(0, 2, 0.2, 0.125) for _ in range(10)), *files, 8)
    assert 8 * 134 < more.width < 9 * 134 + 100 and more.height > 4 * 128  # eight in a row, then two


# ---- as a whole

def test_result_is_json_and_a_function_of_the_seed():
    train, test, generated = gaussian(0, 80), gaussian(1, 20), gaussian(2, 40)
    before = torch.get_rng_state()
    found = memorisation(train, test, generated)
    assert torch.equal(torch.get_rng_state(), before)
    written = json.loads(json.dumps(asdict(found)))
    assert written["training_images"] == 80 and written["test_images"] == 20 and written["samples"] == 40
    assert len(written["closest"]) == 16 and written["closest"][0]["lpips"] is None
    assert memorisation(train, test, generated) == found
    other = memorisation(train, test, generated, seed=1)
    assert other.near_duplicates.threshold != found.near_duplicates.threshold
    assert other.close == found.close
    assert memorisation(train.astype(np.float64), test[:, ::-1][:, ::-1], generated) == found


def test_one_sample_and_one_test_image_suffice():
    found = memorisation(gaussian(0, 2), gaussian(1, 1), gaussian(2, 1))
    assert len(found.closest) == 1 and found.near_duplicates.groups == ()


@pytest.mark.parametrize("n, m, g", [(1, 1, 1), (2, 0, 1), (2, 1, 0)])
def test_too_few_images(n, m, g):
    with pytest.raises(UserError, match=f"{n} training, {m} test and {g} generated"):
        memorisation(gaussian(0, n), gaussian(1, m), gaussian(2, g))
