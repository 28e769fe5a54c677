"""What the classifier of one fold is trained, chosen and tested on, checked for leaks before any pixel is read."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from classification.filtering import classifier_file
from classification.synthetic import choose, columns, leaks_of, open_synthetic
from core.errors import UserError
from dataset import leaks
from dataset.root import fingerprint, read_split
from dataset.sets import LabelledImages


@dataclass(frozen=True)
class Fold:
    """One fold of cross-validation. `training` holds the real images first, then the synthetic ones."""

    number: int
    label_names: tuple
    training: LabelledImages
    validation: LabelledImages
    test: LabelledImages
    real: int  # how many of the training images are real
    synthetic: list  # of Synthetic
    pools: list  # of (LabelledImages, labels (n, K)), all images of each of them
    hashes: dict  # split -> SHA-256 of its CSV file
    remarks: list  # warnings for whoever reads the scores
    seen: list  # identities (dataset/leaks.py) of the real training images
    filter: Path | None = None  # the file of a classifier that judges the generated images
    filtered: dict | None = None  # what it said of them (classification/filtering.py)

    def mixed(self, ratio, seed, kept=None):
        """The same fold, its real training images joined by generated ones.

        Of each pool `kept` (indices, ascending; None: all) are taken, over all pools at most `ratio` images for each
        real one (None: any number), chosen by `seed`.
        """
        training = self.training.take(range(self.real))
        limit = sum(len(split) for split, _ in self.pools) if ratio is None else \
            int(ratio * self.real) // max(1, len(self.pools))
        for i, (split, labels) in enumerate(self.pools):
            mine = range(len(split)) if kept is None else kept[i]
            chosen = choose(len(mine), limit, self.real, seed, i)
            training = joined(training, split, labels, [mine[j] for j in chosen])
        return replace(self, training=training)


def folds_of(root, asked):
    """The numbers of the folds that `--fold` asks for: one number, or "all" of the data root. Raises UserError."""
    if asked != "all":
        return [asked]
    suffixes = [path.stem.partition("_")[2] for path in Path(root).glob("train_*.csv")]
    folds = sorted(int(suffix) for suffix in suffixes if suffix.isdecimal())
    if not folds:
        raise UserError(f"--fold all: {root} holds no train_0.csv; make a data root with prepare_data.py")
    return folds


def read_fold(root, number, labels=None, synthetic=(), synthetic_ratio=None, allow_leaks=False, seed=0, judge=None):
    """Everything about a fold but pixels. Raises UserError, for leaks too unless `allow_leaks`.

    `labels`: names of those to learn (None: all). `synthetic`: sample folders, or folders that hold one per fold; of
    them at most `synthetic_ratio` images per real one are taken (None: all), chosen by `seed`. `judge`: output folder
    of classify.py whose network of this fold is to filter them.
    """
    splits = {"train": read_split(root, f"train_{number}"), "val": read_split(root, f"val_{number}"),
              "test": read_split(root, "test")}
    real = splits["train"]
    for split in splits.values():
        if split.label_names != real.label_names:
            raise UserError(f"{split.csv}: labels {' '.join(split.label_names)}, expected those of "
                            f"{real.csv.name}: {' '.join(real.label_names)}")
    label_names = chosen_labels(labels, real)
    samples = [open_synthetic(folder, number) for folder in synthetic]
    sample_labels = [columns(s.split, label_names, real, labels) for s in samples]
    reasons, remarks = all_leaks(splits, samples, root, number)
    if reasons and not allow_leaks:
        raise UserError(f"{reasons[0]}; scores would flatter (--allow-leaks computes them all the same)")
    validation, test = with_labels(splits["val"], label_names), with_labels(splits["test"], label_names)
    if not (validation.labels.any(0) & ~validation.labels.all(0)).any():
        raise UserError(f"{splits['val'].csv}: no label has images with and without it, expected one at least to "
                        "choose the network by; prepare more patients or fewer folds")
    fold = Fold(number, label_names, with_labels(real, label_names), validation, test, real=len(real),
                synthetic=samples, pools=[(s.split, y) for s, y in zip(samples, sample_labels, strict=True)],
                hashes={name: fingerprint(split) for name, split in splits.items()},
                remarks=[f"LEAK: {reason}" for reason in reasons] + remarks, seen=leaks.identities(real),
                filter=judge and classifier_file(judge, number))
    return fold.mixed(synthetic_ratio, seed)


def all_leaks(splits, samples, root, number):
    """Every way in which validation or test images would be trained on -> (reasons, remarks), lists of lines."""
    reasons, remarks = shared(splits), [line for split in splits.values() for line in leaks.unknown_patients(split)]
    for s in samples:
        more_reasons, more_remarks = leaks_of(s, root, number, splits)
        reasons += taken(s, splits) + more_reasons
        remarks += more_remarks
    return reasons, remarks


def taken(synthetic, splits):
    """Validation or test images, or images of their patients, among the synthetic ones: one line for each split."""
    return [line for name in ("val", "test") for line in leaks.shared(synthetic.split, splits[name])]


def chosen_labels(asked, real):
    """The labels to learn, in the order of the CSV. Raises UserError."""
    unknown = [name for name in asked or () if name not in real.label_names]
    if unknown:
        raise UserError(f"--labels {unknown[0]}: {real.csv} has {' '.join(real.label_names)}")
    return tuple(name for name in real.label_names if not asked or name in asked)


def with_labels(split, label_names):
    """The images of a split with these labels, in this order."""
    order = [split.label_names.index(name) for name in label_names]
    return replace(split, labels=split.labels[:, order], label_names=label_names)


def joined(images, split, labels, chosen):
    """The images and, after them, the chosen ones of a synthetic split, with the given labels (n, K) of all of it."""
    more = split.take(chosen)
    return replace(images, paths=images.paths + more.paths, labels=np.concatenate([images.labels, labels[chosen]]),
                   filenames=images.filenames + more.filenames, patients=images.patients + more.patients, eyes=None)


def shared(splits):
    """Patients and pictures that two splits share, one line for each."""
    return [line for a, b in (("train", "val"), ("train", "test"), ("val", "test"))
            for line in leaks.shared(splits[a], splits[b])]
