"""Whether images that something is judged by were seen before: the same picture, or another one of the same patient.

Pictures are compared by the contents of their files, patients by their names as `dataset.patients.same_name` has them.
"""

from dataset import contents

DIGITS = 16  # of a SHA-256, enough to tell images apart


def shared(a, b):
    """What two splits have in common: one sentence for patients and one for pictures, [] where there is nothing."""
    lines = []
    if patients := a.known_patients & b.known_patients:
        lines.append(f"{a.csv} and {b.csv.name}: {len(patients)} patient(s) in both, the first is {min(patients)}")
    held = dict(zip(contents.hashes(a.paths), a.filenames, strict=True))
    same = [(held[content], name) for content, name in zip(contents.hashes(b.paths), b.filenames, strict=True)
            if content in held]
    if same:
        lines.append(f"{a.csv} and {b.csv.name}: {len(same)} identical image(s) in both, the first is "
                     f"{' = '.join(dict.fromkeys(same[0]))}")
    return lines


def unknown_patients(split):
    """A sentence where a split does not name the patients of all its images, in a list; else []."""
    unnamed = sum(patient == name for patient, name in zip(split.patients, split.filenames, strict=True))
    return [f"{split.csv}: {unnamed} of {len(split)} images name no patient (column patient_name), so whether a "
            "patient is in two splits cannot be known"] * (unnamed > 0)


def identities(split):
    """The contents of images in short, sorted: what a model keeps of what it was trained on."""
    return sorted({content[:DIGITS] for content in contents.hashes(split.paths)})


def seen(known, split):
    """How many images of a split are among the `identities` of others."""
    known = {*known}
    return sum(content[:DIGITS] in known for content in contents.hashes(split.paths))
