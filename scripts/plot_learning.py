"""Table and picture of points.jsonl, which scripts/study_learning.py writes.

    python scripts/plot_learning.py runs/learning/points.jsonl --output docs/images/learning.png --table

The picture: left, KID against the held-out error, a dot per arm, way of sampling and model; right, the held-out error
relative to the best arm of the model in five bins of the diffusion step. --table prints a line per arm in Markdown.
"""

import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib

matplotlib.use("Agg")  # no screen needed

import numpy as np
from matplotlib import pyplot as plt

from core.cli import Parser, run
from core.errors import UserError
from core.files import read_jsonl
from core.text import markdown
from scripts.study_learning import BINS, POINT

COLOURS = {"GeCA-XS": "tab:red", "DiT-S": "tab:blue", "LDM-B": "tab:green"}
MARKERS = {"published": "o", "none": "x"}


def read(file):
    """{(model, steps, arm, training seed): lines of that arm} in the order of the file. Raises UserError."""
    if not file.is_file():
        raise UserError(f"{file}: no such file; scripts/study_learning.py writes it")
    arms = defaultdict(list)
    for row in read_jsonl(file, "remove that line and measure again", POINT):
        if len(row["error_by_t"]) != BINS:
            raise UserError(f"{file}: {row['arm']} has {len(row['error_by_t'])} bins of t, expected {BINS}; remove its "
                            "lines and measure again")
        arms[row["model"], row["steps"], row["arm"], row["seed"]].append(row)
    return arms


def kids(rows, way):
    """KID × 1e-3 of each sampling seed."""
    return [row["kid"] for row in rows if row["way"] == way]


def table(arms):
    """Markdown: a line per arm and training seed."""
    ways = list(dict.fromkeys(row["way"] for rows in arms.values() for row in rows))
    yield "| model | steps | training | seed | " + " | ".join(markdown(f"KID, {way}") for way in ways) + \
        " | held-out error × 1e-4 | … in five bins of t | s/step |"
    yield "|---" * (len(ways) + 7) + "|"
    for (model, steps, arm, seed), rows in sorted(arms.items(), key=order):
        scores = [", ".join(f"{kid:.0f}" for kid in kids(rows, way)) for way in ways]
        bins = ", ".join(f"{1e4 * value:.0f}" for value in rows[0]["error_by_t"])
        cells = [model, f"{steps:,}", arm.removeprefix(model).strip(), seed, *scores, f"{1e4 * rows[0]['error']:.0f}",
                 bins, f"{rows[0]['seconds_per_step']:.2f}"]
        yield "| " + " | ".join(map(markdown, cells)) + " |"


def order(item):
    (model, steps, arm, seed), _ = item
    return [*COLOURS, model].index(model), steps, arm, seed


def plot(arms, file):
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    drawn = set()
    for (model, steps, _, _), rows in arms.items():
        for way, marker in MARKERS.items():
            if values := kids(rows, way):
                label = None if (model, way) in drawn else f"{model}, {way}" if model.startswith("GeCA") else model
                drawn.add((model, way))
                left.scatter([rows[0]["error"]] * len(values), values, marker=marker, color=COLOURS.get(model),
                             s=12 + steps / 100, alpha=0.7, label=label)
    left.set(xscale="log", yscale="log", xlabel="held-out error of ε", ylabel="KID[retina] × 1e-3")
    for model, colour in COLOURS.items():
        own = [rows[0] for (name, *_), rows in arms.items() if name == model]
        if not own:
            continue
        best = np.array(min(own, key=lambda row: row["error"])["error_by_t"])
        for i, row in enumerate(own):
            right.plot(np.array(row["error_by_t"]) / best, color=colour, alpha=0.5, label=model if i == 0 else None)
    right.set(xticks=range(5), xticklabels=["0–199", "–399", "–599", "–799", "–999"], yscale="log",
              xlabel="diffusion step t", ylabel="error / error of the model's best arm")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(file, dpi=100)


def main():
    p = Parser(__doc__)
    p.add_argument("points", type=Path, metavar="POINTS", help="points.jsonl of scripts/study_learning.py")
    p.add_argument("--output", type=Path, required=True, metavar="FILE", help="picture to write")
    p.add_argument("--table", action="store_true", help="print the table")
    args = p.parse_args()
    arms = read(args.points)
    plot(arms, args.output)
    if args.table:
        print("\n".join(table(arms)))


if __name__ == "__main__":
    run(main)
