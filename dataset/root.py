"""A data root: images and the CSV files that describe them.

ROOT/train_{fold}.csv, val_{fold}.csv, test.csv: an index column, `filename` (relative to ROOT), one 0/1
column per label, and optionally `patient_name`, `client_id`, `multi_class_label`, `eye` (dataset/eyes.py). Every
other column is a label, so a root describes itself; nothing is guessed from a path.
"""

import csv
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core.errors import UserError
from core.files import write_csv

NOT_LABELS = ("filename", "patient_name", "client_id", "multi_class_label", "eye")
INDEX_NAMES = ("", "Unnamed: 0", "index")  # what csv writers call the index column


@dataclass(frozen=True)
class Split:
    """One CSV file of a data root: n images and their K labels."""

    path: Path  # the CSV itself
    filenames: tuple  # n names, relative to the root
    labels: np.ndarray  # (n, K) float32, 0 or 1
    label_names: tuple  # K names
    patients: tuple  # n names; the file name where the CSV has no `patient_name`
    eyes: tuple | None = None  # n names from the column `eye`, unique within a patient; None without such a column

    def __len__(self):
        return len(self.filenames)

    @property
    def image_paths(self):
        return [self.path.parent / name for name in self.filenames]


def read_split(root, name, num_classes=None):
    """Read ROOT/{name}.csv (name = train_0, val_0, test, ...) and check it against the images on disk.

    Raises UserError if the file is missing or empty, names a missing image, holds a label that is not 0 or 1,
    or has another number of labels than `num_classes`.
    """
    path = Path(root) / f"{name}.csv"
    if not path.is_file():
        found = ", ".join(sorted(p.name for p in Path(root).glob("*.csv"))) or "no CSV at all"
        raise UserError(f"{path}: no such file (found: {found}); make a data root with prepare_data.py")
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = csv.DictReader(file)
        columns, rows = reader.fieldnames or [], list(reader)
    if "filename" not in columns:
        found = ", ".join(map(repr, columns)) or "an empty file"
        raise UserError(f"{path}: no column `filename` (found: {found[:80]}; expected UTF-8, separated by commas)")
    if not rows:
        raise UserError(f"{path}: holds no image; prepare more patients or fewer folds")
    label_names = tuple(c for c in columns if c not in NOT_LABELS and c not in INDEX_NAMES)
    if not label_names:
        raise UserError(f"{path}: no label column (found: {', '.join(columns)}); add one of 0 and 1 for each label")
    ragged = next((i for i, row in enumerate(rows) if None in row or None in row.values()), None)
    if ragged is not None:
        raise UserError(f"{path}, row {ragged + 1}: expected {len(columns)} cells, as in the first line")
    if num_classes is not None and num_classes != len(label_names):
        raise UserError(
            f"--num-classes {num_classes}: {path} has {len(label_names)} labels "
            f"({' '.join(label_names)}); give --num-classes {len(label_names)}"
        )
    split = Split(
        path=path,
        filenames=tuple(row["filename"] for row in rows),
        labels=_labels(path, rows, label_names),
        label_names=label_names,
        patients=tuple(row.get("patient_name") or row["filename"] for row in rows),
        eyes=tuple(row["eye"] for row in rows) if "eye" in columns else None,
    )
    if split.eyes and not all(split.eyes):
        raise UserError(f"{path}, row {split.eyes.index('') + 1}: `eye` is empty; fill it in or remove the column")
    if len(set(split.filenames)) < len(split):
        twice = next(f for f in split.filenames if split.filenames.count(f) > 1)
        raise UserError(f"{path}: names {twice} more than once; keep one row for each image")
    missing = [p for p in split.image_paths if not p.is_file()]
    if missing:
        raise UserError(f"{path}: names {len(missing)} missing file(s), the first is {missing[0]}")
    return split


def file_sizes(split):
    """SHA-256 of the sizes of the image files of a split: cheap, and most exchanged images change it."""
    sizes = [path.stat().st_size for path in split.image_paths]
    return hashlib.sha256(repr(sizes).encode()).hexdigest()


def fingerprint(split):
    """SHA-256 of the CSV file of a split."""
    return hashlib.sha256(split.path.read_bytes()).hexdigest()


def _labels(path, rows, label_names):
    labels = np.zeros((len(rows), len(label_names)), np.float32)
    for i, row in enumerate(rows):
        for k, name in enumerate(label_names):
            if row[name] not in ("0", "1", "0.0", "1.0"):
                raise UserError(f"{path}, row {i + 1}: label {name} is {row[name]!r}, expected 0 or 1")
            labels[i, k] = float(row[name])
    return labels


def write_split(root, name, filenames, labels, label_names, patients):
    """Write ROOT/{name}.csv in the layout that `read_split` reads."""
    rows = [[i, f, *(int(v) for v in y), p]
            for i, (f, y, p) in enumerate(zip(filenames, labels, patients, strict=True))]
    write_csv(Path(root) / f"{name}.csv", ["", "filename", *label_names, "patient_name"], rows)
