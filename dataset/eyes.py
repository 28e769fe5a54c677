"""Which images show the same eye: said by the column `eye` of a CSV, or by file names of a known source.

Names are believed only if every one of them fits one of PATTERNS, patients are known, and it then holds that an eye
belongs to one patient and a patient has at most two; else nothing is known about eyes.
"""

import re
from pathlib import Path

PATTERNS = {  # source -> what a file name looks like, without folder and suffix; the group names the eye
    "phantom": r"(p\d+_O[DS])_\d+",  # patient_eye_scan
    "oct-and-eye-fundus": r"([^_-]+_(?:OD|OS|OI))_[^_]+_\d+",  # patient_eye_modality_index; OI: the left, in Spanish
    "TOPCON-MM": r"([^-]+-[^-]+)-.+",  # the first two parts
}


def eye_ids(split):
    """Names of the eyes of a split's n images, each unique in the data set; None where nothing says which they are."""
    if split.eyes is not None:
        return [f"{patient} {eye}" for patient, eye in zip(split.patients, split.eyes, strict=True)]
    stems = [Path(name).stem for name in split.filenames]
    for pattern in PATTERNS.values():
        found = [re.fullmatch(pattern, stem, re.IGNORECASE) for stem in stems]
        if all(found):
            names = [match[1].upper() for match in found]
            return names if _plausible(names, split) else None
    return None


def _plausible(names, split):
    """An eye has one patient, a patient at most two eyes. Where patients are unknown, nothing speaks for the names."""
    if split.patients == split.filenames:
        return False
    pairs = set(zip(names, split.patients, strict=True))
    patients = [patient for _, patient in pairs]
    return len(pairs) == len(set(names)) and all(patients.count(patient) <= 2 for patient in set(patients))
