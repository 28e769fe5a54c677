"""The output folder of classify.py: what may go on in it, what may not.

Every fold has a folder of its own in it; folds may be added one after another, or by several jobs at the same time.
"""

import json
import re
from pathlib import Path

from classification.report import fold_folder
from core import claims, runs
from core.errors import UserError
from core.files import file_hash, write_text

DEFAULT = "results_classify"
NOT_SETTINGS = ("fold", "output", "synthetic", "baseline", "permutations", "data_path", "pretrained_file", "log_every",
                "num_workers", "cache_gb", "mixed_precision")  # of these, a continued run may have others


def settings_of(args, first):
    """What a run must share with one that it continues: flags, labels, the test set; `first` is a fold of it."""
    flags = {key: value for key, value in sorted(vars(args).items()) if key not in NOT_SETTINGS}
    weights = file_hash(args.pretrained_file) if args.pretrained_file and args.pretrained_file.is_file() else None
    return flags | {"labels": list(first.label_names), "test_images": first.hashes["test"],
                    "has_synthetic": bool(first.synthetic), "pretrained_sha256": weights}


def settings_of_fold(settings, fold):
    """And what a fold must share with one that was begun: its images."""
    return settings | {"fold": fold.number, "training_images": fold.hashes["train"],
                       "validation_images": fold.hashes["val"], "synthetic": [s.identity for s in fold.synthetic]}


def find_output(args, settings, folds, defaults):
    """The folder that --output names or, without it, the next free one or that of the same run -> (folder, note).

    `defaults` are those of the flags, `note` is that of `core.runs.find_or_number`. Raises UserError.
    """
    folder, note = args.output, None
    if folder is None:
        name = re.sub(r"[^\w.+-]+", "-", args.method)
        folder, _, note = runs.find_or_number(DEFAULT, name, settings, defaults)
    check(folder, settings, defaults)
    for fold in folds:
        check(fold_folder(folder, fold.number), settings_of_fold(settings, fold), defaults)
    return Path(folder), note


def claim(folder, settings):
    """From now on, the folder belongs to runs of these settings."""
    write_text(folder / "settings.json", json.dumps(settings, indent=1) + "\n")


def check(folder, settings, defaults=None):
    """Refuse a folder that holds other results than these settings give (`core.claims`). Raises UserError."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder}: is a file, expected a folder")
    stored = claims.read_settings(folder, "remove it or give another --output")
    if stored is not None and (different := claims.differences(stored, settings, defaults)):
        name, (old, new) = next(iter(different.items()))
        raise UserError(f"--output {folder}: was made with other settings ({name} {str(old)[:60]}, now "
                        f"{str(new)[:60]}); remove it or give another --output")
