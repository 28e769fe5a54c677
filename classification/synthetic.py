"""Generated images to train a classifier with: in which folder they are, whether they leak, how many are taken.

A sample folder of sample_ddp.py holds train_syn_{fold}.csv: images made with the labels of train_{fold}.csv. Images
made with the labels of validation or test images, or by a generator that was trained on such images, are a leak.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from core.errors import UserError
from core.random import generator
from dataset import leaks
from dataset.root import fingerprint, read_split
from dataset.samples import about_samples, read_samples, sample_folders, seen_by
from dataset.sets import LabelledImages

# What a sampler says of its images beside what tells them from others; older ones said none of it.
UNTOLD = ("checkpoint", "weights_hash", "training", "training_seed")


@dataclass(frozen=True)
class Synthetic:
    """One sample folder for one fold. `about` is what the sampler wrote of itself; {} where nothing is known."""

    folder: Path
    split: LabelledImages
    about: dict

    @property
    def identity(self):
        """What tells these images from others; part of a fold's settings."""
        about = {name: value for name, value in self.about.items() if name not in UNTOLD}
        return {"folder": self.folder.name, "sha256": fingerprint(self.split), "about": about}

    @property
    def model(self):
        """The name of the generator: what the sampler says, or else the first part of the folder's name."""
        return self.about.get("model") or self.folder.resolve().name.partition("-GS-fold-")[0]


def find_folder(directory, fold):
    """The sample folder of this fold: `directory` itself or the one in it that holds its CSV. Raises UserError."""
    directory, wanted = Path(directory), f"train_syn_{fold}.csv"
    if not directory.is_dir():
        raise UserError(f"--synthetic {directory}: no such folder; make it with sample_ddp.py --fold {fold}")
    found = sample_folders(directory, wanted)
    if directory in found:
        return directory
    _refuse_other_samples(directory, fold)
    if len(found) > 1:
        raise UserError(f"--synthetic {directory}: {len(found)} folders in it hold {wanted} ({found[0].name}, "
                        f"{found[1].name}, ...); name the one that is meant")
    if not found:
        unfinished = sorted(path.parent.name for path in directory.glob(f"*/train_syn_{fold}.npy"))
        hint = f" (the sampling of {unfinished[0]} is unfinished)" if unfinished else ""
        raise UserError(f"--synthetic {directory}: neither it nor a folder in it holds {wanted}{hint}; make it with "
                        f"sample_ddp.py --fold {fold}")
    return found[0]


def _refuse_other_samples(folder, fold):
    """Raise UserError where a folder itself holds samples of another split or fold, or unfinished ones."""
    others = sorted(p.name for p in folder.glob("*_syn_*.csv"))
    if any(name.startswith("val_syn") for name in others):
        raise UserError(f"--synthetic {folder}: holds {others[-1]}, images made with the labels of validation images, "
                        f"expected train_syn_{fold}.csv; make them with sample_ddp.py")
    if others:
        raise UserError(f"--synthetic {folder}: holds {others[0]}, made with the labels of another fold, expected "
                        f"train_syn_{fold}.csv for fold {fold}; give the folder of that fold or their common parent")
    if (folder / f"train_syn_{fold}.npy").is_file():  # the sampler writes it first and the CSV last
        raise UserError(f"--synthetic {folder}: its sampling is unfinished (no train_syn_{fold}.csv); run the sampler "
                        "again")


def open_synthetic(directory, fold):
    """The synthetic images of a fold. Raises UserError."""
    folder = find_folder(directory, fold)
    return Synthetic(folder, read_samples(folder, f"train_syn_{fold}"), about_samples(folder))


