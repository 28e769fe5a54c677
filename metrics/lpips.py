"""LPIPS, the learned perceptual distance of two images, and from it how diverse a set of images is.

Zhang, Isola, Efros, Shechtman & Wang, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric",
CVPR 2018: AlexNet's features with the heads of version 0.1, from the package `lpips`. The LPIPS column of the
paper's Table 1 is `diversity(...).consecutive`.
"""

import warnings
from dataclasses import dataclass

import lpips
import numpy as np
import torch
from tqdm import tqdm

from core.assets import ASSETS, existing, weights_file, weights_hash
from core.errors import UserError, first_line
from core.random import generator
from dataset.images import load_images
from dataset.vae import to_model_range

FLAG, INSTEAD = "--lpips alex", ", or leave LPIPS out: --lpips none"
SMALLEST = 31  # pixels; of fewer nothing reaches AlexNet's last layers


class Lpips:
    """The distance itself; `identity` changes whenever its numbers may."""

    def __init__(self, device="cpu", weights=None):
        file = existing(weights, FLAG) if weights else weights_file(ASSETS["alexnet"], FLAG, INSTEAD)
        self.net, self.device = _build(file).to(device), device
        self.identity = f"lpips-alex-0.1:{weights_hash(self.net)}"

    @torch.inference_mode()
    def __call__(self, images, a, b):
        """Distances of images[a_i] and images[b_i]: uint8 (N, H, W, 3), H and W at least SMALLEST, and two index
        arrays (m,) -> float32 array (m,).

        The package's own forward pass runs AlexNet on both images of every pair. Here an image that belongs to
        several pairs passes once; the rest is the package's: layers l of features, each of unit length along its
        channels, distance = Σ_l mean over space of head_l · (difference)².
        """
        x = to_model_range(images).to(self.device)
        layers = [lpips.normalize_tensor(f) for f in self.net.net(self.net.scaling_layer(x))]  # each (N, C, h, w)
        a, b = (torch.as_tensor(index, device=self.device) for index in (a, b))
        total = sum(head((f[a] - f[b]) ** 2).mean((1, 2, 3)) for head, f in zip(self.net.lins, layers, strict=True))
        return total.cpu().numpy()


@dataclass(frozen=True)
class Spread:
    """Distances of m pairs: their mean, their standard deviation, and the standard error of the mean."""

    mean: float
    std: float  # divides by m, as the published score does
    standard_error: float | None  # None for a single pair
    pairs: int


@dataclass(frozen=True)
class Diversity:
    """Three views of one set of images; None where it has no such pair, or no labels are known."""

    consecutive: Spread | None  # pairs over all labels: the paper's score
    within_label: Spread | None  # both images have the same combination of labels
    between_label: Spread | None  # they have different ones


def open_lpips(device="cpu", weights=None):
    """LPIPS with AlexNet's weights from the file `weights`, else from torch hub's cache. Raises UserError."""
    return Lpips(device, weights)


def check_image_size(image_size):
    """Raise UserError where images are too small for AlexNet."""
    if image_size < SMALLEST:
        raise UserError(f"--image-size {image_size}: LPIPS needs images of at least {SMALLEST} pixels; "
                        "leave it out with --lpips none")


def distances(distance, first, second, image_size, batch_size=32, progress=None):
    """LPIPS of the image files first[i] and second[i] -> float32 array (m,).

    distance: from `open_lpips`. Holds the images of `batch_size` pairs at a time, each image once. `progress`
    names the progress bar, None = no bar. Files of another size are cropped, as everywhere.
    """
    parts = [np.zeros(0, np.float32)]
    with tqdm(total=len(first), desc=progress, unit="pair", disable=None if progress else True) as bar:
        for start in range(0, len(first), batch_size):
            a, b = first[start:start + batch_size], second[start:start + batch_size]
            place = {path: i for i, path in enumerate(dict.fromkeys([*a, *b]))}
            parts.append(distance(load_images(list(place), image_size), *([place[p] for p in c] for c in (a, b))))
            bar.update(len(a))
    return np.concatenate(parts)


