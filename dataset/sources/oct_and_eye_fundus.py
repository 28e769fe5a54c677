"""OCT-AND-EYE-FUNDUS-DATASET (Hughes Cano, Olivares Pinto, Thébault; UNAM): retinopathy and macular oedema.

https://github.com/Traslational-Visual-Health-Laboratory/OCT-AND-EYE-FUNDUS-DATASET holds two image types:

    OCT.csv          OCT/OCT*/NAME.jpg                  B-scans
    EYE FUNDUS.csv   EYE FUNDUS/EYE FUNDUS*/NAME.jpg    colour photographs

with the columns Name (`patient_eye_modality_index`), DME (0, 1) and DR (0, NPDR, PDR; `-` or empty: not
graded). There is no licence text, only a request to cite. Most images are not graded, and some pictures
occur under several patients (--join-identical).
"""

from pathlib import Path

from core.errors import UserError
from dataset.collection import Collection, Record
from dataset.sources.folder import image_files
from dataset.tables import match_images, read_table, unlisted

LABELS = ("NODR", "NPDR", "PDR", "DME")
FOLDERS = {"oct": "OCT", "fundus": "EYE FUNDUS"}
STATED = {"oct": {"images": 1113}, "fundus": {"images": 1548}}

# DR -> NODR, NPDR, PDR. An ungraded eye has no DR label at all, like the null label of guidance.
GRADES = {"0": (1, 0, 0), "NPDR": (0, 1, 0), "PDR": (0, 0, 1), "-": (0, 0, 0), "": (0, 0, 0)}
DME = {"0": 0, "1": 1}


def read(folder, modality):
    """The images of one modality, "oct" or "fundus" -> Collection.

    Raises UserError for a missing CSV or column, where no image is there, for two rows or two files of one name, and
    for a value outside GRADES or DME.
    """
    kind = FOLDERS[modality]
    file = Path(folder) / f"{kind}.csv"
    if not file.is_file():
        raise UserError(f"{file}: no such file; --input is the folder that holds it and `{kind}/`")
    table = read_table(file)
    name, dr, dme = (table.column(column) for column in ("Name", "DR", "DME"))
    labels = {}
    for row in table.rows:
        if row[name] in labels:
            raise UserError(f"{row.where}: {row[name]} is listed a second time; remove one of the two rows")
        labels[row[name]] = _labels(row, row[dr], row[dme])
    paths = {}
    images, _ = image_files(Path(folder) / kind)
    for path in images:
        if paths.setdefault(path.stem, path) is not path:
            raise UserError(f"{path} and {paths[path.stem]} have one name; remove one")
    if labels and not labels.keys() & paths.keys():
        raise UserError(
            f"{file}: {len(labels)} of {len(labels)} images are missing, the first is {next(iter(labels))}.jpg "
            f"(looked below {kind}/); fetch them"
        )
    present, remarks = match_images(table.rows, [paths.get(row[name]) for row in table.rows], table)
    records = [Record(row[name], labels[row[name]], path, patient=row[name].split("_")[0], eye=_eye(row[name]))
               for row, path in present]
    remarks += unlisted(images, [record.file for record in records], Path(folder))
    unknown = sum(not any(record.labels[:3]) for record in records)
    remarks += [f"{unknown} images have no grade of retinopathy: NODR, NPDR and PDR are all 0"] * bool(unknown)
    return Collection(LABELS, records, len(records), STATED[modality], tuple(remarks))


def _eye(stem):
    """0001_OI_o_1 -> OI, the left in Spanish; "" for names of another form."""
    parts = stem.upper().split("_")
    return parts[1] if len(parts) == 4 and parts[1] in ("OD", "OI", "OS") else ""


def _labels(row, grade, oedema):
    """One row of the CSV -> (4,) in the order of LABELS."""
    if grade not in GRADES:
        raise UserError(f"{row.where}: DR is {grade!r}, expected 0, NPDR, PDR, or - for not graded")
    if oedema not in DME:
        raise UserError(f"{row.where}: DME is {oedema!r}, expected 0 or 1")
    return (*GRADES[grade], DME[oedema])