def leaks_of(synthetic, root, fold, splits):
    """Whether these images leak what the classifier of this fold is tested on -> (reasons, remarks), lists of lines.

    A reason says why they do, a remark what cannot be known. Labels may be those of train_{fold}.csv row by row or
    made by hand, but not those of another CSV of the root. The generator must not have seen images of `splits` "val"
    and "test"; where it does not say what it has seen, it must have been trained on this fold.
    """
    csv, folder = synthetic.split.csv, synthetic.folder
    reasons, remarks = [], []
    source = _labels_from(synthetic.split, root, fold)
    if source not in (None, f"train_{fold}"):
        reasons.append(f"{csv}: its labels are those of {Path(root) / source}.csv, expected those of train_{fold}.csv")
    elif source is None:
        remarks.append(f"{csv}: its labels are not those of train_{fold}.csv row by row")
    known = seen_by(folder)
    trained_on, trained_fold = (synthetic.about.get(key) for key in ("training_images", "trained_on_fold"))
    if known is not None:
        for split in (splits["val"], splits["test"]):
            if count := leaks.seen(known, split):
                reasons.append(f"{folder}: its generator was trained on {count} of the {len(split)} images of "
                               f"{split.csv.name}")
    elif trained_on:  # of older samplers
        prints = {path.stem: fingerprint(read_split(root, path.stem)) for path in csv_files(root)}
        if trained_on != prints[f"train_{fold}"]:
            source = next((f"{name}.csv" for name, value in prints.items() if value == trained_on), None)
            what = source or f"images that {root} does not list (fold {trained_fold} of other data)"
            reasons.append(f"{folder}: its generator was trained on {what}, expected train_{fold}.csv")
    elif trained_fold is not None and trained_fold != fold:
        reasons.append(f"{folder}: its generator was trained on fold {trained_fold}, whose training images include "
                       f"validation images of fold {fold}; expected fold {fold}")
    else:
        remarks.append(f"{folder}: does not say which images its generator was trained on; if validation or test "
                       "images were among them, the scores flatter")
    return reasons, remarks


def csv_files(root):
    """The CSV files of the splits of a data root."""
    return sorted(path for name in ("train_*", "val_*", "test") for path in Path(root).glob(f"{name}.csv"))


def _labels_from(split, root, fold):
    """Name of the CSV of a data root whose labels, in its order, a split repeats once or several times; or None."""
    for path in [Path(root) / f"train_{fold}.csv", *csv_files(root)]:
        other = read_split(root, path.stem)
        if set(other.label_names) <= set(split.label_names) and len(split) % len(other) == 0:
            order = [split.label_names.index(name) for name in other.label_names]
            if np.array_equal(split.labels[:, order], np.tile(other.labels, (len(split) // len(other), 1))):
                return path.stem
    return None


def columns(split, label_names, real, chosen):
    """The labels (n, K) of a synthetic split in the order of `label_names`. Raises UserError.

    Unless the user has chosen some of the labels (`chosen`), real and synthetic images must have the same labels.
    """
    missing = [name for name in label_names if name not in split.label_names]
    if missing or (not chosen and set(split.label_names) != set(label_names)):
        raise UserError(f"{split.csv}: labels {' '.join(split.label_names)}, but {real.csv} has "
                        f"{' '.join(real.label_names)}; sample with a model trained on these labels, or choose common "
                        "ones with --labels")
    return split.labels[:, [split.label_names.index(name) for name in label_names]]


def choose(count, limit, real, seed, *purpose):
    """Which of `count` synthetic images to take, at most `limit` -> their indices, ascending.

    The sampler repeats the labels of the `real` training images: as many whole rounds as fit keep the distribution of
    labels, and what then lacks to `limit` is drawn at random from the next round.
    """
    if limit >= count:
        return list(range(count))
    whole = limit // real * real
    rest = range(whole, min(count, whole + real))
    order = torch.randperm(len(rest), generator=generator(seed, "synthetic", *purpose))[:limit - whole]
    return [*range(whole), *sorted(rest[i] for i in order.tolist())]


def default_method(synthetic, augment):
    """The name of a row of the table, where the user gives none."""
    models = [re.sub(r"[^\w.+-]+", "-", s.model) for s in synthetic]
    return "+".join(dict.fromkeys(models)) or ("baseline" if augment != "none" else "baseline-without-augmentation")
