"""Feature spaces: images -> vectors in which sets of images are compared.

    python -m evaluation.features --fit retina --data-path data/oct data/fundus

`features = open_features(name)` has `name`, `identity` (changes whenever the numbers may), `dimensions` and
`preprocessing` (one line: crop, size, filter, value range); `features(images)` takes uint8 (N, H, W, 3) to float32
(N, dimensions). A new space is one more such class and its row in SPACES. The spaces of other people's networks
are in evaluation/backbones.py; their weights come from the libraries' caches or the network (core/assets.py), or
from a file: `dinov2=weights.safetensors`.

`retina` is the bundled autoencoder's encoder. It has seen retinas only and needs no download; its numbers say
which of two sets is nearer to the real one, and must not be set beside numbers of another space.
The command above measures, once, the axes on which its features are expressed (see `fit`).
"""

import hashlib
import itertools
from pathlib import Path

import numpy as np
import torch

from core import runtime
from core.cli import Parser, integer, run
from core.errors import UserError
from core.files import make_folder
from core.progress import progress_bar
from core.random import generator
from core.tensors import read_tensors, write_tensors
from dataset import contents, outside
from dataset.images import check_images, load_images
from dataset.root import read_split
from dataset.vae import NAMED, VaeCodec, to_model_range, weights_of
from evaluation import backbones

SCALE_FILE = "feature_scale.safetensors"  # lies in the folder of the autoencoder it belongs to
COMPONENTS = 128  # principal axes that are kept, of 720 features of the bundled autoencoder
CACHED = 1  # part of the key of cached features: to be raised when what `load_images` or `extract` does changes


class AutoencoderFeatures:
    """What an autoencoder's encoder sees (`channel_statistics`), whitened and brought to one length.

    KID's kernel, (x·y / d + 1)³, is not free of scale. Seven tenths of the variance of the standardised statistics
    lie in two directions; compared as they are, little else would count, and a few outlying images would outweigh
    all others. So they are expressed on axes along which images of one kind vary by 1, and the vector is given the
    length √d: the kernel is then (cosine + 1)³, between 0 and 8. Mean and axes were measured once, on the
    autoencoder's training images; they belong to the space, not to the sets that are compared.
    No crop and no resize: the network takes the images at the size they have, values in [-1, 1].
    """

    preprocessing = "uint8 RGB, no crop, no resize; v / 127.5 - 1, so [-1, 1]"

    def __init__(self, name, device="cpu"):
        codec = _open_autoencoder(name, device)
        mean, axes = _read_scale(name, codec.identity)
        self.vae, self.mean, self.axes = codec.vae, mean.to(device), axes.to(device)
        self.name = name if name in SPACES else f"vae:{Path(name).resolve().name}"
        digest = hashlib.sha256(mean.numpy().tobytes() + axes.numpy().tobytes()).hexdigest()[:8]
        # The axes are measured after the preprocessing: with another one there would be others, so `digest` tells.
        self.identity, self.dimensions = f"{self.name}:{weights_of(codec.identity)}:{digest}", axes.shape[1]

    def __call__(self, images, batch_size=32):
        """uint8 (N, H, W, 3), array or tensor, any H and W of at least 8 -> float32 array (N, dimensions)."""
        parts = [(channel_statistics(self.vae, part) - self.mean) @ self.axes
                 for part in torch.as_tensor(images).split(batch_size)]
        values = torch.cat(parts)  # (N, d)
        values = values * (self.dimensions**0.5 / values.norm(dim=1, keepdim=True).clamp(min=1e-6))
        return values.cpu().numpy()


SPACES = {  # name -> class, called with (name, device); all but the first also with a file of weights
    "retina": AutoencoderFeatures,
    "inception": backbones.InceptionFeatures,
    "dinov2": backbones.DinoFeatures,
    "clip": backbones.ClipFeatures,
    "imagenet-lite": backbones.LiteFeatures,
}
PUBLISHED = {"dino": "dinov2", "inception": "inception", "clip": "clip"}  # --gg-extractor -> the space here
NAMES = (f"{', '.join(SPACES)}, timm:MODEL, the folder of an autoencoder or FILE.pt of classify.py; "
         "`NAME=FILE` takes the weights from a file")  # for the help of flags


