"""dr_rahim (Rahim et al.; https://github.com/SRahimDR/DR-image-dataset): 600 fundus photographs of 300 patients.

"Free to use for academic purpose, with attribution". `DR and maculopathy 10 classes/CLASS/PatientNNN_{L,R}.jpg`: nine
classes of a grade of diabetic retinopathy with or without maculopathy, and ADED (advanced diabetic eye disease, 7
images), to which the collection gives no grade; it is the stage after proliferative retinopathy and counts as PDR here.
Known faults: Patient299 and Patient300 are the same pictures under two classes (--on-conflict); `Patient254-R.jpg`.
"""

import re

from core.errors import UserError
from dataset.collection import Collection, Record
from dataset.sources.folder import image_files, left_out
from dataset.tables import GRADES

LABELS = GRADES
STATED = {"images": 600, "patients": 300, **dict(zip(GRADES, (276, 99, 168, 34, 16 + 7), strict=True))}  # 7 of ADED
CLASSES = {"No DR": "NODR", "Mild DR": "MILD", "Moderate DR": "MODERATE", "Severe DR": "SEVERE", "PDR": "PDR",
           "ADED": "PDR"}
NAME = re.compile(r"Patient(\d+)([_-])([LR])", re.IGNORECASE)


def read(folder):
    """The folder of classes, or one above it -> Collection with five grades."""
    images, others = image_files(folder)
    records, odd, advanced = [], [], 0
    for path in images:
        match, label = NAME.fullmatch(path.stem), _grade(path.parent.name)
        if label is None or not match:
            raise UserError(f"{path}: expected CLASS/PatientNNN_L.jpg with a class such as `2 - Mild DR without "
                            "maculopathy`; move it away")
        odd += [path.name] * (match[2] != "_")
        advanced += path.parent.name.strip().endswith("ADED")
        records.append(Record(path.stem, tuple(int(label == name) for name in LABELS), path, patient=match[1],
                              eye=match[3].upper()))
    if not records:
        raise UserError(f"--input {folder}: found no image; it is the folder of `DR and maculopathy 10 classes`")
    remarks = [*left_out([path for path in others if path.name != "labels.csv"], folder)]
    remarks += [f"{', '.join(odd)}: not named as the others, taken all the same"] * bool(odd)
    remarks += [f"{advanced} images of ADED (advanced diabetic eye disease) count as PDR"] * bool(advanced)
    return Collection(LABELS, records, len(records), STATED, tuple(remarks))


def _grade(folder):
    """`6 - Severe DR without maculopathy` -> SEVERE; None for other folders."""
    name = re.sub(r"^\d+ - | with(out)? maculopathy$", "", folder.strip())
    return CLASSES.get(name)
