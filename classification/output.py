"""The output folder of classify.py: what may go on in it, what may not.

Every fold has a folder of its own in it; folds may be added one after another, or by several jobs at the same time.
"""

import json
import re
from pathlib import Path

from classification.report import fold_folder, read_json
from core import runs
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


def find_output(args, settings, folds):
    """The folder that --output names or, without it, the next free one or that of the same run. Raises UserError."""
    folder = args.output
    if folder is None:
        name = re.sub(r"[^\w.+-]+", "-", args.method)
        folder, _ = runs.find_or_number(DEFAULT, name, settings)
    check(folder, settings)
    for fold in folds:
        check(fold_folder(folder, fold.number), settings_of_fold(settings, fold))
    return Path(folder)


def claim(folder, settings):
    """From now on, the folder belongs to runs of these settings."""
    write_text(folder / "settings.json", json.dumps(settings, indent=1) + "\n")


def check(folder, settings):
    """Refuse a folder that holds other results than these settings give. Raises UserError."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder}: is a file, expected a folder")
    if not (folder / "settings.json").is_file():
        return
    before, wanted = read_json(folder / "settings.json"), json.loads(json.dumps(settings))
    odd = next((key for key in wanted if before.get(key) != wanted[key]), None)
    if odd:
        found, new = (str(s.get(odd))[:60] for s in (before, wanted))
        raise UserError(f"--output {folder}: was made with other settings ({odd} {found}, now {new}); remove it or "
                        "give another --output")
