"""Which images show the same eye: said by the column `eye` of a CSV, or by file names of a known source.

Names are believed only if every one of them fits one of PATTERNS, patients are known, and it then holds that an eye
belongs to one patient and a patient has at most two; else nothing is known about eyes.
"""

import re
from collections import Counter
from pathlib import Path

PATTERNS = {  # source -> what a file name looks like, without folder and suffix; the group names the eye
    "phantom": r"(p\d+_O[DS])_\d+",  # patient_eye_scan
    "oct-and-eye-fundus": r"([^_-]+_(?:OD|OS|OI))_[^_]+_\d+",  # patient_eye_modality_index; OI: the left, in Spanish
    "TOPCON-MM": r"([^-]+-(?:L|R|OD|OS))-.+",  # patient-eye-scan; CNV-3001-2, class-patient-scan, is no such name
}


def eye_names(filenames, patients, column=None):
    """The eyes of n images, each name unique in the data set; None where nothing says which they are.

    patients: n names, the file name where the patient is unknown; column: n names of eyes, each unique within its
    patient, or None.
    """
    if column is not None:
        return tuple(f"{patient} {eye}" for patient, eye in zip(patients, column, strict=True))
    for pattern in PATTERNS.values():
        matches = [re.fullmatch(pattern, Path(name).stem, re.IGNORECASE) for name in filenames]
        if all(matches):
            names = tuple(match[1].upper() for match in matches)
            return names if _plausible(names, filenames, patients) else None
    return None


def _plausible(names, filenames, patients):
    """An eye has one patient, a patient at most two eyes. Where patients are unknown, nothing speaks for the names."""
    if patients == filenames:
        return False
    pairs = set(zip(names, patients, strict=True))
    return len(pairs) == len(set(names)) and max(Counter(patient for _, patient in pairs).values()) <= 2
