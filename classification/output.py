"""The output folder of classify.py: which runs may continue in it.

Every fold has a folder of its own in it; folds may be added one after another, or by several jobs at the same time.
"""

import json
import re
from pathlib import Path

from classification.report import fold_folder, read_json
from core import runs
from core.errors import UserError
from core.files import write_text

DEFAULT = "results_classify"


def settings_of_fold(settings, fold):
    """What the runs of one fold must share: the settings of all folds, and its images."""
    return settings | {"fold": fold.number, "training_images": fold.hashes["train"],
                       "validation_images": fold.hashes["val"], "synthetic": [s.identity for s in fold.synthetic]}


def find_output(folder, method, settings, folds):
    """The given folder or, for None, the one in DEFAULT with these settings or the next free one. Raises UserError."""
    if folder is None:
        folder, _ = runs.find_or_number(DEFAULT, re.sub(r"[^\w.+-]+", "-", method), settings)
    check(folder, settings)
    for fold in folds:
        check(fold_folder(folder, fold.number), settings_of_fold(settings, fold))
    return Path(folder)


def claim(folder, settings):
    """From now on, the folder belongs to runs of these settings."""
    write_text(folder / "settings.json", json.dumps(settings, indent=1) + "\n")


def check(folder, settings):
    """Refuse a folder that belongs to other settings than these. Raises UserError."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder}: is a file, expected a folder")
    if not (folder / "settings.json").is_file():
        return
    before, now = read_json(folder / "settings.json"), json.loads(json.dumps(settings))
    odd = next((key for key in now if before.get(key) != now[key]), None)
    if odd:
        old, new = (str(s.get(odd))[:60] for s in (before, now))
        raise UserError(f"--output {folder}: was made with other settings ({odd} {old}, now {new}); remove it or "
                        "give another --output")
