"""From predictions to results.json: scores of each fold, their mean and spread, the comparison with a baseline.

results.json: `kind` "classification", `format_version`, `method`, `data` (name of the root), `test_sha256`
(of test.csv), `label_names`, `settings`, `versions`, `folds` (number -> see `fold_result`), `summary` (level ->
threshold -> score -> mean and standard deviation over folds, with n − 1; None for one fold), `significance` (see
`significance`) or None. Levels are "image" and, where it is known which images show one eye, "eye" (else None).
Thresholds are "0.5", as in the paper, and "validation": chosen for each label on the validation images of the fold.
"""

import json
from pathlib import Path

import numpy as np

from core.errors import UserError
from core.files import write_atomically, write_text
from core.runtime import versions
from metrics.classification import SCORES, THRESHOLD, all_scores, choose_thresholds, eyes
from metrics.significance import bootstrap, compare

KIND, FORMAT = "classification", 1
THRESHOLDS = ("0.5", "validation")
SAME_TRAINING = ("backbone", "pretrained", "pretrained_sha256", "image_size", "epochs", "steps_per_epoch",
                 "early_stopping", "global_batch_size", "optimizer", "lr", "weight_decay")  # of all rows of a table
COLUMNS = {"sen": "Sen", "spe": "Spe", "auc": "AUC", "f1": "F1", "f1_sen_spe": "F1(sen/spe)", "ap": "mAP"}


# ---- one fold


def fold_result(fold, validation, test, about, seed):
    """Everything about a finished fold: scores of validation and test images (n, K) -> (dict, arrays for `save_fold`).

    The dict has `about`, n_train (real), n_synthetic, n_val, n_test, `sha256` of the CSV files, `synthetic` folders,
    `remarks` and `levels`: level -> threshold -> `labels` (name -> scores), `macro`, `intervals` (95 %, over patients)
    and `thresholds`.
    """
    levels, chosen = {"image": None, "eye": None}, {}
    for level in levels:
        known, tuning = at_level(level, validation, fold.validation), at_level(level, test, fold.test)
        chosen[level] = choose_thresholds(*known[:2]) if known else [None] * len(fold.label_names)
        if tuning:
            levels[level] = {name: _scored(*tuning, fold.label_names, limits, seed)
                             for name, limits in zip(THRESHOLDS, (None, chosen[level] if known else None), strict=True)
                             if name != "validation" or known}
    result = {"fold": fold.number, "n_train": fold.real, "n_synthetic": len(fold.training) - fold.real,
              "n_val": len(fold.validation), "n_test": len(fold.test), "sha256": fold.hashes,
              "synthetic": [s.identity for s in fold.synthetic], "remarks": fold.remarks, **about, "levels": levels}
    arrays = {"filenames": fold.test.filenames, "patients": fold.test.patients, "eyes": fold.test.eyes or [],
              "label_names": fold.label_names, "labels": fold.test.labels, "scores": test,
              **{f"{level}_thresholds": np.array([np.nan if t is None else t for t in chosen[level]])
                 for level in levels}}
    return result, {name: np.asarray(value) for name, value in arrays.items()}


def at_level(level, scores, images):
    """(scores, labels, patients) of images, or of their eyes; None where eyes are unknown."""
    scores = np.asarray(scores, np.float64)
    if level == "image":
        return scores, images.labels, list(images.patients)
    if not images.eyes:
        return None
    best, labels, names = eyes(scores, images.labels, images.eyes)
    owner = dict(zip(images.eyes, images.patients, strict=True))
    return best, labels, [owner[name] for name in names]


def _scored(scores, labels, patients, label_names, thresholds, seed):
    found = all_scores(scores, labels, label_names, thresholds)
    limits = [THRESHOLD if t is None else t for t in thresholds or [None] * len(label_names)]
    found["intervals"] = bootstrap(scores, labels, limits, patients, seed=seed)
    return found | {"thresholds": dict(zip(label_names, thresholds or limits, strict=True))}


