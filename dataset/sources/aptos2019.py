"""APTOS 2019 Blindness Detection (Aravind Eye Hospital; Kaggle competition terms): 3,662 graded fundus photographs.

Download: https://www.kaggle.com/c/aptos2019-blindness-detection. `train.csv` (id_code, diagnosis 0 to 4) and
`train_images/ID.png`; the grades of `test_images` are not published (`sample_submission.csv` has none). No patients.
Some pictures occur twice with different grades: --on-conflict.
"""

from core.errors import UserError
from dataset.collection import Collection, Record
from dataset.sources.folder import SUFFIXES, image_files
from dataset.tables import GRADES, find_images, grade, match_images, read_table, unlisted

LABELS = GRADES
STATED = {"images": 3662, **dict(zip(GRADES, (1805, 370, 999, 193, 295), strict=True))}


def read(folder):
    """The folder that holds train.csv and train_images/ -> Collection."""
    file, images = folder / "train.csv", folder / "train_images"
    if not file.is_file() or not images.is_dir():
        raise UserError(f"--input {folder}: expected train.csv and train_images/; check the path")
    table = read_table(file)
    name, diagnosis = table.column("id_code"), table.column("diagnosis")
    present, remarks = match_images(table.rows, find_images(table.rows, name, images, SUFFIXES), table)
    records = [Record(path.stem, grade(row, diagnosis), path) for row, path in present]
    remarks += unlisted(image_files(images)[0], [record.file for record in records], folder)
    return Collection(LABELS, records, len(records), STATED, tuple(remarks))
