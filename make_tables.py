"""Tables 1 and 2 of the paper from results.json files, the paper's numbers beside ours: Markdown, LaTeX and CSV.

    python make_tables.py results --output tables
    python make_tables.py reports/fold-0/results.json classify/GeCA-S/results.json --output tables

Results are files of evaluate.py and classify.py, or folders that are searched for them. A cell is mean ± standard
deviation over the results of a method (folds, seeds); a score of Table 1 that there is once has its own spread.
Results that cannot stand in one table (other data, other images in the same fold, another image size or feature space,
another test set, other folds for other methods, classifiers trained in another way) are refused. Writes table1.* from
results of evaluate.py and table2.* from those of classify.py.
"""

import json
from pathlib import Path

from classification.report import COLUMNS, SAME_TRAINING
from core.cli import Parser, run
from core.errors import UserError
from core.files import make_folder, write_text
from evaluation import paper
from evaluation.tables import NOT_RUN, Cell, Table, in_order, mark_best, over
from metrics.classification import THRESHOLD
from metrics.significance import holm, stars

KEYS = {"generation": ("data", "rows", "spaces", "gg_space", "networks", "image_size", "subsets"),
        "classification": ("method", "data", "test_sha256", "label_names", "settings", "folds", "summary",
                           "significance")}
ROWS = {"baseline": paper.BASELINE, "baseline-without-augmentation": paper.WITHOUT}  # a method's row of Table 2


def main():
    args = parser().parse_args()
    results = read(args.results)
    tables = {}
    generation = [r for r in results if r["kind"] == "generation"]
    classification = [r for r in results if r["kind"] == "classification"]
    if generation:
        tables["table1"] = table_1(generation)
    if classification:
        tables["table2"] = table_2(classification, args.level, args.threshold)
    make_folder(args.output, "--output")
    for name, table in tables.items():
        for suffix, content in (("md", table.markdown()), ("tex", table.latex()), ("csv", table.csv())):
            write_text(args.output / f"{name}.{suffix}", content)
        print(table.markdown())
    print(f"{args.output}: " + ", ".join(f"{name}.md, .tex, .csv" for name in tables))


def read(paths):
    """Every results.json among and below these paths, as dicts with their `path`. Raises UserError."""
    files = [file for path in paths for file in (sorted(path.rglob("results.json")) if path.is_dir() else [path])]
    files = list(dict.fromkeys(file.resolve() for file in files))
    if not files:
        raise UserError(f"{paths[0]}: found no results.json; give files or folders of evaluate.py and classify.py")
    found = []
    for file in files:
        try:
            content = json.loads(file.read_text())
            known = content["kind"] in KEYS and content["format_version"] == 1
            lacks = [key for key in KEYS.get(content["kind"], ()) if key not in content]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{file}: not results of evaluate.py or classify.py ({error!r})") from None
        if not known:
            raise UserError(f"{file}: is {content['kind']} in format {content['format_version']}, expected generation "
                            "or classification in format 1; score again with this version")
        if lacks:
            raise UserError(f"{file}: has no `{lacks[0]}`; it is not what evaluate.py or classify.py wrote")
        found.append({**content, "path": file})
    return found


def agree(results, what, value):
    """Raise UserError unless `value(result)` is the same for all."""
    for other in results[1:]:
        if value(other) != value(results[0]):
            raise UserError(f"{other['path']}: {what} is {value(other)}, but {value(results[0])} in "
                            f"{results[0]['path']}; such rows cannot stand in one table")


def same_per_fold(runs, what):
    """Raise UserError unless runs, (path, fold, value), have one value for each fold."""
    known = {}
    for path, fold, value in runs:
        before, first = known.setdefault(fold, (value, path))
        if value != before:
            raise UserError(f"{path}: {what} of fold {fold} differ from those of {first}; such rows cannot stand in "
                            "one table")


def same_folds(folds_of, seen="results"):
    """Raise UserError unless every method has been scored on the same folds; method -> folds."""
    first, *others = folds_of.items()
    for method, folds in others:
        if set(folds) != set(first[1]):
            raise UserError(f"{method} has {seen} of folds {_list(folds)}, {first[0]} of folds {_list(first[1])}; "
                            "score all methods on the same folds")


def _list(folds):
    return " ".join(map(str, sorted(set(folds))))


# ---- Table 1

