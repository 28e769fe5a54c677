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

from core.assets import ASSETS, existing, first_line, weights_file
from core.errors import UserError
from core.progress import progress_bar
from core.tensors import weights_hash
from dataset.images import load_images
from dataset.vae import to_model_range
from metrics.lpips import Spread, consecutive_pairs, draw_pairs, spread

FLAG, INSTEAD = "--lpips alex", ", or leave LPIPS out: --lpips none"
SMALLEST = 31  # pixels; of fewer nothing reaches AlexNet's last layers


class Lpips:
    """The distance itself; `identity` changes whenever its numbers may.

    AlexNet's weights come from the file `weights`, else from torch hub's cache. Raises UserError.
    """

    preprocessing = "values in [-1, 1]"

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
class Diversity:
    """Three views of one set of images; None where it has no such pair, or no labels are known."""

    consecutive: Spread | None  # pairs over all labels: the paper's score
    within_label: Spread | None  # both images have the same combination of labels
    between_label: Spread | None  # they have different ones


def check_image_size(image_size):
    """Raise UserError where images are too small for AlexNet."""
    if image_size < SMALLEST:
        raise UserError(f"--image-size {image_size}: LPIPS needs images of at least {SMALLEST} pixels; "
                        "leave it out with --lpips none")


def distances(distance, first, second, image_size, batch_size=32, progress=None):
    """LPIPS of the image files first[i] and second[i] -> float32 array (m,).

    distance: an Lpips. Holds the images of `batch_size` pairs at a time, each image once. `progress` names the
    progress bar, None = no bar. Files of another size are cropped, as everywhere.
    """
    parts = [np.zeros(0, np.float32)]
    with progress_bar(total=len(first), unit="pairs", title=progress, active=progress is not None) as bar:
        for start in range(0, len(first), batch_size):
            a, b = first[start:start + batch_size], second[start:start + batch_size]
            place = {path: i for i, path in enumerate(dict.fromkeys([*a, *b]))}
            images = load_images(list(place), image_size)
            parts.append(distance(images, [place[path] for path in a], [place[path] for path in b]))
            bar.update(len(a))
    return np.concatenate(parts)


def diversity(distance, paths, image_size, labels=None, seed=0, batch_size=32, progress=None):
    """How far n image files are from each other -> Diversity.

    As in the paper, the files are shuffled and each is compared with the next: n − 1 pairs. This mixes two things:
    pairs of different diseases differ whether or not the generator has variety. So, where labels (n, K) are given,
    pairs with equal and with different labels are also scored apart, up to n − 1 of each, drawn uniformly from all
    such pairs of the set. All are a function of `seed`.
    """
    def score(pairs, kind):
        if not len(pairs):
            return None
        first, second = ([paths[i] for i in side] for side in pairs.T)
        bar = f"{progress}, {kind}" if progress else None
        return spread(distances(distance, first, second, image_size, batch_size, bar), pairs)

    chain = consecutive_pairs(len(paths), seed)
    within, between = (draw_pairs(labels, len(chain), same, seed) if labels is not None else []
                       for same in (True, False))
    return Diversity(score(chain, "consecutive"), score(within, "within label"), score(between, "between label"))


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