def open_features(name, device="cpu"):
    """The feature space `name`: one of SPACES, timm:MODEL (each also as NAME=FILE), the folder of an autoencoder or
    a checkpoint of classify.py. Raises UserError.
    """
    known, equals, file = name.partition("=")
    space = backbones.TimmFeatures if known.startswith("timm:") else SPACES.get(known)
    if space and space is not AutoencoderFeatures:
        if equals and not file:
            raise UserError(f"--features {name}: expected the path of a file of weights after `=`")
        return space(name, device, file or None)
    if name.endswith(".pt") and Path(name).is_file():
        return backbones.ClassifierFeatures(name, device)
    if name in SPACES or Path(name).is_dir():
        return AutoencoderFeatures(name, device)
    raise UserError(f"--features {name}: no such space; expected {NAMES}")


@torch.no_grad()
def channel_statistics(vae, images):
    """uint8 (N, H, W, 3) -> (N, D): mean and std over space of every channel after each block of the encoder.

    From full to 1/8 resolution: shallow blocks see texture and brightness, deep ones shape. For widths 8, 32,
    64 and 128, D = 2 · (8 + 32 + 64 + 128 + 128) = 720, the last 128 being the middle block.
    """
    encoder, parts = vae.encoder, []
    x = encoder.conv_in(to_model_range(images).to(vae.device))  # (N, 8, H, W)
    for block in (*encoder.down_blocks, encoder.mid_block):
        x = block(x)  # (N, C, H', W')
        std, mean = torch.std_mean(x, dim=(2, 3), correction=0)
        parts += [mean, std]
    return torch.cat(parts, dim=1)


def extract(features, image_paths, image_size, batch_size=32, progress=None, cache=None):
    """Features (n, D) of image files, in their order; `progress` names the progress bar, None = no bar.

    Real and generated images take the same path: files that are not image_size × image_size are cropped.
    `cache`: a folder where the features are kept, under a name that depends on the bytes of the files, their order,
    the feature space and the size. Where they are found, no image is opened. Raises UserError.
    """
    if cache is None:
        return _compute(features, image_paths, image_size, batch_size, progress)
    make_folder(cache, "feature cache")
    file = Path(cache) / f"{cache_key(features, image_paths, image_size)}.safetensors"
    if file.is_file():
        return _read_cached(file, (len(image_paths), features.dimensions))
    values = _compute(features, image_paths, image_size, batch_size, progress)
    about = {"features": features.identity, "preprocessing": features.preprocessing, "image_size": str(image_size)}
    write_tensors(file, {"features": torch.from_numpy(values)}, about)
    return values


def cache_key(features, image_paths, image_size):
    """SHA-256 of everything that the features of these files depend on; of the images only the bytes are read."""
    return contents.combined([CACHED, features.identity, image_size, *contents.hashes(image_paths)])


def _read_cached(file, shape):
    values = read_tensors(file, "remove the file", sealed=True)[0].get("features")
    if values is None or tuple(values.shape) != shape:
        raise UserError(f"{file}: damaged (no features of shape {shape}); remove the file")
    return values.numpy()


def _compute(features, image_paths, image_size, batch_size, progress):
    """What `extract` returns, one batch of images in memory at a time."""
    parts = [np.zeros((0, features.dimensions), np.float32)]
    with progress_bar(total=len(image_paths), unit="images", title=progress, active=progress is not None) as bar:
        for start in range(0, len(image_paths), batch_size):
            paths = image_paths[start:start + batch_size]
            parts.append(features(load_images(paths, image_size), batch_size))
            bar.update(len(paths))
    return np.concatenate(parts)


