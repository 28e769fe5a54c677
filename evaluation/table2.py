"""Table 2, classification with and without synthetic images: results of classify.py beside the paper's numbers."""

from classification.report import COLUMNS, SAME_TRAINING
from core.errors import UserError
from evaluation import paper
from evaluation.results import agree, agree_in_files, agree_per_fold, listed
from evaluation.tables import NOT_RUN, Cell, PValue, Table, in_order, mark_best, over
from metrics.classification import THRESHOLD
from metrics.significance import holm, stars

ROWS = {"baseline": paper.BASELINE, "baseline-without-augmentation": paper.WITHOUT}  # --method -> row of the table
AUGMENT = {paper.BASELINE: "geometric", paper.WITHOUT: "none"}  # row without synthetic images -> its --augment


def table_2(results, level="auto", threshold="0.5", with_paper=True):
    """Results of classify.py -> Table: scores of the test set, ours beside the paper's.

    level: auto, image or eye; threshold: 0.5 or validation; with_paper: the paper's numbers beside ours, and its rows
    also where nothing of ours is. Raises UserError for results that cannot stand in one table, or that lack this level
    or threshold.
    """
    check_comparable(results)
    level = _level(results, level)
    without = next((r for r in results if threshold not in r["summary"][level]), None)
    if without:
        raise UserError(f"--threshold {threshold}: {without['path']} has none at {level} level; give 0.5")
    methods = {}  # row of the table -> its results, one of each seed
    for r in results:
        methods.setdefault(ROWS.get(r["method"], r["method"]), []).append(r)
    p_values, body = _adjusted_p(methods, level), []
    for name in in_order({*methods, *(paper.TABLE_2 if with_paper else ())}, paper.TABLE_2):
        *paper_scores, paper_p = paper.TABLE_2.get(name) or [None] * (len(COLUMNS) + 1)
        row, ours = [name], methods.get(name, [])
        for score, paper_score in zip(COLUMNS, paper_scores, strict=True):
            row += [Cell(*paper_score) if paper_score else "–"] * with_paper
            row.append(_our_cell(ours, level, threshold, score))
        body.append([*row, *[paper_p or "–"] * with_paper, _p_cell(name, methods, p_values)])
    for column in range(1, 1 + (1 + with_paper) * len(COLUMNS)):
        body = mark_best(body, column, max)
    whose = (", paper", ", ours") if with_paper else ("",)
    heads = ["Training images", *(f"{head} ↑{of}" for head in COLUMNS.values() for of in whose),
             *(f"p{of}" for of in whose)]
    return Table("Table 2. Classification with synthetic images", heads, body,
                 _notes(results, methods, level, threshold, p_values, with_paper), "tab:classification")


# ---- what cannot stand in one table


def check_comparable(results):
    """Raise UserError unless these results of classify.py can stand in one table."""
    agree(results, "test.csv", lambda r: r["test_sha256"][:12])
    agree(results, "the label names", lambda r: " ".join(r["label_names"]))
    agree(results, "the folds", lambda r: " ".join(r["folds"]))
    for part in ("train", "val"):
        agree_per_fold([(r["path"], k, fold["sha256"][part]) for r in results for k, fold in r["folds"].items()],
                       f"the images of {part}.csv")
    for name in SAME_TRAINING:
        agree(results, _flag(name), lambda r, name=name: r["settings"].get(name))
    augmented = [r for r in results if ROWS.get(r["method"]) != paper.WITHOUT]
    agree(augmented, "--augment", lambda r: r["settings"].get("augment"))
    agree([r for r in results if r["significance"]], "the --baseline of p", lambda r: r["significance"]["baseline"])
    precisions = {(r["path"], fold.get("mixed_precision")) for r in results for fold in r["folds"].values()}
    agree_in_files(sorted(precisions, key=str), "--mixed-precision")
    for r in results:
        _check_baseline(r)
    _check_seeds(results)


def _flag(name):
    return f"--{name.replace('_', '-')}"


def _check_baseline(result):
    """Refuse a result that is called a baseline and was trained with synthetic images or another augmentation."""
    expected = AUGMENT.get(ROWS.get(result["method"]))
    if expected is None:
        return
    augment = result["settings"].get("augment", expected)
    synthetic = any(fold["n_synthetic"] for fold in result["folds"].values())
    if synthetic or augment != expected:
        raise UserError(f"{result['path']}: is called {result['method']}, but was trained with "
                        f"{'synthetic images' if synthetic else f'--augment {augment}'}; score it again under another "
                        "--method")


