"""A data root: images and the CSV files that describe them.

ROOT/train_{fold}.csv, val_{fold}.csv, test.csv: an index column, `filename` (relative to ROOT), one 0/1
column per label, and optionally `patient_name`, `client_id`, `multi_class_label`, `eye` (dataset/eyes.py). Every
other column is a label, so a root describes itself; nothing is guessed from a path.
"""

import os
from pathlib import Path

import numpy as np

from core.errors import UserError
from core.files import file_hash, write_csv
from core.text import CONTROL, uncelled
from dataset import contents, outside
from dataset.eyes import eye_names
from dataset.sets import LabelledImages
from dataset.tables import read_cells, refuse_twice

NOT_LABELS = ("filename", "patient_name", "client_id", "multi_class_label", "eye")
INDEX_NAMES = ("", "Unnamed: 0", "index")  # what csv writers call the index column


def read_split(root, name, num_classes=None):
    """The images that ROOT/{name}.csv lists (name = train_0, val_0, test, ...), checked against those on disk.

    Raises UserError if the file is missing, empty or no table, names a missing image or, without --allow-outside, one
    that does not lie in ROOT, holds a label that is not 0 or 1, or has another number of labels than `num_classes`.
    """
    path = Path(root) / f"{name}.csv"
    columns, rows = _read_rows(path)
    label_names = tuple(c for c in columns if c not in NOT_LABELS and c not in INDEX_NAMES)
    if not label_names:
        raise UserError(f"{path}: no label column (found: {', '.join(columns)}); add one of 0 and 1 for each label")
    if num_classes not in (None, len(label_names)):
        raise UserError(
            f"--num-classes {num_classes}: {path} has {len(label_names)} labels "
            f"({' '.join(label_names)}); give --num-classes {len(label_names)}"
        )
    labels = _labels(path, rows, label_names)
    filenames = tuple(row["filename"] for row in rows.values())
    patients = tuple(row.get("patient_name") or row["filename"] for row in rows.values())
    column = [row["eye"] for row in rows.values()] if "eye" in columns else None
    if column and not all(column):
        raise UserError(f"{path}, line {[*rows][column.index('')]}: `eye` is empty; fill it in or remove the column")
    if len(set(filenames)) < len(filenames):
        twice = next(f for f in filenames if filenames.count(f) > 1)
        raise UserError(f"{path}: names {twice} more than once; keep one row for each image")
    outside.refuse(path.parent, filenames, path)
    paths = tuple(path.parent / name for name in filenames)
    missing = [p for p in paths if not os.path.isfile(p)]
    if missing:
        raise UserError(f"{path}: names {len(missing)} missing file(s), the first is {missing[0]}")
    return LabelledImages(paths, labels, label_names, filenames, patients, eye_names(filenames, patients, column),
                          csv=path, folder=Path(root), name=name)


def _read_rows(path):
    """A CSV file -> names of its columns, {line number: row as dict}. Raises UserError where it lists no images."""
    if not path.is_file():
        others = ", ".join(sorted(p.name for p in path.parent.glob("*.csv"))) or "no CSV at all"
        raise UserError(f"{path}: no such file (found: {others}); make a data root with prepare_data.py")
    names, lines = read_cells(path, ("utf-8-sig",), ",")
    columns = [_plain(path, 1, name) for name in names]
    refuse_twice(path, [name for name in columns if name not in INDEX_NAMES])
    if "filename" not in columns:
        named = ", ".join(map(repr, columns))
        raise UserError(f"{path}: no column `filename` (found: {named[:80]}; expected UTF-8, separated by commas)")
    if not lines:
        raise UserError(f"{path}: holds no image; prepare more patients or fewer folds")
    return columns, {number: {name: _plain(path, number, cell) for name, cell in zip(columns, cells, strict=True)}
                     for number, cells in lines}


def _plain(path, number, cell):
    """The text of a cell. Raises UserError for line breaks and other signs that no name has."""
    if CONTROL.search(cell):
        raise UserError(f"{path}, line {number}: a cell holds {cell[:60]!r}, expected one line of text; correct it")
    return uncelled(cell)


def _labels(path, rows, label_names):
    """The label columns as (n, K) float32."""
    labels = np.zeros((len(rows), len(label_names)), np.float32)
    for i, (number, row) in enumerate(rows.items()):
        for k, name in enumerate(label_names):
            if row[name] not in ("0", "1", "0.0", "1.0"):
                raise UserError(f"{path}, line {number}: label {name} is {row[name][:60]!r}, expected 0 or 1")
            labels[i, k] = float(row[name])
    return labels


def fingerprint(images):
    """SHA-256 of these images: of the CSV file that lists them and of the files themselves."""
    return contents.combined([file_hash(images.csv), *contents.hashes(images.paths)])


def write_split(root, name, filenames, labels, label_names, patients, eyes=None):
    """Write ROOT/{name}.csv in the layout that `read_split` reads.

    Patients that are all unknown ("") have no column; neither have eyes of which one is.
    """
    extra = {"patient_name": patients} if any(patients) else {}
    if eyes is not None and len(eyes) and all(eyes):
        extra["eye"] = eyes
    rows = [[i, f, *(int(v) for v in y), *more]
            for i, (f, y, *more) in enumerate(zip(filenames, labels, *extra.values(), strict=True))]
    write_csv(Path(root) / f"{name}.csv", ["", "filename", *label_names, *extra], rows)