def fit(name, kinds, sizes, device="cpu", batch_size=32):
    """Measure mean and axes (`whitening`) of the statistics and write them beside the autoencoder.

    kinds: lists of image paths, one list per data root. Seen at several sizes, so that one file serves them all.
    """
    codec = _open_autoencoder(name, device)
    for paths in kinds:
        check_images(paths)
    groups, total = [], len(sizes) * sum(map(len, kinds))
    with progress_bar(total=total, unit="images", title=f"scale of {name}") as bar:
        for size, paths in itertools.product(sizes, kinds):
            groups.append([])
            for start in range(0, len(paths), batch_size):
                images = load_images(paths[start:start + batch_size], size)
                groups[-1].append(channel_statistics(codec.vae, images).double().cpu())
                bar.update(len(images))
    mean, axes = whitening([torch.cat(group) for group in groups])
    scale = {"mean": mean.float(), "axes": axes.float().contiguous()}
    made_from = {"autoencoder": weights_of(codec.identity), "images": str(sum(map(len, kinds))),
                 "sizes": " ".join(str(size) for size in sizes)}
    write_tensors(_folder(name) / SCALE_FILE, scale, made_from)


def whitening(groups):
    """Statistics of m kinds of images, each (n_i, D) -> mean (D,) and axes (D, d) for (values − mean) @ axes.

    Along each axis the images of one kind have variance 1, pooled over the kinds, and no two axes are correlated.
    What sets the kinds apart (OCT from fundus, 64 from 256 pixels) is left out of the measure, so it stays large.
    The axes are the first COMPONENTS principal ones after each statistic was divided by its own standard deviation.
    Noise is not amplified: a statistic that hardly varies is divided by 1 % of the median standard deviation, and axes
    with less than 1e-6 of the largest variance, where rounding is seen, are dropped.
    """
    within = torch.cat([group - group.mean(0) for group in groups])
    std = within.square().mean(0).sqrt()
    std = std.clamp(min=0.01 * std.median())
    _, singular, axes = torch.linalg.svd(within / std, full_matrices=False)
    variance = singular**2 / len(within)
    kept = (variance > 1e-6 * variance[0]).nonzero().flatten()[:COMPONENTS]
    return torch.cat(groups).mean(0), (axes[kept] / (variance[kept, None].sqrt() * std)).T


def _read_scale(name, identity):
    """Mean (D,) and axes (D, d) that `fit` wrote. Raises UserError if missing, or made for other weights."""
    path = _folder(name) / SCALE_FILE
    repair = f"make it: python -m evaluation.features --fit {name} --data-path ROOT [ROOT ...]"
    if not path.is_file():
        raise UserError(f"{path}: no such file, expected the axes of the features; {repair}")
    scale, about = read_tensors(path, repair)
    if about.get("autoencoder") != weights_of(identity) or not {"mean", "axes"} <= scale.keys():
        raise UserError(f"{path}: made for weights {about.get('autoencoder')}, found {weights_of(identity)}; {repair}")
    return scale["mean"], scale["axes"]


def _folder(name):
    return Path(NAMED[name] if name in SPACES else name)


def _open_autoencoder(name, device):
    if not (_folder(name) / "config.json").is_file():
        raise UserError(f"--features {name}: no autoencoder in {_folder(name)} (expected config.json and "
                        "weights, as diffusers saves them); make one with train_vae.py")
    return VaeCodec(name, device)


def main():
    args = parser().parse_args()
    device = runtime.start().device
    kinds = []
    for root in args.data_path:  # fold 0 has every image that is not in test.csv
        known = [path for split in ("train_0", "val_0") for path in read_split(root, split).paths]
        order = torch.randperm(len(known), generator=generator(0, "feature scale"))
        kinds.append([known[i] for i in order[:args.images].tolist()])
    fit(args.fit, kinds, args.sizes, device)
    print(f"{_folder(args.fit) / SCALE_FILE}: from {sum(map(len, kinds))} images at {args.sizes} pixels")


def parser():
    p = Parser(__doc__)
    p.add_argument("--fit", required=True, metavar="NAME", help="retina, or the folder of an autoencoder")
    p.add_argument("--data-path", nargs="+", required=True, metavar="ROOT",
                   help="data roots of prepare_data.py")
    outside.add_flag(p)
    p.add_argument("--images", type=integer(2), default=500, help="images taken from each root, at most")
    p.add_argument("--sizes", type=integer(16), nargs="+", default=(256, 128, 64), metavar="PIXELS",
                   help="image sizes over which the scale is measured")
    return p


if __name__ == "__main__":
    run(main)