def table_1(results):
    """Quality of generated images: parameters, KID, LPIPS and GG, for each data set that results are of."""
    agree(results, "image size", lambda r: r["image_size"])
    agree(results, "feature space of GG", lambda r: _identity(r, r["gg_space"]))
    agree(results, "feature space of KID", lambda r: _identity(r, r["spaces"][0]))
    agree(results, "number of KID subsets", lambda r: r["subsets"])
    names = sorted({r["data"]["name"] for r in results})
    per_data = {name: rows_of(name, results) for name in names}
    methods = in_order({m for rows in per_data.values() for m in rows} | {*paper.PARAMETERS}, paper.PARAMETERS)
    space, gg_space = results[0]["spaces"][0], results[0]["gg_space"]
    heads = ["Method", "Params (M)"]
    for data in paper.TABLE_1:
        heads += [f"paper, {data}: {score}" for score in ("KID ↓", "LPIPS ↑", "GG")]
    for name in names:
        heads += [f"{name}: {score}" for score in (f"KID[{space}] ↓", "LPIPS ↑", f"GG[{gg_space}]")]
    body = [[method, parameters(method, per_data), *paper_cells(method),
             *(cell for rows in per_data.values() for cell in our_cells(rows.get(method, [])))] for method in methods]
    for column, head in enumerate(heads):
        if "KID" in head or "LPIPS" in head:
            body = mark_best(body, column, min if "KID" in head else max)
    return Table("Table 1. Image generation", heads, body, notes_1(results, per_data))


def _identity(result, space):
    return result["networks"][space]["identity"]


def rows_of(name, results):
    """Method -> its generated rows on this data set, each with its fold; checked to be comparable."""
    ours = [r for r in results if r["data"]["name"] == name]
    agree(ours, "label names", lambda r: r["data"]["labels"])
    for key in ("validation_sha256", "training_sha256"):
        same_per_fold([(r["path"], r["data"]["fold"], r["data"][key]) for r in ours], f"the {key.split('_')[0]} images")
    found = {}
    for r in ours:
        for row in r["rows"]:
            if row["kind"] == "generated":
                method = row["about"].get("model") or row["name"]
                entry = {**row, "fold": r["data"]["fold"], "space": r["spaces"][0]}
                if all(entry["sha256"] != other["sha256"] for other in found.get(method, [])):
                    found.setdefault(method, []).append(entry)
    for method, rows in found.items():
        ways = {way_of(row): row["folder"] for row in rows}
        if len(ways) > 1:
            raise UserError(f"{method} is sampled in {len(ways)} ways: " + " and ".join(
                f"{way} ({folder})" for way, folder in ways.items()) + "; give results of one of them")
    same_folds({method: [row["fold"] for row in rows] for method, rows in found.items()}, f"results on {name}")
    return found


def way_of(row):
    """How these images were sampled, as text."""
    about = row["about"]
    return f"{about.get('sampler', '?')}, {about.get('steps', '?')} steps, guidance {about.get('cfg_scale', '?')}"


def parameters(method, per_data):
    counts = {row["about"]["parameters"] for rows in per_data.values() for row in rows.get(method, [])
              if "parameters" in row["about"]}
    return Cell(counts.pop() / 1e6 if len(counts) == 1 else paper.PARAMETERS.get(method), digits=1)


def paper_cells(method):
    for scores in paper.TABLE_1.values():
        row = scores.get(method)
        for key in ("kid", "lpips", "gg"):
            yield Cell(*row[key]) if row else "–"


def our_cells(rows):
    kid = [row["kid"][row["space"]] for row in rows]
    lpips = [row["lpips"] for row in rows if row["lpips"]]
    return (over([k["mean"] for k in kid], kid[0]["std"] if kid else None, 1e3),
            over([v["mean"] for v in lpips], lpips[0]["std"] if lpips else None),
            over([row["gg"]["gap"] for row in rows if row["gg"]]))


