"""evaluation/lpips.py against torchmetrics on the same weights; metrics/lpips.py by hand and in expectation."""

import itertools
import shutil
import warnings
from pathlib import Path

import lpips
import numpy as np
import pytest
import torch
from helpers import message_of, noise_images, save_alexnet, save_images
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

from core import assets
from core.errors import UserError
from evaluation.lpips import SMALLEST, Lpips, check_image_size, distances, diversity
from metrics.lpips import draw_pairs, spread

SIZE = 64
FILE = Path("hub", "checkpoints", "alexnet-owt-7be5be79.pth")  # in TORCH_HOME


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A TORCH_HOME with AlexNet's weights in its cache."""
    folder = tmp_path_factory.mktemp("torch")
    save_alexnet(folder / FILE, seed=0)
    return folder


@pytest.fixture(scope="module")
def distance(home):
    return Lpips(weights=home / FILE)


class Grey:
    """In place of LPIPS: the difference of two flat images. Remembers the grey values of each pair."""

    def __init__(self):
        self.pairs, self.most = [], 0

    def __call__(self, images, a, b):
        value = images[:, 0, 0, 0].astype(np.float32)
        self.most = max(self.most, len(images))
        self.pairs += zip(value[a].astype(int), value[b].astype(int), strict=True)
        return np.abs(value[a] - value[b])


@pytest.fixture
def greys(tmp_path):
    """Nine flat images of grey 0, 1, 4, 9, ... 64: their files."""
    return save_images([np.full((8, 8, 3), i**2, np.uint8) for i in range(9)], tmp_path)


# ---- the distance

def test_equals_torchmetrics(home, monkeypatch, capfd):
    """Both read torch hub's cache. Loading ours prints nothing, warns of nothing and moves no global stream."""
    monkeypatch.setenv("TORCH_HOME", str(home))
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = Lpips()
    assert torch.equal(torch.get_rng_state(), before)
    assert capfd.readouterr() == ("", "")

    theirs = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)
    images = noise_images(3, size=SIZE)
    images[2] = images[1] // 2 + 60  # a pair that is nearer
    scaled = torch.as_tensor(images).permute(0, 3, 1, 2) / 255
    pairs = list(itertools.combinations(range(3), 2))
    found = ours(images, *map(list, zip(*pairs, strict=True)))
    for value, (i, j) in zip(found, pairs, strict=True):
        assert value == pytest.approx(theirs(scaled[[i]], scaled[[j]]).item(), abs=1e-5)
    assert found.max() > 10 * found.min() > 0.01  # large enough for 1e-5 to mean something


def test_equals_the_package(distance):
    """The package runs both images of a pair; here each image passes once."""
    images = noise_images(5, size=SIZE)
    first, second = [0, 0, 3, 4], [1, 2, 3, 0]
    x = torch.as_tensor(images).permute(0, 3, 1, 2) / 127.5 - 1
    expected = distance.net(x[first], x[second]).flatten()
    assert distance(images, first, second) == pytest.approx(expected.numpy(), rel=1e-5)
    assert distance(images, [3], [3])[0] == 0


def test_the_heads_are_version_0_1(distance):
    file = Path(lpips.__file__).parent / "weights" / "v0.1" / "alex.pth"
    for key, value in torch.load(file, map_location="cpu", weights_only=True).items():
        assert torch.equal(distance.net.state_dict()[key], value)
    assert not distance.net.training
    assert not any(p.requires_grad for p in distance.net.parameters())


def test_identity_follows_the_weights(distance, home, tmp_path):
    save_alexnet(tmp_path / "other.pth", seed=1)
    shutil.copy(home / FILE, tmp_path / "same.pth")
    assert Lpips(weights=tmp_path / "same.pth").identity == distance.identity
    assert Lpips(weights=tmp_path / "other.pth").identity != distance.identity


