"""The output folder of classify.py: which runs may continue in it.

Every fold has a folder of its own in it; folds may be added one after another, or by several jobs at the same time.
"""

import re
from pathlib import Path

from classification.report import fold_folder
from core import claims, runs
from core.errors import UserError
from core.files import file_hash, make_folder

DEFAULT = "results_classify"
RENAMED = {"real_to_synthetic": ("synthetic_ratio", {})}  # settings of older folders


def settings_of_fold(settings, fold):
    """What the runs of one fold must share: the settings of all folds, and its images."""
    return settings | {"fold": fold.number, "training_images": fold.hashes["train"],
                       "validation_images": fold.hashes["val"], "synthetic": [s.identity for s in fold.synthetic],
                       "filter": fold.filter and file_hash(fold.filter)}


def find_output(folder, method, settings, folds, defaults):
    """The given folder or, for None, that of the same run in DEFAULT or the next free one -> (folder, note).

    `defaults` are those of the flags, `note` is that of `core.runs.find`. Raises UserError.
    """
    note = None
    if folder is None:
        folder, _, note = runs.find(DEFAULT, _run_name(method), settings, defaults, renamed=RENAMED)
    check(folder, settings, defaults)
    for fold in folds:
        check(fold_folder(folder, fold.number), settings_of_fold(settings, fold), defaults)
    return Path(folder), note


def claim_output(folder, method, settings, defaults):
    """The given folder or, for None, that of the same run in DEFAULT or a new one; it belongs to these settings."""
    if folder is None:
        return runs.claim(DEFAULT, _run_name(method), settings, defaults, renamed=RENAMED)[0]
    make_folder(folder, "--output")
    claims.write_settings(folder, settings)
    return Path(folder)


def _run_name(method):
    return re.sub(r"[^\w.+-]+", "-", method)


def check(folder, settings, defaults=None):
    """Refuse a folder that holds other results than these settings give (`core.claims`). Raises UserError."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder}: is a file, expected a folder")
    stored = claims.read_settings(folder, "remove it or give another --output")
    if stored is not None and (different := claims.differences(stored, settings, defaults, RENAMED)):
        raise UserError(f"--output {folder}: was made with other settings ({claims.described(different)}); remove it "
                        "or give another --output")