def save_fold(folder, result, arrays):
    """Write predictions_{fold}.npz and then, last, fold-{fold}/result.json, which says that the fold is finished."""

    def write(temporary):
        with open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays)

    write_atomically(predictions_file(folder, result["fold"]), write)
    write_text(fold_folder(folder, result["fold"]) / "result.json", json.dumps(result, indent=1) + "\n")


def fold_folder(folder, number):
    return Path(folder) / f"fold-{number}"


def predictions_file(folder, number):
    return Path(folder) / f"predictions_{number}.npz"


def finished(folder):
    """Number -> result of the folds in an output folder that are finished. Raises UserError."""
    found = {}
    for file in sorted(Path(folder).glob("fold-*/result.json")):
        result = read_json(file)
        found[result["fold"]] = result
    return dict(sorted(found.items()))


def read_json(file):
    try:
        return json.loads(Path(file).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}); remove it or make it anew with classify.py") from None


# ---- all folds


def write(args, settings):
    """Put all finished folds together, compare them with --baseline, write results.json -> the rows as text."""
    folds = finished(args.output)
    results = {"kind": KIND, "format_version": FORMAT, "method": args.method, "data": args.data_path.resolve().name,
               "test_sha256": settings["test_images"], "label_names": settings["labels"], "settings": settings,
               "versions": versions(), "folds": {str(k): fold for k, fold in folds.items()},
               "summary": summary([*folds.values()]), "significance": None}
    if args.baseline:
        baseline = read_results(args.baseline)
        place = args.baseline if args.baseline.is_dir() else args.baseline.parent
        results["significance"] = significance(results, args.output, baseline, place, args.permutations,
                                               args.global_seed)
    write_text(args.output / "results.json", json.dumps(results, indent=1) + "\n")
    write_text(args.output / "results.txt", table(results) + "\n")
    return table(results)


def summary(folds):
    """level -> threshold -> score -> mean and standard deviation over folds."""
    found = {}
    for level in ("image", "eye"):
        parts = [fold["levels"][level] for fold in folds]
        found[level] = None if None in parts else {
            threshold: {score: _mean_and_std([p[threshold]["macro"][score] for p in parts]) for score in SCORES}
            for threshold in THRESHOLDS if all(threshold in p for p in parts)}
    return found


def _mean_and_std(values):
    values = [value for value in values if value is not None]
    return {"mean": float(np.mean(values)) if values else None,
            "std": float(np.std(values, ddof=1)) if len(values) > 1 else None, "folds": len(values)}


def read_results(file, flag="--baseline"):
    """A results.json of classify.py, or that of a folder. Raises UserError."""
    file = Path(file)
    file = file / "results.json" if file.is_dir() else file
    if not file.is_file():
        raise UserError(f"{flag} {file}: no such file; classify.py writes OUTPUT/results.json")
    found = read_json(file)
    if not isinstance(found, dict) or found.get("kind") != KIND or found.get("format_version") != FORMAT:
        raise UserError(f"{flag} {file}: not a results.json of classify.py of this version")
    return found


def check_comparable(file, settings, folds):
    """Refuse a baseline with another test set, other labels, folds or training than these. Raises UserError."""
    baseline = read_results(file)
    lacks = [key for key in ("test_sha256", "label_names", "folds", "settings", "summary") if key not in baseline]
    if lacks:
        raise UserError(f"--baseline {file}: has no `{lacks[0]}`; it is not what classify.py wrote")
    for what, found, expected in (("test.csv", baseline["test_sha256"][:12], settings["test_images"][:12]),
                                  ("labels", " ".join(baseline["label_names"]), " ".join(settings["labels"])),
                                  ("folds", " ".join(baseline["folds"]), " ".join(map(str, sorted(folds))))):
        if found != expected:
            raise UserError(f"--baseline {file}: has {what} {found}, this run has {expected}; compare runs on the same "
                            "data and folds")
    for key in SAME_TRAINING:
        if baseline["settings"].get(key) != settings.get(key) and key in baseline["settings"]:
            raise UserError(f"--baseline {file}: was trained with --{key.replace('_', '-')} "
                            f"{baseline['settings'][key]}, this run with {settings.get(key)}; only images may differ")


