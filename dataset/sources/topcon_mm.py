"""TOPCON-MM (Wang et al., FDDM, MICCAI 2023): OCT and colour fundus of the same eyes, 11 labels; the paper's OCT data.

369 eyes of 203 patients; licence MIT by its Hugging Face card. Two layouts:

    {train,val,test}/{oct,cfp}.txt     FDDM: `NAME v1 … v11`; images of all splits in train/Images/{oct,fundus}-images
    {oct,fundus}_labels.csv            Hugging Face: names and 11 labels; images in {oct,fundus}_images

A name is `patient-eye-scan`. The FDDM split is kept; the Hugging Face layout describes none.
"""

from pathlib import Path

from core.errors import UserError
from dataset.collection import SPLITS, Collection, Record
from dataset.sources.folder import SUFFIXES, image_files
from dataset.tables import Row, Table, binary, find_image, match_images, read_table, unlisted

LABELS = ("NOR", "AMD", "WAMD", "DR", "CSC", "PED", "MEM", "FLD", "EXU", "CNV", "RVO")
LISTS = {"oct": "oct", "fundus": "cfp"}
STATED = {"patients": 203}


def read(folder, modality):
    """The images of one modality, "oct" or "fundus" -> Collection."""
    if (folder / "train" / f"{LISTS[modality]}.txt").is_file():
        return _read_lists(folder, modality)
    file = folder / f"{modality}_labels.csv"
    if not file.is_file():
        raise UserError(f"--input {folder}: found neither train/{LISTS[modality]}.txt nor {file.name}; it is the "
                        "folder that holds train/, or the CSV files")
    table = read_table(file)
    images = folder / f"{modality}_images"
    name = _name_column(table, images)
    columns = [table.column(label) for label in LABELS]
    rows = [(row, row[name], tuple(binary(row, column) for column in columns), "") for row in table.rows]
    return _collection(folder, images, table, rows)


def _read_lists(folder, modality):
    """The FDDM layout: lines of a name and eleven 0/1."""
    rows = []
    for split in SPLITS:
        file = folder / split / f"{LISTS[modality]}.txt"
        if file.is_file():
            rows += [_line(file, number, text, split) for number, text in
                     enumerate(file.read_text(encoding="utf-8-sig", errors="replace").splitlines(), 1) if text.strip()]
    table = Table(folder / f"{{train,val,test}}/{LISTS[modality]}.txt", (), [row for row, *_ in rows])
    return _collection(folder, folder / "train" / "Images" / f"{modality}-images", table, rows)


def _line(file, number, text, split):
    row = Row()
    row.where = f"{file}, line {number}"
    name, *values = text.split()
    if len(values) != len(LABELS) or not {*values} <= {"0", "1"}:
        raise UserError(f"{row.where}: {text[:60]!r}, expected a name and {len(LABELS)} of 0 and 1")
    return row, name, tuple(map(int, values)), split


def _collection(folder, images, table, rows):
    found = [find_image(images, name, SUFFIXES) for _, name, *_ in rows]
    _, remarks = match_images([row for row, *_ in rows], found, table)
    records = [_record(row, file, labels, split)
               for (row, _, labels, split), file in zip(rows, found, strict=True) if file]
    remarks += unlisted(image_files(images)[0], [record.file for record in records], folder)
    return Collection(LABELS, records, len(records), STATED, tuple(remarks))


def _record(row, file, labels, split):
    patient, _, rest = file.stem.partition("-")
    eye = rest.partition("-")[0]
    if not eye:
        raise UserError(f"{row.where}: {file.stem} is not patient-eye-scan; rename it or remove its row")
    return Record(file.stem, labels, file, patient=patient, eye=eye, split=split)


def _name_column(table, images):
    """The column whose values are image files."""
    if not images.is_dir():
        raise UserError(f"{images}: no such folder; unpack the images beside {Path(table.path).name}")
    for column in table.columns:
        if any(find_image(images, row[column], SUFFIXES) for row in table.rows[:20] if row[column]):
            return column
    raise UserError(f"{table.path}: no column names files of {images} (found: {', '.join(table.columns)[:120]})")
