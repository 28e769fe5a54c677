"""Plot what train.py has logged of one or more runs: a panel for each kind of value, against the step.

    python scripts/plot_runs.py results/000-GeCA-XS-0 --output curves.png
    python scripts/plot_runs.py results/* --output curves.png --smooth 20

Pale lines are the values as they were logged, each the mean since the one before it; strong lines are smoothed. KID is
that of averaged weights and, dashed, of raw ones; the grey band is the noise floor, what as many real images score
(mean ± standard deviation). The loss by diffusion step is that of the first run. Values that a run did not log are
left out, and so are panels without any.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.cli import Parser, integer, run
from core.errors import UserError
from core.files import make_folder
from evaluation.curves import plot, read


def main():
    p = Parser(__doc__)
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders of train.py")
    p.add_argument("--output", type=Path, required=True, metavar="FILE", help="picture to write")
    p.add_argument("--smooth", type=integer(1), default=10, metavar="N",
                   help="log lines over which a curve is smoothed; 1: as it is")
    args = p.parse_args()
    names = [str(folder) if len({run.name for run in args.runs}) < len(args.runs) else folder.name
             for folder in args.runs]
    runs = dict(zip(names, map(read, args.runs), strict=True))
    if not any(runs.values()):
        raise UserError(f"{args.runs[0]}: nothing has been logged yet; wait for --log-every steps")
    make_folder(args.output.parent, "--output")
    plot(runs, args.smooth).savefig(args.output, dpi=100)


if __name__ == "__main__":
    run(main)
