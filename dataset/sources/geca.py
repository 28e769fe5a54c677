"""The layout of the published code (xmed-lab/GeCA): `oct_multilabel/{train,val}_{fold}.csv` beside or above the images.

The first column is an index, `filename` is relative to the folder of the CSV files or the one above; every other column
is a label, picked by name (files may order them differently). No patients and no test set: fold 0 is kept as it is.
"""

from pathlib import PurePosixPath

from core.errors import UserError
from dataset.collection import Collection, Record
from dataset.sources.folder import SUFFIXES, image_files
from dataset.tables import binary, find_images, match_images, read_table, unlisted

FOLD = 0


def read(folder):
    """The folder that holds train_0.csv and val_0.csv, or one above it -> Collection."""
    records, remarks, labels = {}, [], None
    for split in ("train", "val"):
        files = sorted(folder.rglob(f"{split}_{FOLD}.csv"))
        if len(files) != 1:
            raise UserError(f"--input {folder}: found {len(files)} of {split}_{FOLD}.csv, expected one; "
                            "check the path")
        table = read_table(files[0])
        name = table.column("filename")
        own = [column for column in table.columns[1:] if column != name]
        labels = labels or tuple(own)
        if {*own} != {*labels}:
            raise UserError(f"{files[0]}: labels {' '.join(own)}, expected {' '.join(labels)}; rename "
                            "its columns")
        places = (files[0].parent, files[0].parent.parent, folder)
        tried = zip(*(find_images(table.rows, name, place, SUFFIXES) for place in places), strict=True)
        found = [next(filter(None, paths), None) for paths in tried]
        present, more = match_images(table.rows, found, table)
        remarks += more
        for row, path in present:
            key = PurePosixPath(row[name].replace("\\", "/")).with_suffix("").as_posix()
            if key in records:
                raise UserError(f"{row.where}: {row[name]} is listed a second time; keep one row for each image")
            records[key] = Record(key, tuple(binary(row, label) for label in labels), path, split=split)
    remarks += unlisted(image_files(folder)[0], [record.file for record in records.values()], folder)
    return Collection(labels, list(records.values()), len(records), remarks=tuple(remarks))
