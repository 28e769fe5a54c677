"""OCT-AND-EYE-FUNDUS-DATASET (Hughes Cano, Olivares Pinto, Thébault; UNAM): retinopathy and macular oedema.

https://github.com/Traslational-Visual-Health-Laboratory/OCT-AND-EYE-FUNDUS-DATASET holds two image types:

    OCT.csv          OCT/OCT*/NAME.jpg                  B-scans
    EYE FUNDUS.csv   EYE FUNDUS/EYE FUNDUS*/NAME.jpg    colour photographs

with the columns Name (`patient_eye_modality_index`), DME (0, 1) and DR (0, NPDR, PDR; `-` or empty: not
graded). There is no licence text, only a request to cite.
"""

import csv
from pathlib import Path

from core.errors import UserError

LABELS = ("NODR", "NPDR", "PDR", "DME")
FOLDERS = {"oct": "OCT", "fundus": "EYE FUNDUS"}

# DR -> NODR, NPDR, PDR. An ungraded eye has no DR label at all, like the null label of guidance.
GRADES = {"0": (1, 0, 0), "NPDR": (0, 1, 0), "PDR": (0, 0, 1), "-": (0, 0, 0), "": (0, 0, 0)}
DME = {"0": 0, "1": 1}


def read(input_dir, modality):
    """The images of one modality, "oct" or "fundus" -> list of (patient, filename, labels (4,), source path).

    Raises UserError for a missing CSV, column or image, a name listed twice, a value outside GRADES or DME.
    """
    folder = FOLDERS[modality]
    table = Path(input_dir) / f"{folder}.csv"
    if not table.is_file():
        raise UserError(f"{table}: no such file; --input is the folder that holds it and `{folder}/`")
    with open(table, newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = csv.DictReader(file)
        absent = {"Name", "DME", "DR"} - set(reader.fieldnames or ())
        if absent:
            raise UserError(f"{table}: no column {', '.join(sorted(absent))}; expected Name, DME and DR")
        rows = {}
        for row in reader:
            name, where = (row["Name"] or "").strip(), f"{table}, line {reader.line_num}"
            if name in rows:
                raise UserError(f"{where}: {name} is listed a second time; remove one of the two rows")
            rows[name] = _labels(row, where)
    paths = {path.stem: path for path in sorted(Path(input_dir).glob(f"{folder}/{folder}*/*.jpg"))}
    missing = [name for name in rows if name not in paths]
    if missing:
        raise UserError(
            f"{table}: {len(missing)} of {len(rows)} images are missing, the first is {missing[0]}.jpg "
            f"(looked in {folder}/{folder}*/); fetch them or remove their rows"
        )
    return [(name.split("_")[0], f"images/{name}.jpg", labels, paths[name]) for name, labels in rows.items()]


def _labels(row, where):
    """One row of the CSV -> (4,) in the order of LABELS."""
    grade, oedema = (row["DR"] or "").strip(), (row["DME"] or "").strip()
    if grade not in GRADES:
        raise UserError(f"{where}: DR is {grade!r}, expected 0, NPDR, PDR, or - for not graded")
    if oedema not in DME:
        raise UserError(f"{where}: DME is {oedema!r}, expected 0 or 1")
    return (*GRADES[grade], DME[oedema])
