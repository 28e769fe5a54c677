"""OCT2017 (Kermany et al., Cell 2018; CC BY 4.0): OCT B-scans in four classes.

Download: https://data.mendeley.com/datasets/rscbjbr9sj (v2: train, val, test; v3: `CellData/OCT/{train,test}`, 108,309
and 1,000 images) or Kaggle's copy (83,484, 968 and 32) in a folder `OCT2017 `, with a blank at its end.
`{train,val,test}/{CNV,DME,DRUSEN,NORMAL}/CLASS-PATIENT-N.jpeg`. Patients occur in several of its splits (`--resplit`
joins them) and file names occur in training and test set; some images have white corners.
"""

import re

from core.errors import UserError
from dataset.collection import SPLITS, Collection, Record
from dataset.sources.folder import image_files, left_out

LABELS = ("CNV", "DME", "DRUSEN", "NORMAL")
NAME = re.compile(r"(CNV|DME|DRUSEN|NORMAL)-(\d+)-\d+", re.IGNORECASE)
STATED = {"images": 109309}


def read(folder):
    """Any folder above {train,val,test}/CLASS/ -> Collection."""
    images, others = image_files(folder)
    placed = [(path, *_place(path)) for path in images]
    strays = [path for path, split, _ in placed if split is None]
    records = [_record(path, split, label) for path, split, label in placed if split]
    if not records:
        raise UserError(f"--input {folder}: found no image in {{train,val,test}}/{{{','.join(LABELS)}}}/; check the "
                        "path")
    remarks = [*left_out(others, folder)]
    unknown = [record for record in records if not record.patient]
    if unknown:
        remarks.append(f"the patient of {len(unknown)} image(s) is unknown: not named CLASS-PATIENT-N, the first is "
                       f"{unknown[0].file.relative_to(folder)}")
    if strays:
        remarks.append(f"{len(strays)} image(s) lie in no class folder and were left out, the first is "
                       f"{strays[0].relative_to(folder)}")
    return Collection(LABELS, records, len(records), STATED, tuple(remarks))


def _place(path):
    """(split, class) from the last two folders, or (None, None)."""
    split, label = ("", "", *(part.strip() for part in path.parts[:-1]))[-2:]
    split, label = split.lower(), label.upper()
    return (split, label) if split in SPLITS and label in LABELS else (None, None)


def _record(path, split, label):
    match = NAME.fullmatch(path.stem)
    if match and match[1].upper() != label:
        raise UserError(f"{path}: named {match[1]} but lies in {label}/; find out which is right and move or rename it")
    return Record(f"{split}/{label}/{path.stem}", tuple(int(label == name) for name in LABELS), path,
                  patient=match[2] if match else "", split=split)