def notes_1(results, per_data):
    notes = [f"Paper: {paper.SOURCE}, Table 1; KID × 1e-3 on Inception features, GG on DINOv2 features, its own "
             "Fundus and OCT data at 256 pixels."]
    space = results[0]["spaces"][0]
    if space != "inception":
        notes.append(f"Our KID × 1e-3 is measured in the space {space}: its numbers must not be compared with the "
                     "paper's.")
    for name, rows in per_data.items():
        floors = [f"{1e3 * r['kid'][space]['mean']:.1f}" for res in results if res["data"]["name"] == name
                  for r in res["rows"] if r["kind"] == "real"]
        counts = "; ".join(f"{m}: {sum(r['images'] for r in rows[m])} images ({way_of(rows[m][0])}), folds "
                           f"{_list(r['fold'] for r in rows[m])}, sampling seeds "
                           f"{_list(str(r['about'].get('seed', '?')) for r in rows[m])}"
                           for m in in_order(rows, paper.PARAMETERS))
        notes.append(f"{name}, {results[0]['image_size']} pixels: {counts}. Noise floor, real against real: KID "
                     f"{', '.join(dict.fromkeys(floors))}.")
    notes.append("Several runs: mean ± standard deviation over them. One run: KID ± deviation over its "
                 f"{results[0]['subsets']} subsets, LPIPS ± deviation over pairs.")
    return notes


# ---- Table 2

def table_2(results, level="auto", threshold="0.5"):
    """Classification with and without synthetic images: scores of the test set, ours beside the paper's."""
    check_together(results)
    level, threshold = level_of(results, level), threshold if threshold == "validation" else "0.5"
    missing = next((r for r in results if threshold not in r["summary"][level]), None)
    if missing:
        raise UserError(f"--threshold {threshold}: {missing['path']} has none at {level} level; give 0.5")
    methods = {}
    for r in results:
        methods.setdefault(ROWS.get(r["method"], r["method"]), []).append(r)
    p_values, body = adjusted(methods, level), []
    for name in in_order({*methods, *paper.TABLE_2}, paper.TABLE_2):
        theirs, row = paper.TABLE_2.get(name), [name]
        for i, score in enumerate(COLUMNS):
            values = [fold["levels"][level][threshold]["macro"][score] for r in methods.get(name, ())
                      for fold in r["folds"].values()]
            ours = over(values, scale=100)
            row += [Cell(*theirs[i]) if theirs else "–", "undefined" if values and ours.mean is None else ours]
        body.append([*row, theirs[-1] if theirs else "–", p_text(name, methods, p_values)])
    for column in range(1, 1 + 2 * len(COLUMNS)):
        body = mark_best(body, column, max)
    heads = ["Training images", *(f"{head}{where}" for name in COLUMNS.values()
                                  for head, where in ((name, " ↑, paper"), (name, " ↑, ours"))), "p, paper", "p, ours"]
    return Table("Table 2. Classification with synthetic images", heads, body,
                 notes_2(results, methods, level, threshold, p_values))


def check_together(results):
    """Raise UserError unless these results of classify.py can stand in one table."""
    agree(results, "test.csv", lambda r: r["test_sha256"][:12])
    agree(results, "the label names", lambda r: " ".join(r["label_names"]))
    agree(results, "the folds", lambda r: " ".join(r["folds"]))
    for key in ("train", "val"):
        same_per_fold([(r["path"], k, fold["sha256"][key]) for r in results for k, fold in r["folds"].items()],
                      f"the images of {key}.csv")
    for key in SAME_TRAINING:
        agree(results, f"--{key.replace('_', '-')}", lambda r, key=key: r["settings"].get(key))
    agree([r for r in results if ROWS.get(r["method"]) != paper.WITHOUT], "--augment",
          lambda r: r["settings"].get("augment"))
    agree([r for r in results if r["significance"]], "the --baseline of p", lambda r: r["significance"]["baseline"])
    same_precision = {(r["path"], fold.get("mixed_precision")) for r in results for fold in r["folds"].values()}
    agree([{"path": path, "precision": p} for path, p in sorted(same_precision, key=str)], "--mixed-precision",
          lambda r: r["precision"])
    for r in results:
        plain = {paper.BASELINE: "geometric", paper.WITHOUT: "none"}.get(ROWS.get(r["method"]))
        synthetic = any(fold["n_synthetic"] for fold in r["folds"].values())
        if plain and (synthetic or r["settings"].get("augment", plain) != plain):
            raise UserError(f"{r['path']}: is called {r['method']}, but was trained with "
                            f"{'synthetic images' if synthetic else '--augment ' + r['settings']['augment']}; score it "
                            "again under another --method")
    known = {}
    for r in results:
        key = r["method"], r["settings"].get("global_seed")
        if key in known:
            raise UserError(f"{r['path']}: is {key[0]} with seed {key[1]}, and so is {known[key]}; give "
                            "one of them, or score one again under another --method")
        known[key] = r["path"]


