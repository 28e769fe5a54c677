"""The latent cache: posterior mean and std of each training image and of its mirror image.

FEATURES/features_{fold}/ holds `manifest.json` and shards of SHARD images at most; the manifest says which VAE, images
and labels they come from, so that a stale or foreign cache is refused. Shards are mapped into memory, not read: a
training starts at once and takes no more memory for more images. Keeping the moments instead of one draw lets training
see a new draw and mirror each time (the published extraction freezes one of each for all epochs). The published layout,
one features_{fold}/{i}.npy and labels_{fold}/{i}.npy per image, is read too.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from core.errors import UserError
from core.files import file_hash, read_array, read_json, refused, write_json
from core.tensors import read_tensors, write_tensors
from dataset import contents
from dataset.vae import same_latents

FORMAT = 2
AGAIN = "remove the folder and extract again"
MANIFEST = {"vae": str, "filenames": [str], "label_names?": [str], "format?": int, "image_size?": int, "csv?": str,
            "csv_sha256?": str, "states?": [[int]], "contents?": [str]}  # schema of manifest.json (core/schema.py)
DIMENSIONS = {"first": 0, "mean": 5, "labels": 2}  # of the tensors of a shard
SHARD = 2048  # images; what a killed extraction loses is less than one shard of each process


class Stacked:
    """Tensors (n_i, …) as if they were one (n, …) along their first dimension, without copying them."""

    def __init__(self, parts):
        self.parts = parts
        self.starts = np.cumsum([0, *map(len, parts)])
        self.shape = torch.Size((int(self.starts[-1]), *parts[0].shape[1:]))

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        """As a tensor's, for an integer or a slice at first place."""
        first, *rest = index if isinstance(index, tuple) else (index,)
        if isinstance(first, slice):
            return torch.stack([self[(i, *rest)] for i in range(*first.indices(len(self)))])
        part = int(np.searchsorted(self.starts, range(len(self))[first], side="right")) - 1
        return self.parts[part][(range(len(self))[first] - int(self.starts[part]), *rest)]


def stacked(parts):
    """One tensor as it is, several as Stacked."""
    return parts[0] if len(parts) == 1 else Stacked(parts)


@dataclass(frozen=True)
class LatentCache:
    """n images in V variants (the image and its mirror image; the published layout has one)."""

    path: Path
    manifest: dict
    mean: torch.Tensor | Stacked  # (n, V, C, h, w), scaled latents
    std: torch.Tensor | Stacked | None  # the same; None where the mean is exact (pixels, or one stored draw)
    labels: torch.Tensor  # (n, K) float32

    def __len__(self):
        return len(self.mean)

    def draw(self, image, generator):
        """One training latent (C, h, w) of image number `image`: a mirror by coin, a posterior sample."""
        variant = int(torch.randint(self.mean.shape[1], (), generator=generator))
        latent = self.mean[image, variant]
        if self.std is None:
            return latent
        return latent + self.std[image, variant] * torch.randn(latent.shape, generator=generator)


def manifest_of(split, codec, image_size):
    """What a cache of these images through this codec must say of itself."""
    return {
        "format": FORMAT, "vae": codec.identity, "image_size": image_size, "label_names": list(split.label_names),
        "csv": split.csv.name, "csv_sha256": file_hash(split.csv), "filenames": list(split.filenames),
        "states": [list(contents.state(path)) for path in split.paths], "contents": contents.hashes(split.paths),
    }


def remember(manifest, split):
    """Take the contents of images that nobody has touched since extraction from the manifest, without reading them."""
    if all(len(manifest.get(key, ())) == len(split) for key in ("filenames", "states", "contents")):
        contents.remember(split.paths, manifest["states"], manifest["contents"])


def differences(manifest, expected):
    """Names of the manifest entries that differ, most telling first."""
    keys = ("format", "image_size", "label_names", "csv_sha256", "filenames", "contents")  # not "states"
    foreign = [] if same_latents(manifest.get("vae"), expected["vae"]) else ["vae"]
    return foreign + [key for key in keys if manifest.get(key) != expected[key]]


def folder(features_path, fold):
    """Where the cache of a fold lies."""
    return Path(features_path) / f"features_{fold}"


def read_manifest(path):
    """The manifest of a cache folder, or None if it has none."""
    file = Path(path) / "manifest.json"
    return read_json(file, f"remove {path} and extract again", MANIFEST) if file.is_file() else None


def write_shard(path, first, mean, std, labels):
    """Write images that follow each other, `first` being the number of the first."""
    tensors = {"first": torch.tensor(first), "mean": mean, "labels": labels}
    if std.any():
        tensors["std"] = std
    write_tensors(Path(path) / f"shard-{first:05d}.safetensors", tensors)


def finished(path, n):
    """Which of n images the shards in a folder hold: (n,) bool; damaged shards hold none."""
    done = np.zeros(n, bool)
    for file in Path(path).glob("shard-*.safetensors"):
        done[slice(*_held(file))] = True
    return done


def remove_damaged(path):
    """Remove shards that are not whole."""
    for file in Path(path).glob("shard-*.safetensors"):
        if _held(file) == (0, 0):
            file.unlink()


def _held(file):
    """First and last + 1 of the images that a shard holds; (0, 0) if it is damaged."""
    try:
        shard, _ = read_tensors(file, "", sealed=True)
        first = int(shard["first"])
        return first, first + len(shard["labels"])
    except (UserError, KeyError, ValueError):
        return 0, 0


