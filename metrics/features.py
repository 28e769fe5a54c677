"""Feature spaces: images -> vectors in which sets of images are compared.

    python -m metrics.features --fit retina --data-path data/oct data/fundus

`features = open_features(name)` has `name`, `identity` (changes whenever the numbers may) and `dimensions`;
`features(images)` takes uint8 (N, H, W, 3) to float32 (N, dimensions). A new space is one more such class and
its row in SPACES.

`retina` is the bundled autoencoder's encoder. It has seen retinas only and needs no download; its numbers say
which of two sets is nearer to the real one, and must not be set beside numbers of another space.
The command above measures, once, the axes on which its features are expressed (see `fit`).
"""

import hashlib
import itertools
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from pipeline import runtime
from pipeline.cli import Parser, UserError, integer, run
from pipeline.data import check_images, load_images, read_split
from pipeline.files import write_atomically
from pipeline.seeds import generator
from pipeline.vae import NAMED, VaeCodec, to_model_range

SCALE_FILE = "feature_scale.safetensors"  # lies in the folder of the autoencoder it belongs to
COMPONENTS = 128  # principal axes that are kept, of 720 features of the bundled autoencoder


class AutoencoderFeatures:
    """What an autoencoder's encoder sees (`channel_statistics`), whitened and brought to one length.

    KID's kernel, (x·y / d + 1)³, is not free of scale. Seven tenths of the variance of the standardised statistics
    lie in two directions; compared as they are, little else would count, and a few outlying images would outweigh
    all others. So they are expressed on axes along which images of one kind vary by 1, and the vector is given the
    length √d: the kernel is then (cosine + 1)³, between 0 and 8. Mean and axes were measured once, on the
    autoencoder's training images; they belong to the space, not to the sets that are compared.
    """

    def __init__(self, name, device="cpu"):
        codec = _open_autoencoder(name, device)
        mean, axes = _read_scale(name, codec.identity)
        self.vae, self.mean, self.axes = codec.vae, mean.to(device), axes.to(device)
        self.name = name if name in SPACES else f"vae:{Path(name).resolve().name}"
        digest = hashlib.sha256(mean.numpy().tobytes() + axes.numpy().tobytes()).hexdigest()[:8]
        self.identity, self.dimensions = f"{self.name}:{_weights(codec.identity)}:{digest}", axes.shape[1]

    def __call__(self, images, batch_size=32):
        """uint8 (N, H, W, 3), array or tensor, any H and W of at least 8 -> float32 array (N, dimensions)."""
        parts = [(channel_statistics(self.vae, part) - self.mean) @ self.axes
                 for part in torch.as_tensor(images).split(batch_size)]
        values = torch.cat(parts)  # (N, d)
        values = values * (self.dimensions**0.5 / values.norm(dim=1, keepdim=True).clamp(min=1e-6))
        return values.cpu().numpy()


SPACES = {"retina": AutoencoderFeatures}  # name -> class, called with (name, device)


def open_features(name, device="cpu"):
    """The feature space `name`: one of SPACES, or the folder of an autoencoder. Raises UserError."""
    if name not in SPACES and not Path(name).is_dir():
        raise UserError(f"--features {name}: expected {', '.join(SPACES)} or the folder of an autoencoder")
    return SPACES.get(name, AutoencoderFeatures)(name, device)


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


def extract(features, image_paths, image_size, batch_size=32, progress=None):
    """Features (n, D) of image files, in their order; `progress` names the progress bar, None = no bar.

    Real and generated images take the same path: files that are not image_size × image_size are cropped.
    """
    parts = [np.zeros((0, features.dimensions), np.float32)]
    with tqdm(total=len(image_paths), desc=progress, unit="image", disable=None if progress else True) as bar:
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
    groups = []
    total = len(sizes) * sum(map(len, kinds))
    with tqdm(total=total, desc=f"scale of {name}", unit="image", disable=None) as bar:
        for size, paths in itertools.product(sizes, kinds):
            groups.append([])
            for start in range(0, len(paths), batch_size):
                images = load_images(paths[start:start + batch_size], size)
                groups[-1].append(channel_statistics(codec.vae, images).double().cpu())
                bar.update(len(images))
    mean, axes = whitening([torch.cat(group) for group in groups])
    scale = {"mean": mean.float(), "axes": axes.float().contiguous()}
    made_from = {"autoencoder": _weights(codec.identity), "images": str(sum(map(len, kinds))),
                 "sizes": " ".join(str(size) for size in sizes)}
    write_atomically(_folder(name) / SCALE_FILE, lambda path: save_file(scale, path, made_from))


