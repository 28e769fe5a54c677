"""OCTDL (Kulyabin et al., Scientific Data 11:365, 2024; CC BY 4.0): 2,064 OCT images of 820 patients, seven classes.

Download: https://data.mendeley.com/datasets/sncdhf53xc. `OCTDL/{CLASS}/NAME.jpg` and `OCTDL_labels.csv` (in some
copies `labels.csv`) with file_name (without suffix), disease, patient_id, eye, sex, year: `0` there is unknown. One
patient has AMD and DME: images of a class are no set of patients of their own.
"""

from core.errors import UserError
from dataset.collection import Collection, Record
from dataset.sources.folder import image_files
from dataset.tables import match_images, one_hot, read_table, unlisted

LABELS = ("AMD", "NO", "ERM", "DME", "RVO", "VID", "RAO")
STATED = {"images": 2064, "patients": 820, **dict(zip(LABELS, (1231, 332, 155, 147, 101, 76, 22), strict=True))}


def read(folder):
    """The folder that holds OCTDL_labels.csv, or one above it -> Collection."""
    tables = sorted({*folder.rglob("OCTDL_labels.csv"), *folder.rglob("labels.csv")})
    if len(tables) != 1:
        raise UserError(f"--input {folder}: found {len(tables)} of OCTDL_labels.csv and labels.csv, expected one; "
                        "check the path")
    table = read_table(tables[0])
    name, disease, patient = (table.column(c) for c in ("file_name", "disease", "patient_id"))
    eye = table.column("eye", required=False)
    images, _ = image_files(folder)
    by_stem = {path.stem: path for path in images}
    twice = next((path for path in images if by_stem[path.stem] != path), None)
    if twice:
        raise UserError(f"--input {folder}: {twice} and {by_stem[twice.stem]} have one name; remove one")
    found = [by_stem.get(row[name].removesuffix(".jpg")) for row in table.rows]
    present, remarks = match_images(table.rows, found, table)
    records = [Record(file.stem, one_hot(row, disease, LABELS), file, patient=_known(row[patient]),
                      eye=_known(row[eye]) if eye else "") for row, file in present]
    unknown = sum(not record.eye for record in records)
    remarks += [f"the eye is unknown for {unknown} images"] * bool(unknown)
    remarks += unlisted(images, [record.file for record in records], folder)
    return Collection(LABELS, records, len(records), STATED, tuple(remarks))


def _known(value):
    return "" if value in ("", "0") else value
