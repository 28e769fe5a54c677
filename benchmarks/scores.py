"""Seconds and peak memory of every score of evaluate.py, for many images: of features that are drawn at random.

    python benchmarks/scores.py --images 50000 --features 768

As many generated as validation and as training images. Prints a Markdown table; peak memory is that of the process
up to the end of the row. Intervals are those that evaluate.py computes at this number of images.
"""

import resource
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core.cli import Parser, integer, run  # noqa: E402
from evaluation.evaluation import CLOSEST  # noqa: E402
from metrics.fid import fid  # noqa: E402
from metrics.fld import fld  # noqa: E402
from metrics.kid import SUBSETS, kid  # noqa: E402
from metrics.memorisation import memorisation  # noqa: E402
from metrics.prdc import prdc  # noqa: E402
from metrics.uncertainty import kid_interval, paired_difference, subsample_interval  # noqa: E402


def drawn(count, dimensions, seed, shift=0.0):
    """Features (count, dimensions), float32: correlated, as those of networks are."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(0).normal(size=(64, dimensions)).astype(np.float32)
    noise = rng.normal(size=(count, dimensions)).astype(np.float32)
    return rng.normal(shift, 1, (count, 64)).astype(np.float32) @ mixing / 8 + noise / 2


def main():
    p = Parser(__doc__)
    p.add_argument("--images", type=integer(8), default=50_000, help="in each set")
    p.add_argument("--features", type=integer(1), default=768, help="numbers of an image")
    args = p.parse_args()
    train, real, made, other = (drawn(args.images, args.features, seed, seed / 50) for seed in range(4))
    tasks = {f"KID over {SUBSETS} subsets of a fourth": lambda: kid(real, made, args.images // 4, SUBSETS, 0),
             "KID and its interval, 1,000 half-samples": lambda: kid_interval(real, made, 1000),
             "paired test": lambda: paired_difference(real, made, other),
             "FID": lambda: fid(real, made),
             "FID's interval, 100 half-samples": lambda: subsample_interval(fid, real, made, draws=100),
             "precision, recall, density, coverage": lambda: prdc(real, made),
             "FLD and GG": lambda: fld(train, real, made),
             "copies, AuthPct": lambda: memorisation(train, real, made, CLOSEST)}
    print(f"| {args.images:,} + {args.images:,} images, {args.features} numbers each | seconds | peak memory, MiB |")
    print("|---|---|---|")
    for name, task in tasks.items():
        start = time.perf_counter()
        task()
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"| {name} | {time.perf_counter() - start:.0f} | {memory:,.0f} |", flush=True)


if __name__ == "__main__":
    run(main)