def _check_seeds(results):
    """Refuse two results of the same method and seed."""
    known = {}
    for r in results:
        method, seed = r["method"], r["settings"].get("global_seed")
        first = known.setdefault((method, seed), r["path"])
        if first != r["path"]:
            raise UserError(f"{r['path']}: is {method} with seed {seed}, and so is {first}; give one of them, or score "
                            "one again under another --method")


def _level(results, level):
    """Image or eye; auto: eyes where they are known in all results. Raises UserError for unknown eyes."""
    without = next((r for r in results if r["summary"]["eye"] is None), None)
    if level == "eye" and without:
        raise UserError(f"--level eye: {without['path']} has none, nothing says which images show the same eye; give "
                        "--level image")
    if level == "auto":
        return "image" if without else "eye"
    return level


# ---- cells


def _our_cell(results, level, threshold, score):
    """Mean and standard deviation of a score over the folds and seeds of a method, per cent."""
    values = [fold["levels"][level][threshold]["macro"][score] for r in results for fold in r["folds"].values()]
    cell = over(values, scale=100)
    return "undefined" if values and cell.mean is None else cell


def _adjusted_p(methods, level):
    """Row -> p of the permutation test on mAP after Holm's correction; of several seeds the largest counts."""
    largest = {}
    for name, results in methods.items():
        tests = [r["significance"]["levels"].get(level) if r["significance"] else None for r in results]
        if all(tests):
            largest[name] = max(test["permutation"]["ap"]["p"] for test in tests)
    return dict(zip(largest, holm([*largest.values()]), strict=True))


def _p_cell(name, methods, p_values):
    if name in p_values:
        return PValue(p_values[name], stars(p_values[name]))
    return "–" if name == paper.BASELINE and name in methods else NOT_RUN


# ---- footnotes


def _notes(results, methods, level, threshold, p_values, with_paper):
    folds = [fold for r in results for fold in r["folds"].values()]
    notes = [f"Paper: {paper.SOURCE}, Table 2; its own OCT data, 11 labels, ResNet-50; which test its stars are of "
             "is not said. Per cent, mean ± standard deviation over folds, its and ours." if with_paper else
             "Per cent, mean ± standard deviation over folds.",
             _note_on_training(results, level, threshold),
             _note_on_images(methods, folds)]
    if p_values:
        notes.append(_note_on_p(results, level, len(p_values)))
    return notes + list(dict.fromkeys(remark for fold in folds for remark in fold["remarks"]))


def _note_on_training(results, level, threshold):
    first = results[0]
    settings, scores = first["settings"], next(iter(first["folds"].values()))["levels"][level][threshold]["macro"]
    weights = "published weights" if settings.get("pretrained") else "random weights"
    limit = THRESHOLD if threshold == "0.5" else "chosen for each label on the validation images"
    return (f"Ours: {first['data']}, {level} level, threshold {limit}; folds {' '.join(first['folds'])}; seeds "
            f"{listed(r['settings'].get('global_seed') for r in results)}; means over the {scores['labels']} of "
            f"{len(first['label_names'])} labels that some test images have and some have not. "
            f"{settings.get('backbone')} from {weights}, {settings.get('image_size')} pixels.")


def _note_on_images(methods, folds):
    counted = []
    for name in in_order(methods, paper.TABLE_2):
        of_method = [fold for r in methods[name] for fold in r["folds"].values()]
        counted.append(f"{name}: {_span(of_method, 'n_train')} real, {_span(of_method, 'n_synthetic')} synthetic, "
                       f"{_span(of_method, 'steps')} updates")
    return (f"Images: {'; '.join(counted)}; {_span(folds, 'n_val')} for validation, {_span(folds, 'n_test')} for the "
            "test.")


def _span(folds, key):
    """The numbers 60, 62, 61 of folds -> "60–62"."""
    values = sorted({fold[key] for fold in folds})
    return str(values[0]) if len(values) == 1 else f"{values[0]}–{values[-1]}"


def _note_on_p(results, level, comparisons):
    test = next(r["significance"] for r in results if r["significance"] and r["significance"]["levels"].get(level))
    units, permutations = (test["levels"][level][key] for key in ("units", "permutations"))
    return (f"p: two-sided permutation test on mAP against {test['baseline']}, predictions of whole {test['unit']}s "
            f"({units}) swapped {permutations} times, after Holm's correction for {comparisons} comparison(s); of "
            "several seeds the largest. * p < .05, ** p < .01, *** p < .001, **** p < .0001; no p can be below "
            f"{comparisons / (1 + permutations):.1g}.")
