"""TOPCON-MM (Wang et al., FDDM, MICCAI 2023): OCT and colour fundus of the same eyes, 11 labels; the paper's OCT data.

369 eyes of 203 patients; licence MIT by its Hugging Face card. Two layouts:

    {train,val,test}/{oct,cfp}.txt     FDDM: `NAME v1 … v11`; images of all splits in train/Images/{oct,fundus}-images
    {oct,fundus}_labels.csv            Hugging Face: names and 11 labels; images in {oct,fundus}_images

A name is `patient-eye-scan`, with or without suffix. The FDDM split is kept; the Hugging Face layout describes none,
nor which column holds the names: it is the one whose values are image files.
"""

from pathlib import Path

from core.errors import UserError
from dataset.collection import SPLITS, Collection, Record
from dataset.sources.folder import SUFFIXES, image_files
from dataset.tables import Row, Table, binary, column_of_images, find_images, match_images, read_table, unlisted

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
    return _collection(folder, images, table, name, [(tuple(binary(row, column) for column in columns), "")
                                                     for row in table.rows])


def _read_lists(folder, modality):
    """The FDDM layout: lines of a name and eleven 0/1."""
    files = {split: folder / split / f"{LISTS[modality]}.txt" for split in SPLITS}
    missing = [f"{split}/{file.name} is not there: no images of this set" for split, file in files.items()
               if not file.is_file()]
    rows, facts = [], []
    for split, file in files.items():
        for number, line in enumerate(_lines(file), 1):
            if line.strip():
                row, labels = _line(f"{file}, line {number}", line)
                rows.append(row)
                facts.append((labels, split))
    table = Table(folder / f"{{{','.join(SPLITS)}}}" / files["train"].name, ("name",), rows)
    return _collection(folder, folder / "train" / "Images" / f"{modality}-images", table, "name", facts, missing)


def _lines(file):
    return file.read_text(encoding="utf-8-sig", errors="replace").splitlines() if file.is_file() else ()


def _line(where, line):
    """`NAME v1 … v11` -> Row, labels."""
    name, *values = line.split()
    if len(values) != len(LABELS) or not {*values} <= {"0", "1"}:
        raise UserError(f"{where}: {line[:60]!r}, expected a name and {len(LABELS)} of 0 and 1; correct it")
    row = Row(name=name)
    row.where = where
    return row, tuple(map(int, values))


def _collection(folder, images, table, column, facts, remarks=()):
    """`facts`: labels and split of each row of the table."""
    found = find_images(table.rows, column, images, SUFFIXES)
    _, missing = match_images(table.rows, found, table)
    records = [_record(row, file, *fact) for row, file, fact in zip(table.rows, found, facts, strict=True) if file]
    others = unlisted(image_files(images)[0], [record.file for record in records], folder)
    return Collection(LABELS, records, len(records), STATED, (*remarks, *missing, *others))


def _record(row, file, labels, split):
    patient, _, rest = file.stem.partition("-")
    eye = rest.partition("-")[0]
    if not eye:
        raise UserError(f"{row.where}: {file.stem} is not patient-eye-scan; rename it or remove its row")
    return Record(file.stem, labels, file, patient=patient, eye=eye, split=split)


def _name_column(table, images):
    """The column that names the images."""
    if not images.is_dir():
        raise UserError(f"{images}: no such folder; unpack the images beside {Path(table.path).name}")
    names = [column for column in table.columns if column not in LABELS]
    best = column_of_images(table.rows, names, images, SUFFIXES)
    if best is None:
        raise UserError(f"{table.path}: no column names files of {images} (found: {', '.join(table.columns)[:120]}); "
                        "unpack the images there")
    return best