def test_smallest_image(distance):
    check_image_size(SMALLEST)
    distance(noise_images(2, size=SMALLEST), [0], [1])
    with pytest.raises(RuntimeError):
        distance(noise_images(2, size=SMALLEST - 1), [0], [1])
    with pytest.raises(UserError, match=r"--image-size 30: .*at least 31 .*--lpips none"):
        check_image_size(SMALLEST - 1)


# ---- weights that are not there

def refuses(*parts, weights=None):
    message = message_of(lambda: Lpips(weights=weights))
    for part in parts:
        assert part in message


def test_missing_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(assets, "reachable", lambda url: False)
    refuses("--lpips alex", FILE.name, "python fetch_assets.py --to DIR", "--assets DIR", "--lpips none")


def test_wrong_files(tmp_path):
    refuses("absent.pth", "no such file", weights=tmp_path / "absent.pth")
    contents = {"noise.pth": None, "list.pth": [1], "other.pth": {"conv.weight": torch.ones(1)},
                "shape.pth": {f"features.{i}.{kind}": torch.ones(1) for i in (0, 3, 6, 8, 10)
                              for kind in ("weight", "bias")}}
    for name, content in contents.items():
        if content is None:
            (tmp_path / name).write_bytes(b"no weights")
        else:
            torch.save(content, tmp_path / name)
        refuses(name, "not hold AlexNet's weights", "--lpips none", weights=tmp_path / name)


# ---- the error of the mean

def test_spread_by_hand():
    """A chain of five images. Deviations −1.5, −1.5, 1.5, 1.5: squares 9; neighbours' products 2.25 − 2.25 + 2.25,
    each counted both ways: 4.5. Error √((9 + 4.5) / (4 · 3)).
    """
    chain = [[0, 1], [1, 2], [2, 3], [3, 4]]
    found = spread([1, 1, 4, 4], chain)
    assert (found.mean, found.std, found.pairs) == (2.5, 1.5, 4)
    assert found.standard_error == pytest.approx((13.5 / 12) ** 0.5)
    apart = spread([1, 1, 4, 4], [[0, 1], [2, 3], [4, 5], [6, 7]])  # no image in common: that of independent values
    assert apart.standard_error == pytest.approx((9 / 12) ** 0.5)
    assert spread([1, 4, 1, 4], chain).standard_error == apart.standard_error  # products below 0 count as 0
    assert spread([3], [[0, 1]]) == type(found)(3.0, 0.0, None, 1)


def test_spread_by_brute_force():
    values = np.random.default_rng(0).random(30)
    pairs = np.random.default_rng(1).permutation(list(itertools.combinations(range(9), 2)))[:30]
    values += 0.1 * pairs.sum(axis=1)  # so that the products have a positive sum
    e = values - values.mean()
    products = sum(e[p] * e[q] for p in range(30) for q in range(30) if set(pairs[p]) & set(pairs[q]))
    assert spread(values, pairs).standard_error == pytest.approx((products / (30 * 29)) ** 0.5)


def test_error_is_that_of_the_mean():
    """Distances x_i + x_j depend on the images as strongly as any can: the naive error is √2 too small."""
    x = np.random.default_rng(0).standard_normal((2000, 60))
    chain = np.stack([np.arange(59), np.arange(1, 60)], axis=1)
    found = [spread(row[:-1] + row[1:], chain) for row in x]
    true = np.std([s.mean for s in found])
    assert np.mean([s.standard_error for s in found]) == pytest.approx(true, rel=0.06)
    assert np.mean([s.std / 59**0.5 for s in found]) < 0.75 * true


# ---- pairs by label

LABELS = np.array([[0, 1], [1, 0], [0, 1], [1, 1], [1, 0], [0, 1]])  # combinations a b a c b a
SAME = {(0, 2), (0, 5), (2, 5), (1, 4)}
OTHER = set(itertools.combinations(range(6), 2)) - SAME