def whitening(groups):
    """Statistics of m kinds of images, each (n_i, D) -> mean (D,) and axes (D, d) for (values − mean) @ axes.

    Along each axis the images of one kind have variance 1, pooled over the kinds, and no two axes are correlated.
    What sets the kinds apart (OCT from fundus, 64 from 256 pixels) is left out of the measure, so it stays large.
    The axes are the first COMPONENTS principal ones after each statistic was divided by its own deviation. Nothing
    is blown up: one that hardly varies is given 1 % of the median deviation, and axes with less than 1e-6 of the
    largest variance, where rounding is seen, are dropped.
    """
    within = torch.cat([group - group.mean(0) for group in groups])
    std = within.square().mean(0).sqrt()
    std = std.clamp(min=0.01 * std.median())
    _, deviation, axes = torch.linalg.svd(within / std, full_matrices=False)
    variance = deviation**2 / len(within)
    kept = (variance > 1e-6 * variance[0]).nonzero().flatten()[:COMPONENTS]
    return torch.cat(groups).mean(0), (axes[kept] / (variance[kept, None].sqrt() * std)).T


def _read_scale(name, identity):
    """Mean (D,) and axes (D, d) that `fit` wrote. Raises UserError if missing, or made for other weights."""
    path = _folder(name) / SCALE_FILE
    repair = f"make it: python -m metrics.features --fit {name} --data-path ROOT [ROOT ...]"
    if not path.is_file():
        raise UserError(f"{path}: no such file, expected the axes of the features; {repair}")
    try:
        with safe_open(path, "pt") as file:
            made_for = (file.metadata() or {}).get("autoencoder")
            scale = file.get_tensor("mean"), file.get_tensor("axes")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {repair}") from None
    if made_for != _weights(identity):
        raise UserError(f"{path}: made for weights {made_for}, found {_weights(identity)}; {repair}")
    return scale


def _folder(name):
    return Path(NAMED[name] if name in SPACES else name)


def _open_autoencoder(name, device):
    if not (_folder(name) / "config.json").is_file():
        raise UserError(f"--features {name}: no autoencoder in {_folder(name)} (expected config.json and "
                        "weights, as diffusers saves them); make one with train_vae.py")
    return VaeCodec(name, device)


def _weights(identity):
    """The hash in a codec's identity `name:hash`: a folder may be renamed, the weights stay the same."""
    return identity.rpartition(":")[2]


def main():
    args = parser().parse_args()
    device = runtime.start().device
    kinds = []
    for root in args.data_path:  # fold 0 has every image that is not in test.csv
        known = [path for split in ("train_0", "val_0") for path in read_split(root, split).image_paths]
        order = torch.randperm(len(known), generator=generator(0, "feature scale"))
        kinds.append([known[i] for i in order[:args.images].tolist()])
    fit(args.fit, kinds, args.sizes, device)
    print(f"{_folder(args.fit) / SCALE_FILE}: from {sum(map(len, kinds))} images at {args.sizes} pixels")


def parser():
    p = Parser(__doc__)
    p.add_argument("--fit", required=True, metavar="NAME", help="retina, or the folder of an autoencoder")
    p.add_argument("--data-path", nargs="+", required=True, metavar="ROOT",
                   help="data roots of prepare_data.py")
    p.add_argument("--images", type=integer(2), default=500, help="images taken from each root, at most")
    p.add_argument("--sizes", type=integer(16), nargs="+", default=(256, 128, 64), metavar="PIXELS",
                   help="image sizes over which the scale is measured")
    return p


if __name__ == "__main__":
    run(main)