def write_manifest(path, manifest):
    """Written last: a folder without it is not a cache."""
    write_json(Path(path) / "manifest.json", manifest)


def load(features_path, fold):
    """Read the cache of a fold, ours or the published layout. Raises UserError."""
    path = folder(features_path, fold)
    if not path.is_dir():
        others = ", ".join(sorted(p.name for p in Path(features_path).glob("features_*"))) or "no features at all"
        raise UserError(f"--fold {fold}: {path} does not exist (found: {others}); run extract_features.py --fold "
                        f"{fold}")
    manifest = read_manifest(path)
    if manifest is None:
        return _load_published(path, Path(features_path) / f"labels_{fold}")
    again = f"remove {path} and extract again"
    with ThreadPoolExecutor(4) as pool:  # their checksums are computed
        shards = list(pool.map(lambda file: _shard(file, again), path.glob("shard-*.safetensors")))
    shards.sort(key=lambda shard: int(shard["first"]))
    n = len(manifest["filenames"])
    shapes = {(s["mean"].shape[1:], s["labels"].shape[1:]) for s in shards}
    if len(shapes) != 1:
        raise UserError(f"{path}: holds shards of {len(shapes)} kinds, its manifest says {n} latents; {again}")
    counts = [len(s["mean"]) for s in shards]
    if sum(counts) != n or [int(s["first"]) for s in shards] != np.cumsum([0, *counts]).tolist()[:-1]:
        raise UserError(f"{path}: holds {sum(counts)} latents, its manifest says {n}; remove it and extract again")
    mean, labels = stacked([s["mean"] for s in shards]), torch.cat([s["labels"] for s in shards])
    std = stacked([s["std"] for s in shards]) if all("std" in s for s in shards) else None
    return LatentCache(path, manifest, mean, std, labels)


def _load_published(path, labels_path):
    """features_{fold}/{i}.npy (1, C, h, w) and labels_{fold}/{i}.npy (1, K), paired by name."""
    names = sorted((p.stem for p in path.glob("*.npy")), key=lambda name: (len(name), name))
    label_names = {p.stem for p in labels_path.glob("*.npy")}
    if not names:
        raise UserError(f"{path}: neither manifest.json nor .npy files; remove it and run extract_features.py")
    if set(names) != label_names:
        odd = sorted(set(names) ^ label_names)[0]
        raise UserError(f"{path} and {labels_path}: {odd}.npy is in only one of them; extract again")
    with refused(path, f"remove {path} and {labels_path} and extract again"):  # arrays of several shapes
        mean = np.stack([read_array(path / f"{name}.npy", AGAIN, 4)[0] for name in names])[:, None]
        labels = np.stack([read_array(labels_path / f"{name}.npy", AGAIN, (1, 2)).reshape(-1) for name in names])
    return LatentCache(path, {}, torch.tensor(mean).float(), None, torch.tensor(labels).float())


def _shard(file, again):
    """The tensors of a shard. Raises UserError if it is damaged, as by an interrupted copy, or something else."""
    tensors, _ = read_tensors(file, again, sealed=True)
    found = {name: tensors[name].ndim for name in DIMENSIONS if name in tensors}
    if found != DIMENSIONS or tensors.get("std", tensors["mean"]).shape != tensors["mean"].shape:
        raise UserError(f"{file}: damaged (found tensors with dimensions {found}, expected {DIMENSIONS}); {again}")
    return tensors


CHANGED = {"csv_sha256": "{csv} has changed", "filenames": "{csv} has changed", "contents": "images have changed"}


def same_rows(a, b):
    """Whether two label tables (n, K) hold the same rows in any order; the published layout keeps no names."""
    return sorted(map(tuple, torch.as_tensor(a).tolist())) == sorted(map(tuple, torch.as_tensor(b).tolist()))


def check(cache, expected, labels, codec, cells):
    """Refuse a cache that was not made from this data by this codec; the published layout can only be measured."""
    shape = (codec.channels, cells, cells)
    if tuple(cache.mean.shape[2:]) != shape:
        raise UserError(f"{cache.path}: latents of shape {tuple(cache.mean.shape[2:])}, expected {shape}; check "
                        "--image-size, --vae and --in-channels, or extract again")
    shape = (len(expected["filenames"]), len(expected["label_names"]))
    if tuple(cache.labels.shape) != shape:
        raise UserError(f"{cache.path}: {len(cache)} latents with {cache.labels.shape[1]} labels, but "
                        f"{expected['csv']} has {shape[0]} images with {shape[1]}; extract again")
    wrong = differences(cache.manifest, expected) if cache.manifest else []
    if wrong and wrong[0] in CHANGED:
        raise UserError(f"{cache.path}: {CHANGED[wrong[0]].format(**expected)} since extraction; remove it and extract "
                        "again")
    if wrong:
        own, wanted = (str(m.get(wrong[0]))[:60] for m in (cache.manifest, expected))
        raise UserError(f"{cache.path}: {wrong[0]} is {own}, expected {wanted}; give the flags it was made with "
                        "or remove it and extract again")
    labels = torch.as_tensor(labels)
    if not (torch.equal(cache.labels, labels) if cache.manifest else same_rows(cache.labels, labels)):
        raise UserError(f"{cache.path}: its labels are not those of {expected['csv']}; remove it and extract again")
