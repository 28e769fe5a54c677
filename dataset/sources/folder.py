"""Images in one folder per class, as many public collections come: OCTID, Duke (Srinivasan), Kaggle sets.

    FOLDER/CLASS/…/NAME.jpg                     no split
    FOLDER/{train,val,test}/CLASS/…/NAME.jpg    a split of the authors; `valid` and `validation` are val too

Each image has the label of its class and no other. Patients are unknown unless a pattern finds them in the names.
"""

import re
from dataclasses import replace
from pathlib import Path

from core.errors import UserError
from dataset import outside
from dataset.collection import Collection, Record

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".ppm", ".pgm")
SPLIT_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
               "testing": "test"}


def read(folder, patient_pattern=""):
    """FOLDER -> Collection. `patient_pattern`: regular expression searched in the path below the class folder.

    Its first group, or else all of it, is the patient. Raises UserError where there are no class folders, or where the
    pattern fits some names and not others.
    """
    pattern = _compiled(patient_pattern)
    images, others = image_files(folder)
    if not images:
        raise UserError(f"--input {folder}: found no image, expected FOLDER/CLASS/NAME.png; check the path")
    loose = [path for path in images if len(path.relative_to(folder).parts) < 2]
    if loose:
        raise UserError(f"{loose[0]}: lies in no class folder, expected FOLDER/CLASS/NAME; move it")
    first = {path.relative_to(folder).parts[0].strip().casefold() for path in images}
    split = first <= SPLIT_NAMES.keys()
    places = [_place(path.relative_to(folder).parts, split, path) for path in images]
    classes = tuple(sorted({name for _, name, _ in places}))
    records = [Record("/".join((*filter(None, [side]), name, *rest[:-1], Path(rest[-1]).stem)),
                       tuple(int(name == other) for other in classes), path, patient=_patient(pattern, rest, path),
                       split=side)
               for path, (side, name, rest) in zip(images, places, strict=True)]
    return Collection(classes, _distinct(records), len(records), remarks=tuple(left_out(others, folder)))


def image_files(folder):
    """All files below a folder, without hidden ones and what macOS leaves -> images, others; both sorted."""
    if not folder.is_dir():
        raise UserError(f"--input {folder}: no such folder; check the path")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not any(
        part.startswith(".") or part == "__MACOSX" for part in path.relative_to(folder).parts)]
    images = [path for path in files if path.suffix.lower() in SUFFIXES]
    outside.refuse(folder, [path.relative_to(folder) for path in images], f"--input {folder}")
    return images, [path for path in files if path.suffix.lower() not in SUFFIXES]


def left_out(others, folder):
    """A sentence about files that are no images."""
    if others:
        yield f"{len(others)} file(s) are no images and were left out, the first is {others[0].relative_to(folder)}"


def _compiled(pattern):
    try:
        return re.compile(pattern) if pattern else None
    except re.error as error:
        raise UserError(f"--patient-pattern {pattern}: no regular expression ({error}); quote it, as in "
                        "'^([^_]+)_'") from None


def _place(parts, split, path):
    """(side, class, rest of the path) of the parts of a path below FOLDER."""
    if not split:
        return "", parts[0].strip(), parts[1:]
    if len(parts) < 3:
        raise UserError(f"{path}: lies in no class folder, expected FOLDER/{parts[0]}/CLASS/NAME; move it")
    return SPLIT_NAMES[parts[0].strip().casefold()], parts[1].strip(), parts[2:]


def _patient(pattern, rest, path):
    if pattern is None:
        return ""
    match = pattern.search("/".join(rest))
    if not match:
        raise UserError(f"{path}: --patient-pattern {pattern.pattern} finds no patient in {'/'.join(rest)}; change it")
    return match[1] if pattern.groups else match[0]


def _distinct(records):
    """Names that differ in their suffix only (1.png, 1.jpg) keep it."""
    seen = {}
    for record in records:
        seen.setdefault(record.name.casefold(), []).append(record)
    return [record if len(seen[record.name.casefold()]) == 1 else
            replace(record, name=f"{record.name}-{record.file.suffix[1:].lower()}") for record in records]
