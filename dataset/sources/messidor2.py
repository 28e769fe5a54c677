"""MESSIDOR-2 (Decencière et al., 2014; graded by Krause et al., 2018): 1,748 fundus photographs, grades 0 to 4.

Images on request: https://www.adcis.net/en/third-party/messidor2/; grades: `messidor_data.csv` (image_id,
adjudicated_dr_grade, adjudicated_dme, adjudicated_gradable; a copy calls the first two id_code and diagnosis) from
Kaggle; `IMAGES/`. Images that could not be graded (4) are left out: they are not grade 0. Which two images are of one
patient stands only in `messidor-2.csv`, one column `left;right`.
"""

from core.errors import UserError
from dataset.collection import Collection, Record
from dataset.sources.folder import SUFFIXES, image_files
from dataset.tables import GRADES, binary, find_images, grade, match_images, read_table, unlisted

LABELS = GRADES
STATED = {"images": 1744}


def read(folder):
    """The folder that holds messidor_data.csv and IMAGES/ -> Collection."""
    file, images = folder / "messidor_data.csv", folder / "IMAGES"
    if not file.is_file() or not images.is_dir():
        raise UserError(f"--input {folder}: expected messidor_data.csv and IMAGES/; check the path")
    table = read_table(file)
    name = table.column("image_id", "id_code")
    column = table.column("adjudicated_dr_grade", "diagnosis")
    gradable = table.column("adjudicated_gradable", required=False)
    rows = [row for row in table.rows if row[column] and (not gradable or binary(row, gradable))]
    remarks = [f"{len(table.rows) - len(rows)} images could not be graded and were left out"] * (
        len(rows) < len(table.rows))
    present, more = match_images(rows, find_images(rows, name, images, SUFFIXES), table)
    pairs = _pairs(folder / "messidor-2.csv")
    records = [Record(path.stem, grade(row, column), path, **pairs.get(path.stem.casefold(), {}))
               for row, path in present]
    listed = find_images(table.rows, name, images, SUFFIXES)
    more += unlisted(image_files(images)[0], [path for path in listed if path], folder)
    unknown = sum(not record.patient for record in records)
    if not pairs:
        more.append("messidor-2.csv is not there: which images are of one patient is unknown")
    elif unknown:
        more.append(f"messidor-2.csv names no patient for {unknown} images")
    return Collection(LABELS, records, len(records), STATED, tuple(remarks + more))


def _pairs(file):
    """Lines `left;right` -> {name of an image: patient and eye}."""
    if not file.is_file():
        return {}
    pairs = {}
    for row in read_table(file).rows:
        names = [name.rpartition(".")[0] or name for name in row.values()]
        for eye, name in zip(("left", "right"), names, strict=False):
            pairs[name.casefold()] = {"patient": names[0], "eye": eye}
    return pairs
