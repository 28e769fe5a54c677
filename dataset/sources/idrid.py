"""IDRiD, disease grading (Porwal et al., Data 3:25, 2018; CC BY 4.0): 516 fundus photographs, grades 0 to 4.

Download: https://ieee-dataport.org/open-access/indian-diabetic-retinopathy-image-dataset-idrid. `B. Disease Grading/`
with `1. Original Images/{a. Training Set,b. Testing Set}/IDRiD_NNN.jpg` and `2. Groundtruths/*.csv`. The test set is
numbered from 001 again; the tables have empty columns. There are no patients. The test set stays the test set.
"""

from core.errors import UserError
from dataset.collection import Collection, Record
from dataset.sources.folder import SUFFIXES, image_files
from dataset.tables import GRADES, find_images, grade, match_images, read_table, unlisted

LABELS = GRADES
STATED = {"images": 516, **dict(zip(GRADES, (168, 25, 168, 93, 62), strict=True))}


def read(folder):
    """Any folder above `1. Original Images` -> Collection."""
    files, others = image_files(folder)
    records, remarks = [], []
    for split, word in (("train", "Training"), ("test", "Testing")):
        images = sorted({path.parent for path in files
                         if f"{word} Set" in path.parent.name and "Original" in path.parent.parent.name})
        tables = [path for path in others if word in path.name and path.suffix.lower() == ".csv"]
        if len(images) != 1 or len(tables) != 1:
            raise UserError(f"--input {folder}: found {len(images)} folder(s) `{word} Set` and {len(tables)} table(s) "
                            f"named {word}, expected one of each below `B. Disease Grading`")
        table = read_table(tables[0])
        name, column = table.column("Image name"), table.column("Retinopathy grade")
        present, more = match_images(table.rows, find_images(table.rows, name, images[0], SUFFIXES), table)
        records += [Record(f"{split}/{path.stem}", grade(row, column), path, split=split) for row, path in present]
        remarks += more
    remarks += unlisted(files, [record.file for record in records], folder)
    return Collection(LABELS, records, len(records), STATED, tuple(remarks))
