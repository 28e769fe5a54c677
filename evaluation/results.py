"""results.json of evaluate.py and classify.py, read for tables, and what must agree between those of one table."""

from classification.report import check_results
from core.errors import UserError
from core.files import read_json, refused
from core.schema import Number, check
from dataset.samples import ABOUT

FORMAT = 1
SPREAD = {"mean": float, "std": float}
ROW = {"kind": ("generated", "real"), "name": str, "folder": str, "images": Number(), "sha256": str, "about": ABOUT,
       "kid": {str: SPREAD}, "lpips": (SPREAD, None), "gg": ({"gap": float}, None)}
GENERATION = {  # schema of what evaluate.py writes, as far as tables need it
    "kind": "generation", "format_version": FORMAT, "image_size": Number(1), "subsets": Number(1),
    "data": {"name": str, "fold": Number(), "labels": [str], "validation_sha256": str, "training_sha256": str},
    "spaces": [str], "gg_space": str, "networks": {str: {"identity": str}}, "rows": [ROW]}
ADVICE = "expected what evaluate.py or classify.py writes; score again"


def check_generation(results):
    """Raise ValueError unless this is what evaluate.py puts into a results.json."""
    check(results, GENERATION)
    spaces = results["spaces"]
    if not spaces or not {*spaces, results["gg_space"]} <= results["networks"].keys():
        raise ValueError("`networks` does not have all of `spaces` and `gg_space`")
    if not all(spaces[0] in row["kid"] for row in results["rows"]):
        raise ValueError(f"a row has no `kid` in {spaces[0]}")


CHECKS = {"generation": check_generation, "classification": check_results}


def read(paths):
    """Every results.json among and below these paths, as dicts with their `path`. Raises UserError."""
    files = [file for path in paths for file in (sorted(path.rglob("results.json")) if path.is_dir() else [path])]
    files = list(dict.fromkeys(file.resolve() for file in files))
    if not files:
        raise UserError(f"{paths[0]}: found no results.json; give files or folders of evaluate.py and classify.py")
    return [_read(file) for file in files]


def _read(file):
    content = read_json(file, ADVICE, {"kind": str, "format_version": int})
    kind, version = content["kind"], content["format_version"]
    if kind not in CHECKS or version != FORMAT:
        raise UserError(f"{file}: is {kind} in format {version}, expected generation or classification in format "
                        f"{FORMAT}; score again with this version")
    with refused(file, ADVICE):
        CHECKS[kind](content)
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
