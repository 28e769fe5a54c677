"""What the classifier of one fold is trained, chosen and tested on, checked for leaks before anything is read twice."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from classification.synthetic import choose, columns, leaks, open_synthetic
from core.errors import UserError
from dataset.eyes import eye_ids
from dataset.root import fingerprint, read_split


@dataclass(frozen=True)
class Images:
    """n images: their files, labels, patients and eyes."""

    paths: list
    labels: np.ndarray  # (n, K), 0 or 1
    filenames: tuple  # relative to the data root or sample folder
    patients: tuple
    eyes: list | None  # None where it is not known which images show the same eye

    def __len__(self):
        return len(self.paths)


@dataclass(frozen=True)
class Fold:
    """One fold of cross-validation. `training` holds the real images first, then the synthetic ones."""

    number: int
    label_names: tuple
    training: Images
    validation: Images
    test: Images
    real: int  # how many of the training images are real
    synthetic: list  # of Synthetic
    hashes: dict  # split -> SHA-256 of its CSV file
    remarks: list  # what a reader of the scores must know


def folds_of(root, asked):
    """The numbers of the folds that `--fold` asks for: a number, or "all" that there are."""
    if asked != "all":
        return [asked]
    found = sorted(int(p.stem.partition("_")[2]) for p in Path(root).glob("train_*.csv")
                   if p.stem.partition("_")[2].isdecimal())
    if not found:
        raise UserError(f"--fold all: {root} holds no train_0.csv; make a data root with prepare_data.py")
    return found


def read_fold(args, number):
    """Everything about a fold but pixels. Raises UserError, for leaks too unless --allow-leaks."""
    splits = {name: read_split(args.data_path, file) for name, file in
              (("train", f"train_{number}"), ("val", f"val_{number}"), ("test", "test"))}
    real = splits["train"]
    for split in splits.values():
        if split.label_names != real.label_names:
            raise UserError(f"{split.path}: labels {' '.join(split.label_names)}, expected those of "
                            f"{real.path.name}: {' '.join(real.label_names)}")
    label_names = chosen_labels(args.labels, real)
    order = [real.label_names.index(name) for name in label_names]
    synthetic = [open_synthetic(folder, number) for folder in args.synthetic]
    training, synthetic_labels = images_of(real, order), []
    reasons, remarks = shared(splits), []
    for s in synthetic:
        synthetic_labels.append(columns(s.split, label_names, real, args.labels))
        more_reasons, more_remarks = leaks(s, args.data_path, number)
        reasons, remarks = reasons + taken(s, splits) + more_reasons, remarks + more_remarks
    if reasons and not args.allow_leaks:
        raise UserError(f"{reasons[0]}; scores would flatter (--allow-leaks computes them all the same)")
    for i, (s, labels) in enumerate(zip(synthetic, synthetic_labels, strict=True)):
        limit = len(s.split) if args.real_to_synthetic is None else (
            int(args.real_to_synthetic * len(real)) // len(synthetic))
        training = joined(training, s.split, labels, choose(len(s.split), limit, len(real), args.global_seed, i))
    fold = Fold(number, label_names, training, images_of(splits["val"], order), images_of(splits["test"], order),
                len(real), synthetic, {name: fingerprint(split) for name, split in splits.items()},
                [f"LEAK: {reason}" for reason in reasons] + remarks)
    if not (fold.validation.labels.any(0) & ~fold.validation.labels.all(0)).any():
        raise UserError(f"{splits['val'].path}: no label has images with and without it, expected one at least to "
                        "choose the network by; prepare more patients or fewer folds")
    return fold


def taken(synthetic, splits):
    """Validation or test images, or images of their patients, among the synthetic ones: one line for each split."""
    found, own = [], {path.resolve() for path in synthetic.split.image_paths}
    for name in ("val", "test"):
        images = own & {path.resolve() for path in splits[name].image_paths}
        patients = {*synthetic.split.patients} & {*splits[name].patients}
        if images or patients:
            what = f"image {min(images)}" if images else f"patient {min(patients)}"
            found.append(f"{synthetic.split.path}: lists {what}, which is of {splits[name].path.name}")
    return found


def chosen_labels(asked, real):
    """The labels to learn, in the order of the CSV. Raises UserError."""
    unknown = [name for name in asked or () if name not in real.label_names]
    if unknown:
        raise UserError(f"--labels {unknown[0]}: {real.path} has {' '.join(real.label_names)}")
    return tuple(name for name in real.label_names if not asked or name in asked)


def images_of(split, order):
    return Images(split.image_paths, split.labels[:, order], split.filenames, split.patients, eye_ids(split))


def joined(images, split, labels, chosen):
    """The images and, after them, the chosen ones of a synthetic split."""
    paths = split.image_paths
    return Images(images.paths + [paths[i] for i in chosen], np.concatenate([images.labels, labels[chosen]]),
                  images.filenames + tuple(split.filenames[i] for i in chosen),
                  images.patients + tuple(split.patients[i] for i in chosen), None)


def shared(splits):
    """Patients and image files that are in two splits: one line for each pair of splits."""
    found = []
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        for kind, key in (("patient", "patients"), ("image", "filenames")):
            both = {*getattr(splits[a], key)} & {*getattr(splits[b], key)}
            if both:
                found.append(f"{splits[a].path} and {splits[b].path.name}: {len(both)} {kind}(s) in both, the first is "
                             f"{min(both)}")
                break
    return found
