"""results.json of evaluate.py and classify.py, read for tables, and what must agree between those of one table."""

import json

from core.errors import UserError

FORMAT = 1
KEYS = {  # kind -> what such a file must have
    "generation": ("data", "rows", "spaces", "gg_space", "networks", "image_size", "subsets"),
    "classification": ("method", "data", "test_sha256", "label_names", "settings", "folds", "summary", "significance"),
}


def read(paths):
    """Every results.json among and below these paths, as dicts with their `path`. Raises UserError."""
    files = [file for path in paths for file in (sorted(path.rglob("results.json")) if path.is_dir() else [path])]
    files = list(dict.fromkeys(file.resolve() for file in files))
    if not files:
        raise UserError(f"{paths[0]}: found no results.json; give files or folders of evaluate.py and classify.py")
    return [_read(file) for file in files]


def _read(file):
    try:
        content = json.loads(file.read_text())
        kind, version = content["kind"], content["format_version"]
        lacking = [key for key in KEYS.get(kind, ()) if key not in content]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file}: not results of evaluate.py or classify.py ({error!r})") from None
    if kind not in KEYS or version != FORMAT:
        raise UserError(f"{file}: is {kind} in format {version}, expected generation or classification in format "
                        f"{FORMAT}; score again with this version")
    if lacking:
        raise UserError(f"{file}: has no `{lacking[0]}`; it is not what evaluate.py or classify.py wrote")
    return {**content, "path": file}


def agree(results, what, value):
    """Raise UserError unless `value(result)` is the same for all."""
    agree_in_files([(result["path"], value(result)) for result in results], what)


def agree_in_files(pairs, what):
    """Raise UserError unless all pairs (path, value) have the same value."""
    for path, value in pairs[1:]:
        first, expected = pairs[0]
        if value != expected:
            raise UserError(f"{path}: {what} is {value}, but {expected} in {first}; such rows cannot stand in one "
                            "table")


def agree_per_fold(runs, what):
    """Raise UserError unless runs, (path, fold, value), have one value for each fold."""
    known = {}
    for path, fold, value in runs:
        expected, first = known.setdefault(fold, (value, path))
        if value != expected:
            raise UserError(f"{path}: {what} of fold {fold} differ from those of {first}; such rows cannot stand in "
                            "one table")


def agree_in_folds(folds_of, what="results"):
    """Raise UserError unless every method has been scored on the same folds; method -> folds."""
    (first, expected), *others = folds_of.items()
    for method, folds in others:
        if set(folds) != set(expected):
            raise UserError(f"{method} has {what} of folds {listed(folds)}, {first} of folds {listed(expected)}; "
                            "score all methods on the same folds")


def listed(folds):
    """Folds or seeds as text, each once."""
    return " ".join(map(str, sorted(set(folds))))
