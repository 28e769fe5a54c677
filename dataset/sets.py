"""Sets of images that are compared: the splits of a data root, and what a sampler made."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from core.errors import UserError
from core.random import generator
from dataset.images import load_image
from dataset.root import read_split

PICTURE = "real_vs_generated"  # what evaluate.py leaves beside the images is no sample


@dataclass(frozen=True)
class ImageSet:
    """n images under one name in the table."""

    name: str
    folder: Path
    paths: list
    labels: np.ndarray | None = None  # (n, K), None where nothing says what they show
    about: dict = field(default_factory=dict)  # model, seed, steps, ...: what the sampler wrote down

    def __len__(self):
        return len(self.paths)

    def take(self, indices, name=None):
        """The images of these indices, as a set."""
        labels = None if self.labels is None else self.labels[indices]
        return replace(self, paths=[self.paths[i] for i in indices], labels=labels, name=name or self.name)

    def split_at_random(self, count, *seed):
        """`count` images drawn at random and the rest, both in their old order."""
        order = torch.randperm(len(self), generator=generator(*seed)).tolist()
        return self.take(sorted(order[:count])), self.take(sorted(order[count:]))

    @cached_property
    def digest(self):
        """SHA-256 over the contents of the files, in their order."""
        total = hashlib.sha256()
        for path in self.paths:
            total.update(hashlib.sha256(Path(path).read_bytes()).digest())
        return total.hexdigest()


def open_real(root, name):
    """ROOT/{name}.csv as a set, and its label names."""
    split = read_split(root, name)
    return ImageSet(f"real: {name}", Path(root), split.image_paths, split.labels), split.label_names


def open_generated(folder, fold, label_names):
    """The images of a sample folder that answer the validation labels of this fold.

    FOLDER/val_syn_{fold}.csv or, where there is none, the PNG files of FOLDER/gen_samples_val or of FOLDER itself,
    unlabelled; never gen_samples, the expansion of the training set. Second value: a remark, or None.
    """
    name = folder.resolve().name
    if list(folder.glob("val_syn_*.csv")):  # the CSV of another fold is an error, no reason to take any PNG
        split = read_split(folder, f"val_syn_{fold}")
        if split.label_names != label_names:
            raise UserError(f"{split.path}: labels {' '.join(split.label_names)}, expected those of --real: "
                            f"{' '.join(label_names)}")
        return ImageSet(name, folder, split.image_paths, split.labels, about_samples(folder)), None
    if (folder / f"val_syn_{fold}.npy").is_file():  # the sampler writes it first and the CSV last
        raise UserError(f"--gen {folder}: its sampling is unfinished (no val_syn_{fold}.csv); run the sampler again")
    for place in (folder / "gen_samples_val", folder):
        paths = sorted(p for p in place.glob("*.png") if not p.name.startswith(PICTURE))
        if paths:
            remark = f"{folder}: no val_syn_{fold}.csv; taking {len(paths)} PNG files of {place}, unlabelled"
            return ImageSet(name, folder, paths, about=about_samples(folder)), remark
    raise UserError(f"--gen {folder}: no such folder, or no image in it (expected val_syn_{fold}.csv, "
                    "gen_samples_val/*.png or *.png); make them with sample_ddp_val.py")


def about_samples(folder):
    """What the sampler wrote of itself; of foreign folders nothing is known."""
    file = folder / "settings.json"
    if not file.is_file():
        return {}
    try:
        about = json.loads(file.read_text()).get("about", {})
        if not isinstance(about, dict):
            raise ValueError(f"about is {about!r:.40}")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file}: damaged ({error}); remove it or sample again") from None
    return about


def check_size(paths, size):
    """Raise UserError unless every file is a readable image of size × size pixels."""
    with ThreadPoolExecutor(4) as pool:
        for path, (height, width) in zip(paths, pool.map(lambda p: load_image(p).shape[:2], paths), strict=True):
            if (height, width) != (size, size):
                raise UserError(f"{path}: {width} × {height} pixels, expected {size} × {size}; "
                                "give --image-size as it was in sampling")