def level_of(results, level):
    """Raise UserError where eyes are asked for and unknown; auto: eyes where they are known in all results."""
    without = next((r for r in results if r["summary"]["eye"] is None), None)
    if level == "eye" and without:
        raise UserError(f"--level eye: {without['path']} has none, nothing says which images show the same eye; give "
                        "--level image")
    return level if level != "auto" else "image" if without else "eye"


def adjusted(methods, level):
    """Row -> p of the permutation test on mAP after Holm's correction; of several seeds the largest counts."""
    found = {}
    for name, results in methods.items():
        tests = [r["significance"]["levels"].get(level) for r in results if r["significance"]]
        if tests and len(tests) == len(results) and all(tests):
            found[name] = max(t["permutation"]["ap"]["p"] for t in tests)
    return dict(zip(found, holm([*found.values()]), strict=True)) if found else {}


def p_text(name, methods, p_values):
    if name in p_values:
        return f"{p_values[name]:.4f} {stars(p_values[name])}".strip()
    return "–" if name == paper.BASELINE and name in methods else NOT_RUN


def notes_2(results, methods, level, threshold, p_values):
    first, folds = results[0], [fold for r in results for fold in r["folds"].values()]
    s, macro = first["settings"], folds[0]["levels"][level][threshold]["macro"]
    weights = "published weights" if s.get("pretrained") else "random weights"
    limit = THRESHOLD if threshold == "0.5" else "chosen for each label on the validation images"
    notes = [f"Paper: {paper.SOURCE}, Table 2; its own OCT data, 11 labels, ResNet-50; which test its stars are of "
             "is not said. Per cent, mean ± standard deviation over folds, its and ours.",
             f"Ours: {first['data']}, {level} level, threshold {limit}; folds {' '.join(first['folds'])}; seeds "
             f"{_list(r['settings'].get('global_seed') for r in results)}; means over the {macro['labels']} of "
             f"{len(first['label_names'])} labels that some test images have and some have not. "
             f"{s.get('backbone')} from {weights}, {s.get('image_size')} pixels.",
             "Images: " + "; ".join(f"{name}: " + ", ".join(
                 f"{_span(f[key] for r in methods[name] for f in r['folds'].values())} {word}" for key, word in (
                     ("n_train", "real"), ("n_synthetic", "synthetic"), ("steps", "updates")))
                 for name in in_order(methods, paper.TABLE_2))
             + f"; {_span(f['n_val'] for f in folds)} for validation, {_span(f['n_test'] for f in folds)} for the "
             "test."]
    if p_values:
        test = next(r["significance"] for r in results if r["significance"])
        notes.append(
            f"p: two-sided permutation test on mAP against {test['baseline']}, predictions of whole {test['unit']}s "
            f"({test['levels'][level]['units']}) swapped {test['levels'][level]['permutations']} times, after Holm's "
            f"correction for {len(p_values)} comparison(s); of several seeds the largest. * p < .05, ** p < .01, "
            "*** p < .001, **** p < .0001; no p "
            f"can be below {len(p_values) / (1 + test['levels'][level]['permutations']):.1g}.")
    return notes + list(dict.fromkeys(remark for fold in folds for remark in fold["remarks"]))


def _span(values):
    """The numbers 60, 62, 61 -> "60–62"."""
    values = sorted(set(values))
    return str(values[0]) if len(values) == 1 else f"{values[0]}–{values[-1]}"


def parser():
    p = Parser(__doc__)
    p.add_argument("results", type=Path, nargs="+", metavar="RESULTS", help="results.json files, or folders with them")
    p.add_argument("--output", type=Path, default=Path("tables"), metavar="DIR", help="where the tables go")
    g = p.add_argument_group("Table 2")
    g.add_argument("--level", choices=("auto", "image", "eye"), default="auto",
                   help="what is scored; auto: eyes, where all results know them, else images")
    g.add_argument("--threshold", choices=("0.5", "validation"), default="0.5", help="above which a label is there: as "
                   "in the paper, or chosen on the validation images")
    return p


if __name__ == "__main__":
    run(main)
