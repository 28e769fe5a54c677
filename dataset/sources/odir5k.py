"""ODIR-5K (Peking University, Ocular Disease Intelligent Recognition 2019): fundus photographs, eight labels.

Download: https://www.kaggle.com/datasets/andrewmvd/ocular-disease-recognition-odir5k; no clear licence. `full_df.csv`
(6,392 rows, 3,358 patients) and `preprocessed_images/N_left.jpg`. Its columns N D G C A H M O are of the *patient*;
`labels` (as "['D']") is of the *eye*, and differs in 1,725 rows: we take the eye unless asked otherwise. `filepath` is
a path of somebody's machine and is not used; `Testing Images` have no labels and are left out.
"""

import re

from core.errors import UserError
from dataset.collection import Collection, Record
from dataset.sources.folder import SUFFIXES, image_files
from dataset.tables import binary, find_images, match_images, read_table, unlisted

LABELS = ("N", "D", "G", "C", "A", "H", "M", "O")
STATED = {"images": 6392, "patients": 3358}


def read(folder, label_level="eye"):
    """The folder that holds full_df.csv -> Collection; label_level "eye" or "patient"."""
    tables = sorted(folder.rglob("full_df.csv"))
    images = sorted(path for path in folder.rglob("preprocessed_images") if path.is_dir())
    if len(tables) != 1 or len(images) != 1:
        raise UserError(f"--input {folder}: found {len(tables)} of full_df.csv and {len(images)} of "
                        "preprocessed_images/, expected one of each; check the path")
    if label_level not in ("eye", "patient"):
        raise UserError(f"--label-level {label_level}: expected eye or patient")
    table = read_table(tables[0])
    name, patient, eye_labels = (table.column(c) for c in ("filename", "ID", "labels"))
    columns = [table.column(label) for label in LABELS]
    present, remarks = match_images(table.rows, find_images(table.rows, name, images[0], SUFFIXES), table)
    records, differ = [], 0
    for row, file in present:
        of_patient = tuple(binary(row, column) for column in columns)
        of_eye = _eye(row, eye_labels)
        differ += of_patient != of_eye
        records.append(Record(file.stem, of_eye if label_level == "eye" else of_patient, file, patient=row[patient],
                              eye=file.stem.rpartition("_")[2] if "_" in file.stem else ""))
    remarks += [f"labels are those of each {label_level}; the eye's differ from the patient's in {differ} images"]
    remarks += unlisted(image_files(images[0])[0], [record.file for record in records], folder)
    return Collection(LABELS, records, len(records), STATED, tuple(remarks))


def _eye(row, column):
    """"['D', 'M']" -> one 0/1 for each of LABELS."""
    names = re.findall(r"\w+", row[column])
    if not names or not {*names} <= {*LABELS}:
        raise UserError(f"{row.where}: {column} is {row[column]!r}, expected a list of {' '.join(LABELS)}; "
                        "correct it")
    return tuple(int(label in names) for label in LABELS)
