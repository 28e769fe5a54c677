"""From predictions to results.json: scores of each fold, their mean and spread, the comparison with a baseline.

results.json: `kind` "classification", `format_version`, `method`, `data` (name of the root), `test_sha256`
(of test.csv), `label_names`, `settings`, `versions`, `folds` (number -> see `fold_result`), `summary` (level ->
threshold -> score -> mean and standard deviation over folds, with n − 1; None for one fold), `significance` (see
`significance`) or None. Levels are "image" and, where it is known which images show one eye, "eye" (else None).
Thresholds are "0.5", as in the paper, and "validation": chosen for each label on the validation images of the fold.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from core.errors import UserError
from core.files import (
    NUMBERS,
    TEXTS,
    json_text,
    read_arrays,
    read_json,
    refused,
    text_writer,
    write_atomically,
    write_json,
    write_together,
)
from core.runtime import versions
from core.schema import Number, check
from core.text import aligned, p_value
from dataset.sets import LabelledImages
from metrics.classification import SCORES, THRESHOLD, all_scores, choose_thresholds, eyes
from metrics.significance import PERMUTATIONS, bootstrap, compare

KIND, FORMAT = "classification", 1
REMAKE = "remove it or make it anew with classify.py"  # what to do about a damaged file
LEVELS, THRESHOLDS = ("image", "eye"), ("0.5", "validation")
SAME_TRAINING = ("backbone", "pretrained", "pretrained_sha256", "image_size", "epochs", "steps_per_epoch",
                 "early_stopping", "global_batch_size", "optimizer", "lr", "weight_decay")  # of all rows of a table

# Schemas of what is read again (core/schema.py).
MACRO = dict.fromkeys(SCORES, (float, None)) | {"labels": Number()}
ROWS = {"0.5": {"macro": MACRO}, "validation?": {"macro": MACRO}}
FOLD = {**dict.fromkeys(("n_train", "n_synthetic", "n_val", "n_test", "steps"), Number()),
        "sha256": {"train": str, "val": str}, "remarks": [str], "levels": {"image": ROWS, "eye": (ROWS, None)},
        "mixed_precision?": (str, None)}
MEANS = {"0.5": {str: {"mean": (float, None)}}, "validation?": {str: {"mean": (float, None)}}}
P = {"difference": float, "p": Number(0, 1, whole=False), "stars": str}
TEST = {"units": Number(), "permutations": Number(1), "permutation": {"ap": P}}
RESULTS = {"kind": KIND, "format_version": FORMAT, "method": str, "data": str, "test_sha256": str, "label_names": [str],
           "settings": {"global_seed": Number()}, "folds": {str: FOLD},
           "summary": {"image": MEANS, "eye": (MEANS, None)},
           "significance": ({"baseline": str, "unit": str, "levels": {str: (TEST, None)}}, None)}
PREDICTIONS = {"filenames": (1, TEXTS), "patients": (1, TEXTS), "eyes": (1, TEXTS + NUMBERS), "label_names": (1, TEXTS),
               "labels": (2, NUMBERS), "scores": (2, NUMBERS),  # an empty `eyes` has no kind of its own
               **{f"{level}_thresholds": (1, NUMBERS) for level in LEVELS}}
COLUMNS = {"sen": "Sen", "spe": "Spe", "auc": "AUC", "f1": "F1", "f1_sen_spe": "F1(sen/spe)", "ap": "mAP"}


# ---- images and eyes


class Predictions(NamedTuple):
    """What a network says of n images, or of n eyes, and the truth."""

    scores: np.ndarray  # (n, K) float64, probabilities
    labels: np.ndarray  # (n, K), 0 or 1
    patients: list  # n names


def at_level(level, scores, images):
    """Predictions for each of the images ("image") or for each of their eyes ("eye"; None where eyes are unknown)."""
    scores = np.asarray(scores, np.float64)
    if level == "image":
        return Predictions(scores, images.labels, list(images.patients))
    if not images.eyes:
        return None
    scores, labels, names = eyes(scores, images.labels, images.eyes)
    patient_of = dict(zip(images.eyes, images.patients, strict=True))
    return Predictions(scores, labels, [patient_of[name] for name in names])


def saved_at_level(level, arrays):
    """Predictions at a level for the test images, from the arrays of `load_predictions`."""
    filenames, patients, eye_names = (arrays[key].tolist() for key in ("filenames", "patients", "eyes"))
    images = LabelledImages((), arrays["labels"], filenames=filenames, patients=patients, eyes=eye_names or None)
    return at_level(level, arrays["scores"], images)


# ---- one fold


def fold_result(fold, validation_scores, test_scores, about, seed):
    """Everything about a finished fold: scores of validation and test images (n, K) -> (dict, arrays for `save_fold`).

    The dict has `about`, n_train (real), n_synthetic, n_val, n_test, `sha256` of the CSV files, `synthetic` folders,
    `remarks` and `levels`: level -> threshold -> `labels` (name -> scores), `macro`, `intervals` (95 %, over patients)
    and `thresholds`.
    """
    levels, thresholds = {}, {}
    for level in LEVELS:
        validation = at_level(level, validation_scores, fold.validation)
        test = at_level(level, test_scores, fold.test)
        thresholds[level] = None if validation is None else choose_thresholds(validation.scores, validation.labels)
        levels[level] = None if test is None else _scored(test, thresholds[level], fold.label_names, seed)
    result = {"fold": fold.number, "n_train": fold.real, "n_synthetic": len(fold.training) - fold.real,
              "n_val": len(fold.validation), "n_test": len(fold.test), "sha256": fold.hashes,
              "synthetic": [s.identity for s in fold.synthetic], "remarks": fold.remarks, **about, "levels": levels}
    undefined = [None] * len(fold.label_names)
    arrays = {"filenames": fold.test.filenames, "patients": fold.test.patients, "eyes": fold.test.eyes or [],
              "label_names": fold.label_names, "labels": fold.test.labels, "scores": test_scores,
              **{f"{level}_thresholds": np.array(thresholds[level] or undefined, np.float64)  # None becomes NaN
                 for level in LEVELS}}
    return result, {name: np.asarray(value) for name, value in arrays.items()}


def _scored(test, chosen, label_names, seed):
    """Threshold -> scores of the test images or eyes; at "validation" if thresholds were `chosen`, one per label.

    A chosen threshold is None where validation images could not decide it; THRESHOLD takes its place.
    """
    rows = {}
    for name, thresholds in (("0.5", [THRESHOLD] * len(label_names)), ("validation", chosen)):
        if thresholds is not None:
            values = [THRESHOLD if t is None else t for t in thresholds]
            rows[name] = {**all_scores(test.scores, test.labels, label_names, values),
                          "intervals": bootstrap(test.scores, test.labels, values, test.patients, seed=seed),
                          "thresholds": dict(zip(label_names, thresholds, strict=True))}
    return rows


def save_fold(folder, result, arrays):
    """Write predictions_{fold}.npz and then, last, fold-{fold}/result.json, which says that the fold is finished."""

    def write(temporary):
        with open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays)

    write_atomically(predictions_file(folder, result["fold"]), write)
    write_json(fold_folder(folder, result["fold"]) / "result.json", result)


def load_predictions(folder, number):
    """The arrays of `save_fold`. Raises UserError."""
    file = predictions_file(folder, number)
    arrays = read_arrays(file, "it belongs beside results.json", PREDICTIONS)
    images, labels = map(len, (arrays["filenames"], arrays["label_names"]))
    shapes = {"patients": (images,), "labels": (images, labels), "scores": (images, labels),
              **{f"{level}_thresholds": (labels,) for level in LEVELS}}
    wrong = [name for name, shape in shapes.items() if arrays[name].shape != shape]
    if wrong or len(arrays["eyes"]) not in (0, images) or not np.isfinite(arrays["scores"]).all():
        raise UserError(f"{file}: damaged (`{(wrong or ['eyes or scores'])[0]}` is not of {images} images and {labels} "
                        "labels); it belongs beside results.json")
    return arrays


def fold_folder(folder, number):
    return Path(folder) / f"fold-{number}"


def predictions_file(folder, number):
    return Path(folder) / f"predictions_{number}.npz"


def finished(folder):
    """Number -> result of the folds in an output folder that are finished. Raises UserError."""
    results = (read_json(file, REMAKE, {"fold": Number(), **FOLD}) for file in Path(folder).glob("fold-*/result.json"))
    return {result["fold"]: result for result in sorted(results, key=lambda result: result["fold"])}


# ---- all folds


def write(folder, method, data, settings, baseline=None, permutations=PERMUTATIONS, seed=0):
    """Put all finished folds of an output folder together and write its results.json -> the rows as text.

    `data`: name of the data root. `baseline`: results.json, or its folder, to test the difference against.
    """
    folds = finished(folder)
    results = {"kind": KIND, "format_version": FORMAT, "method": method, "data": data,
               "test_sha256": settings["test_images"], "label_names": settings["labels"], "settings": settings,
               "versions": versions(), "folds": {str(k): fold for k, fold in folds.items()},
               "summary": summary([*folds.values()]), "significance": None}
    if baseline:
        results["significance"] = significance(results, folder, baseline, permutations, seed)
    text = table(results)
    write_together({folder / "results.json": text_writer(json_text(results)),
                    folder / "results.txt": text_writer(text + "\n")})
    return text


def summary(folds):
    """level -> threshold -> score -> mean and standard deviation over folds."""
    means = {}
    for level in LEVELS:
        parts = [fold["levels"][level] for fold in folds]
        means[level] = None if None in parts else {
            threshold: {score: _mean_and_std([p[threshold]["macro"][score] for p in parts]) for score in SCORES}
            for threshold in THRESHOLDS if all(threshold in p for p in parts)}
    return means


def _mean_and_std(values):
    values = [value for value in values if value is not None]
    return {"mean": float(np.mean(values)) if values else None,
            "std": float(np.std(values, ddof=1)) if len(values) > 1 else None, "folds": len(values)}


def read_results(file):
    """A results.json of classify.py, or that of a folder. Raises UserError."""
    file = Path(file)
    file = file / "results.json" if file.is_dir() else file
    if not file.is_file():
        raise UserError(f"--baseline {file}: no such file; classify.py writes OUTPUT/results.json")
    results = read_json(file, REMAKE)
    if (results.get("kind"), results.get("format_version")) != (KIND, FORMAT):
        raise UserError(f"--baseline {file}: not a results.json of classify.py of this version")
    with refused(file, REMAKE):
        check_results(results)
    return results


def check_results(results):
    """Raise ValueError unless this is what `write` puts into a results.json."""
    check(results, RESULTS)
    if not results["folds"]:
        raise ValueError("`folds` is empty")
    for level, thresholds in results["summary"].items():
        for number, fold in results["folds"].items():
            if level in LEVELS and not {*(thresholds or {})} <= {*(fold["levels"][level] or {})}:
                raise ValueError(f"`folds.{number}.levels.{level}` lacks scores that `summary` has")


def check_comparable(file, settings, folds):
    """Refuse a baseline with another test set, other labels, folds or training than these. Raises UserError."""
    baseline = read_results(file)
    for what, found, expected in (("test.csv", baseline["test_sha256"][:12], settings["test_images"][:12]),
                                  ("labels", " ".join(baseline["label_names"]), " ".join(settings["labels"])),
                                  ("folds", " ".join(baseline["folds"]), " ".join(map(str, sorted(folds))))):
        if found != expected:
            raise UserError(f"--baseline {file}: has {what} {found}, this run has {expected}; compare runs on the same "
                            "data and folds")
    for key in SAME_TRAINING:
        theirs, ours = baseline["settings"].get(key), settings.get(key)
        if theirs != ours and key in baseline["settings"]:
            raise UserError(f"--baseline {file}: was trained with --{key.replace('_', '-')} {theirs}, this run with "
                            f"{ours}; only images may differ")


def significance(results, folder, baseline, permutations, seed):
    """Our folds against those of a baseline -> level -> see `metrics.significance.compare`. Raises UserError.

    Swapped and resampled are whole patients (`unit`); where no patients are known, images. `updates` are the
    optimiser steps of both (their means over folds): where they differ, so may the scores for that reason.
    """
    theirs, their_folder = read_results(baseline), baseline if Path(baseline).is_dir() else Path(baseline).parent
    numbers = list(results["folds"])
    our_folds = [(results["folds"][k], load_predictions(folder, k)) for k in numbers]
    their_folds = [(theirs["folds"][k], load_predictions(their_folder, k)) for k in numbers]
    for k, (_, a), (_, b) in zip(numbers, our_folds, their_folds, strict=True):
        if not all(np.array_equal(a[key], b[key]) for key in ("filenames", "labels", "label_names")):
            raise UserError(f"--baseline {their_folder}: its predictions of fold {k} are of other images or labels; "
                            "run it again")
    levels = {}
    for level in LEVELS:
        if results["summary"][level] is not None and theirs["summary"][level] is not None:
            test = saved_at_level(level, our_folds[0][1])  # labels and patients are the same in all folds
            ours, others = ([_compared(*fold, level) for fold in folds] for folds in (our_folds, their_folds))
            levels[level] = compare(ours, others, test.labels, test.patients, permutations, seed)
    updates = [float(np.mean([fold["steps"] for fold in r["folds"].values()])) for r in (results, theirs)]
    return {"baseline": theirs["method"], "unit": "patient", "levels": levels, "updates": updates}


def _compared(result, arrays, level):
    """What `metrics.significance.compare` takes of one fold of one model: its result and its saved predictions."""
    scores, rows = saved_at_level(level, arrays).scores, result["levels"][level]
    thresholds = {"0.5": THRESHOLD, "validation": np.nan_to_num(arrays[f"{level}_thresholds"], nan=THRESHOLD)}
    return {"scores": scores, "predicted": {name: scores >= thresholds[name] for name in rows}}


# ---- text


def table(results):
    """The rows of the paper's Table 2, in percent, mean ± standard deviation over folds."""
    rows = [["method", "level", "threshold", *COLUMNS.values(), "p"]]
    for level, thresholds in results["summary"].items():
        for threshold, scores in (thresholds or {}).items():
            rows.append([results["method"], level, threshold, *(_percent(scores[key]) for key in COLUMNS),
                         _p_value(results["significance"], level)])
    folds = list(results["folds"].values())
    about = f"{results['data']}, {folds[0]['n_test']} test images, fold(s) {' '.join(results['folds'])}"
    notes = [] if results["summary"]["eye"] else ["eye level: absent, nothing says which images show the same eye"]
    if results["significance"]:
        notes.append(f"p: permutation test on mAP against {results['significance']['baseline']}")
    return "\n".join([about, aligned(rows, left=3), *notes])


def _percent(score):
    if score["mean"] is None:
        return "undefined"
    return f"{100 * score['mean']:.2f}" + ("" if score["std"] is None else f" ± {100 * score['std']:.2f}")


def _p_value(tests, level):
    if tests is None or level not in tests["levels"]:
        return "–"
    test = tests["levels"][level]["permutation"]["ap"]
    return f"{p_value(test['p'])} {test['stars']}".strip()