@pytest.mark.parametrize("same, expected", [(True, SAME), (False, OTHER)])
def test_pairs_by_label(same, expected):
    """All if asked for more than there are; else each as often as every other, and none twice."""
    assert set(map(tuple, draw_pairs(LABELS, 100, same, 0).tolist())) == expected
    drawn = [tuple(map(tuple, draw_pairs(LABELS, 2, same, seed).tolist())) for seed in range(1500)]
    assert all(len(set(pairs)) == 2 for pairs in drawn)
    first = [pairs[0] for pairs in drawn]
    share = np.array([first.count(pair) for pair in expected]) / len(first)
    assert share.sum() == 1
    assert np.abs(share * len(expected) - 1).max() < 4 * (len(expected) / len(first)) ** 0.5
    assert drawn[0] == tuple(map(tuple, draw_pairs(LABELS, 2, same, 0).tolist()))


def test_no_such_pair():
    assert draw_pairs(np.eye(3), 5, True, 0).shape == (0, 2)
    assert draw_pairs(np.ones((3, 2)), 5, False, 0).shape == (0, 2)
    assert len(draw_pairs(np.ones((3, 2)), 5, True, 0)) == 3


# ---- diversity of a set

def test_consecutive_images_of_a_shuffled_list(greys):
    spy = Grey()
    found = diversity(spy, greys, 8, batch_size=4)
    links = [set(a) & set(b) for a, b in itertools.pairwise(spy.pairs)]
    assert all(len(link) == 1 for link in links)  # each pair shares one image with the next
    assert {v for pair in spy.pairs for v in pair} == {i**2 for i in range(9)}
    assert len(spy.pairs) == 8 and spy.pairs != sorted(spy.pairs)
    values = [abs(a - b) for a, b in spy.pairs]
    assert (found.consecutive.mean, found.consecutive.std) == pytest.approx((np.mean(values), np.std(values)))
    assert found.consecutive.pairs == 8
    assert found.within_label is found.between_label is None
    assert spy.most == 5  # four pairs of the chain: each image was read once

    assert diversity(Grey(), greys, 8, batch_size=3) == found
    other = Grey()
    diversity(other, greys, 8, seed=1)
    assert other.pairs != spy.pairs


def test_within_and_between_labels(greys):
    """Images of even and of odd number: every pair of either kind, against the list of all."""
    labels = np.array([[i % 2] for i in range(9)])
    spy = Grey()
    found = diversity(spy, greys, 8, labels, batch_size=2)
    for kind, pairs, same in ((found.within_label, spy.pairs[8:16], True),
                              (found.between_label, spy.pairs[16:], False)):
        assert kind.pairs == len(pairs) == 8
        assert all((a % 2 == b % 2) == same and a != b for a, b in pairs)  # squares keep the parity
        assert kind.mean == pytest.approx(np.mean([abs(a - b) for a, b in pairs]))
    alone = diversity(Grey(), greys, 8, np.eye(9))
    assert alone.within_label is None and alone.between_label.pairs == 8
    alike = diversity(Grey(), greys, 8, np.ones((9, 1)))
    assert alike.between_label is None and alike.within_label.pairs == 8


@pytest.mark.parametrize("n", [0, 1])
def test_a_set_without_pairs(greys, n):
    found = diversity(Grey(), greys[:n], 8, np.ones((n, 1)))
    assert (found.consecutive, found.within_label, found.between_label) == (None, None, None)


def test_distances_of_files(distance, tmp_path):
    """In the order asked for, whatever the batches; files of another size are cropped."""
    images = noise_images(4, size=SIZE)
    paths = save_images(images, tmp_path)
    first, second = [0, 1, 2, 3, 0], [1, 1, 0, 2, 3]
    expected = distance(images, first, second)
    for batch_size in (1, 2, 5):
        found = distances(distance, [paths[i] for i in first], [paths[i] for i in second], SIZE, batch_size)
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert distances(distance, paths[:1], paths[1:2], 32).shape == (1,)
    assert distances(distance, [], [], SIZE).shape == (0,)