def diversity(distance, paths, image_size, labels=None, pairs=None, seed=0, batch_size=32, progress=None):
    """How far n image files are from each other -> Diversity.

    As in the paper, the files are shuffled and each is compared with the next: n − 1 pairs. This mixes two things:
    pairs of different diseases differ whether or not the generator has variety. So, where labels (n, K) are given,
    pairs with equal and with different labels are also scored apart, each drawn uniformly from all such pairs of
    the set. `pairs` limits each of the three (None: n − 1). All are a function of `seed`.
    """
    count = len(paths) - 1 if pairs is None else min(pairs, len(paths) - 1)
    order = torch.randperm(len(paths), generator=generator(seed, "lpips order")).numpy()
    drawn = {"consecutive": np.stack([order[:-1], order[1:]], axis=1)[:count]}
    for kind in ("within_label", "between_label"):
        drawn[kind] = draw_pairs(labels, count, kind == "within_label", seed) if labels is not None else []
    found = {}
    for kind, chosen in drawn.items():
        ends = [[paths[pair[side]] for pair in chosen] for side in (0, 1)]
        name = progress and f"{progress}, {kind.replace('_', ' ')}"
        values = distances(distance, *ends, image_size, batch_size, name)
        found[kind] = spread(values, chosen) if len(chosen) else None
    return Diversity(**found)


def draw_pairs(labels, count, same, seed):
    """Draw pairs of images at random, uniformly from all whose labels are equal (`same`) or else are not.

    labels (n, K) -> indices (m, 2), no pair twice; m = count, or all pairs where there are no more.
    """
    _, group = np.unique(labels, axis=0, return_inverse=True)
    order = np.argsort(group.reshape(-1), kind="stable")  # images of one combination stand together
    sizes = np.bincount(group.reshape(-1))
    size, start = sizes.repeat(sizes), (np.cumsum(sizes) - sizes).repeat(sizes)  # (n,) of the group at each place
    partners = size - 1 if same else len(order) - size
    count = min(count, partners.sum() // 2)
    draw, found = generator(seed, "lpips pairs", same), {}
    while len(found) < count:
        # A first image in proportion to how many partners it has, then one of these: every pair is as likely.
        first = torch.multinomial(torch.as_tensor(partners).double(), int(count), True, generator=draw).numpy()
        step = (torch.rand(len(first), generator=draw, dtype=torch.float64).numpy() * partners[first]).astype(int)
        if same:
            second = start[first] + (first - start[first] + 1 + step) % size[first]
        else:
            second = (start[first] + size[first] + step) % len(order)
        ends = np.sort(np.stack([order[first], order[second]], axis=1), axis=1)
        found |= dict.fromkeys(map(tuple, ends.tolist()))
    return np.array(list(found)[:count], int).reshape(-1, 2)


def spread(values, pairs):
    """Distances (m,) of pairs (m, 2) of images -> Spread.

    Pairs that share an image are not independent: an odd one is far from both its neighbours. The error of the
    mean is that of another draw of images, so it counts, beside the m squared deviations e_p², the products
    e_p · e_q of all pairs p ≠ q with a common image. (The variance for dyadic data, Aronow, Samii & Assenova 2015;
    for a chain of pairs, (γ₀ + 2γ₁) / m with the autocovariances at lag 0 and 1.) In expectation these products
    are not negative, so where they come out below 0 they count as 0.
    """
    values, pairs = np.asarray(values, np.float64), np.asarray(pairs)
    m, deviation = len(values), values - values.mean()
    squares = (deviation**2).sum()
    per_image = np.bincount(pairs.ravel(), weights=deviation.repeat(2))  # Σ e_p over the pairs of each image
    shared = (per_image**2).sum() - 2 * squares  # each e_p² is in the sums of two images
    error = float(np.sqrt((squares + max(shared, 0)) / (m * (m - 1)))) if m > 1 else None
    return Spread(float(values.mean()), float(values.std()), error, m)


def _build(file):
    """The package's LPIPS with AlexNet's convolutions from `file`; it prints nothing and draws nothing."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # the package calls torchvision and torch.load in old ways
        net = lpips.LPIPS(net="alex", version="0.1", pnet_rand=True, verbose=False)
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
        # The package files layer i of torchvision's `features` under the slice it belongs to: slice3.6.weight.
        net.net.load_state_dict({key: weights[f"features.{key.partition('.')[2]}"] for key in net.net.state_dict()})
    except Exception as error:  # whatever the reader of pickles or the network finds wrong
        raise UserError(f"{FLAG}: {file} does not hold AlexNet's weights as torchvision has them "
                        f"({first_line(error)}); fetch or name another file{INSTEAD}") from None
    return net.eval().requires_grad_(False)