def significance(results, folder, baseline, baseline_folder, permutations, seed):
    """Our folds against those of a baseline -> level -> see `metrics.significance.compare`.

    Swapped and resampled are whole patients (`unit`); where no patients are known, images. `updates` are the
    optimiser steps of both (their means over folds): where they differ, so may the scores for that reason.
    """
    numbers = list(results["folds"])
    ours, theirs = ([load_predictions(place, k) for k in numbers] for place in (folder, baseline_folder))
    for k, a, b in zip(numbers, ours, theirs, strict=True):
        if not all(np.array_equal(a[key], b[key]) for key in ("filenames", "labels", "label_names")):
            raise UserError(f"--baseline {baseline_folder}: its predictions of fold {k} are of other images or labels; "
                            "run it again")
    found = {"baseline": baseline["method"], "unit": "patient", "levels": {},
             "updates": [float(np.mean([fold["steps"] for fold in r["folds"].values()])) for r in (results, baseline)]}
    for level in ("image", "eye"):
        if results["summary"][level] is None or baseline["summary"][level] is None:
            continue
        sides = [[_side(r["folds"][k], p, level) for k, p in zip(numbers, predictions, strict=True)]
                 for r, predictions in ((results, ours), (baseline, theirs))]
        _, labels, patients = at_level(level, ours[0]["scores"], _Stored(ours[0]))
        found["levels"][level] = compare(*sides, labels, patients, permutations, seed)
    return found


def load_predictions(folder, number):
    """The arrays of `save_fold`. Raises UserError."""
    file = predictions_file(folder, number)
    try:
        with np.load(file) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{file}: cannot be read ({error}); it belongs beside results.json") from None


class _Stored:
    """Predictions as `at_level` wants them."""

    def __init__(self, arrays):
        self.labels, self.patients, self.eyes = (arrays["labels"], arrays["patients"].tolist(), arrays["eyes"].tolist())


def _side(result, arrays, level):
    scores = at_level(level, arrays["scores"], _Stored(arrays))[0]
    limits = {"0.5": np.full(scores.shape[1], THRESHOLD),
              "validation": np.nan_to_num(arrays[f"{level}_thresholds"], nan=THRESHOLD)}
    return {"scores": scores, "predicted": {name: scores >= limits[name] for name in result["levels"][level]}}


# ---- text


def table(results):
    """The rows of the paper's Table 2, in percent, mean ± standard deviation over folds."""
    lines = [["method", "level", "threshold", *COLUMNS.values(), "p"]]
    for level, thresholds in results["summary"].items():
        for threshold, scores in (thresholds or {}).items():
            lines.append([results["method"], level, threshold, *(_percent(scores[key]) for key in COLUMNS),
                          _p_value(results["significance"], level)])
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    lines = ["  ".join(f"{cell:<{w}}" if i < 3 else f"{cell:>{w}}"
                       for i, (cell, w) in enumerate(zip(line, widths, strict=True))) for line in lines]
    folds = list(results["folds"].values())
    about = f"{results['data']}, {folds[0]['n_test']} test images, fold(s) {' '.join(results['folds'])}"
    notes = [] if results["summary"]["eye"] else ["eye level: absent, nothing says which images show the same eye"]
    if results["significance"]:
        notes.append(f"p: permutation test on mAP against {results['significance']['baseline']}")
    return "\n".join([about, *lines, *notes])


def _percent(score):
    if score["mean"] is None:
        return "undefined"
    return f"{100 * score['mean']:.2f}" + ("" if score["std"] is None else f" ± {100 * score['std']:.2f}")


def _p_value(found, level):
    test = ((found or {}).get("levels", {}).get(level) or {}).get("permutation", {}).get("ap")
    return "–" if test is None else f"{test['p']:.4f} {test['stars']}".strip()
