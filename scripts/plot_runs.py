"""Plot the training loss and the validation KID of one or more runs against the step.

    python scripts/plot_runs.py results/000-GeCA-XS-0 --output curves.png
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib

matplotlib.use("Agg")  # no screen needed

from matplotlib import pyplot as plt

from core.cli import Parser, run
from core.errors import UserError
from core.files import read_jsonl


def read(folder):
    """Name of each logged value -> its (step, value) pairs."""
    file = Path(folder) / "metrics.jsonl"
    if not file.is_file():
        raise UserError(f"{folder}: no metrics.jsonl; give a run folder of train.py")
    curves = {}
    for record in read_jsonl(file, "remove the run"):
        for name in record.keys() - {"step"}:
            curves.setdefault(name, []).append((record["step"], record[name]))
    return curves


def main():
    p = Parser(__doc__)
    p.add_argument("runs", nargs="+", metavar="RUN", help="run folders of train.py")
    p.add_argument("--output", required=True, metavar="FILE", help="picture to write")
    args = p.parse_args()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
    for folder in args.runs:
        curves, name = read(folder), Path(folder).name
        for axes, key in ((left, "loss"), (right, "kid")):
            if key in curves:
                axes.plot(*zip(*curves[key], strict=True), marker="." if key == "kid" else None, label=name)
    left.set(xlabel="step", ylabel="training loss", yscale="log")
    right.set(xlabel="step", ylabel="validation KID (EMA weights)", yscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(args.output, dpi=100)


if __name__ == "__main__":
    run(main)
