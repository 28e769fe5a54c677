"""Many images: rate and peak memory of preparing, checking and extracting them, and of the start of a training.

    python benchmarks/scale.py --count 100000 --output /tmp/scale

Draws a few phantoms, links each of them many times under other names, and runs the scripts on all of them. Prints a
Markdown table; the folder may be removed afterwards.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core.cli import Parser, integer, run  # noqa: E402
from core.errors import UserError  # noqa: E402
from core.files import make_folder  # noqa: E402
from dataset.sources import phantom  # noqa: E402

DRAWN, SIDE, STEPS = 200, 64, 20


def link_many(folder, count):
    """`count` links to DRAWN phantoms, in two classes, ten images for each patient."""
    sources = []
    for record in phantom.read(DRAWN, SIDE).records:
        sources.append(folder.parent / "drawn" / f"{record.name}.png")
        sources[-1].parent.mkdir(parents=True, exist_ok=True)
        record.draw().save(sources[-1])
    for i in range(count):
        target = folder / f"class-{i % DRAWN % 2}" / f"p{i // 10:07d}_{i:07d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(sources[i % DRAWN], target)


def measured(*command):
    """Run a script -> (seconds, peak memory of its process in MiB). Raises UserError where it fails."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode and "--check" not in command:
        raise UserError(f"{command[0]}: failed: {errors.strip().splitlines()[-1]}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def main():
    p = Parser(__doc__)
    p.add_argument("--count", type=integer(1000), default=100_000, help="images")
    p.add_argument("--output", type=Path, required=True, metavar="DIR", help="an empty folder for all of it")
    args = p.parse_args()
    if args.output.exists():
        raise UserError(f"--output {args.output}: already exists; remove it or choose another")
    make_folder(args.output, "--output")
    images, root, store = (args.output.resolve() / name for name in ("images", "root", "store"))
    link_many(images, args.count)
    training = ("train.py", "--preset", "small-geca-xs", "--data-path", root, "--feature-path", store, "--epochs", 1,
                "--log-every", STEPS, "--max-minutes", 0.5, "--val-samples", 2, "--num-sampling-steps", 2,
                "--results-dir", args.output / "results")
    tasks = {"prepare_data.py": ("prepare_data.py", "--source", "folder", "--input", images, "--patient-pattern",
                                 r"^p(\d+)_", "--no-join-identical", "--output", root),
             "prepare_data.py --check": ("prepare_data.py", "--check", root),
             "extract_features.py": ("extract_features.py", "--preset", "small-geca-xs", "--data-path", root,
                                     "--features-path", store),
             "extract_features.py, again": ("extract_features.py", "--preset", "small-geca-xs", "--data-path", root,
                                            "--features-path", store),
             "train.py, half a minute": training}
    print(f"| {args.count:,} images of {SIDE} × {SIDE} pixels | seconds | images/s | peak memory, MiB |")
    print("|---|---|---|---|")
    for name, command in tasks.items():
        seconds, memory = measured(*command)
        print(f"| `{name}` | {seconds:.0f} | {args.count / seconds:,.0f} | {memory:,.0f} |", flush=True)

if __name__ == "__main__":
    run(main)
