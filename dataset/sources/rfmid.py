"""RFMiD (Pachade et al., Data 6:14, 2021; CC BY 4.0): 3,200 fundus photographs, 45 rare and frequent labels.

Download: https://ieee-dataport.org/open-access/retinal-fundus-multi-disease-image-dataset-rfmid, or Kaggle. Layouts:

    …/1. Original Images/{a. Training,b. Validation,c. Testing} Set/N.png and …/2. Groundtruths/*_Labels.csv
    {Training,Evaluation,Test}_Set/…/RFMiD_*_Labels.csv and …/{Training,Validation,Test}/N.png

Column `Disease_Risk` is no disease and is not taken. Numbers start at 1 in each split; some labels are never positive.
There are no patients.
"""

from core.errors import UserError
from dataset.collection import Collection, Record
from dataset.sources.folder import image_files
from dataset.tables import binary, match_images, read_table, unlisted

STATED = {"images": 3200}


def read(folder):
    """Any folder above the layouts -> Collection. Labels are the columns of the tables."""
    images, others = image_files(folder)
    tables = {}
    for file in (path for path in others if path.name.endswith("Labels.csv")):
        split = _split_of(file.name)
        if split in tables:
            raise UserError(f"--input {folder}: found two tables of the {split} set, {tables[split]} and {file}; give "
                            "the folder of one")
        tables[split] = file
    if not tables or None in tables:
        raise UserError(f"--input {folder}: expected tables such as RFMiD_Training_Labels.csv; check the path")
    labels, records, remarks = None, [], []
    for split, file in tables.items():
        table = read_table(file)
        name, risk = table.column("ID"), table.column("Disease_Risk")
        own = tuple(column for column in table.columns if column not in (name, risk))
        labels = labels or own
        if own != labels:
            raise UserError(f"{file}: labels {' '.join(own)[:80]}, expected those of the other tables; "
                            "rename its columns")
        by_stem = {path.stem: path for path in images if _split_of(*path.relative_to(folder).parts[:-1]) == split}
        found = [by_stem.get(row[name].removesuffix(".png")) for row in table.rows]
        present, more = match_images(table.rows, found, table)
        records += [Record(f"{split}/{file.stem}", tuple(binary(row, column) for column in labels), file, split=split)
                    for row, file in present]
        remarks += more
    used = [record.file for record in records]
    return Collection(labels, records, len(records), STATED, (*remarks, *unlisted(images, used, folder)))


def _split_of(*names):
    """"train", "val", "test" by the last name that says one, else None."""
    for name in reversed(names):
        for split, words in (("train", ("training",)), ("val", ("validation", "evaluation")), ("test", ("test",))):
            if any(word in name.lower() for word in words):
                return split
    return None
