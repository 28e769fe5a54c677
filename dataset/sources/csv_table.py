"""Images that a table lists, of anybody's making. What its columns are is said by flags, or guessed and said.

The table may have any delimiter, quoting and encoding. Labels are columns of 0 and 1 (also 0.0 and 1.0), or one column
of categories, which becomes one label for each.
"""

import re

from core.errors import UserError
from dataset.collection import Collection, Record
from dataset.sources.folder import SPLIT_NAMES, SUFFIXES, image_files
from dataset.tables import binary, column_of_images, find_image, match_images, one_hot, read_table, unlisted

PATIENT, EYE, SPLIT = r"patient|subject|client|^pid$|^mrn$", r"^eye|laterality", r"^(split|set|partition|subset)$"
BINARY = {"0", "1", "0.0", "1.0"}
MOST_CATEGORIES = 50
TRIED = 50  # rows that are looked at to find the column of images


def read(folder, csv, image_column="", label_columns="", patient_column="", eye_column="", split_column="",
         extension=""):
    """FOLDER of images and the file CSV -> Collection. Columns that are "" are guessed; a remark says as what."""
    table = read_table(csv)
    if not folder.is_dir():
        raise UserError(f"--input {folder}: no such folder; it is where the images of {csv} are")
    suffixes = (extension,) if extension else SUFFIXES
    image = _named(table, image_column, "--image-column") or _image_column(table, folder, suffixes)
    patient = _named(table, patient_column, "--patient-column") or _guess(table, PATIENT)
    eye = _named(table, eye_column, "--eye-column") or _guess(table, EYE)
    split = _named(table, split_column, "--split-column") or _split(table)
    names = [_named(table, name, "--label-columns") for name in label_columns or []]
    names = names or _label_columns(table, {image, patient, eye, split})
    labels, encode = _encoder(table, names)
    found = [find_image(folder, row[image], suffixes) for row in table.rows]
    present, remarks = match_images(table.rows, found, table)
    records = [Record(_name(path, folder), encode(row), path, patient=row[patient] if patient else "",
                      eye=row[eye] if eye and patient else "", split=_side(row, split)) for row, path in present]
    remarks += unlisted(image_files(folder)[0], [record.file for record in records], folder)
    said = {"images": image, "labels": " ".join(names), "patients": patient, "eyes": eye, "split": split}
    guess = ", ".join(f"{what} from {column!r}" if column else f"no {what}" for what, column in said.items())
    return Collection(labels, records, len(records), remarks=(f"columns: {guess}", *remarks))


def _named(table, name, flag):
    if name and name not in table.columns:
        raise UserError(f"{flag} {name}: {table.path} has {', '.join(table.columns)[:200]}")
    return name


def _image_column(table, folder, suffixes):
    """The column that names files of the folder; numbers that are all 0 or 1 do not."""
    names = [column for column in table.columns if {row[column] for row in table.rows} - BINARY]
    best = column_of_images(table.rows[:TRIED], names, folder, suffixes)
    if best is None:
        raise UserError(f"{table.path}: no column names files of {folder} (found: {', '.join(table.columns)[:120]}); "
                        "give --image-column and, where the names have no suffix, --extension")
    return best


def _guess(table, pattern):
    return next((column for column in table.columns if re.search(pattern, column, re.IGNORECASE)), None)


def _split(table):
    column = _guess(table, SPLIT)
    return column if column and all(row[column].casefold() in SPLIT_NAMES for row in table.rows) else None


def _label_columns(table, taken):
    """Columns of 0 and 1 only; where there are none, the one column of a few categories. Raises UserError."""
    rest = [column for column in table.columns if column not in taken]
    values = {column: {row[column] for row in table.rows} for column in rest}
    numbers = [column for column in rest if values[column] <= BINARY]
    if numbers:
        return numbers
    few = [column for column in rest if 2 <= len(values[column]) <= min(MOST_CATEGORIES, len(table.rows) // 2)]
    if len(few) != 1:
        listed = ", ".join(few)[:120] or "none"
        raise UserError(f"{table.path}: found {len(few)} column(s) that could be labels ({listed}); give "
                        "--label-columns")
    return few


def _encoder(table, names):
    """Names of labels, and the function that reads them from a row."""
    values = sorted({row[names[0]] for row in table.rows} - {""})
    if len(names) == 1 and not {*values} <= BINARY:
        if len(values) > MOST_CATEGORIES:
            raise UserError(f"--label-columns {names[0]}: has {len(values)} different values, expected at most "
                            f"{MOST_CATEGORIES} categories")
        values = [value.removesuffix(".0") for value in values]
        labels = tuple(f"{names[0]}_{value}" if value.isdigit() else value for value in values)
        return labels, lambda row: one_hot(row, names[0], values) if row[names[0]] else (0,) * len(values)
    return tuple(names), lambda row: tuple(binary(row, name) for name in names)


def _name(path, folder):
    return path.relative_to(folder).with_suffix("").as_posix()


def _side(row, split):
    if not split:
        return ""
    if row[split].casefold() not in SPLIT_NAMES:
        raise UserError(f"{row.where}: {split} is {row[split]!r}, expected train, val or test")
    return SPLIT_NAMES[row[split].casefold()]
