"""Many images: rate and peak memory of preparing, checking, extracting, training and sampling, beside those of few.

    python benchmarks/scale.py --count 100000 --output /tmp/scale

Draws a few phantoms, links each of them many times under other names, and runs the scripts on FEW of them and on all.
Sampling is stopped after its first images; all but the last of those it lacks are put there as links, and the same
command goes on. Prints a Markdown table; the folder may be removed afterwards. Scores of many images: scores.py.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core.cli import Parser, integer, run  # noqa: E402
from core.errors import UserError  # noqa: E402
from core.files import make_folder, read_jsonl  # noqa: E402
from dataset.sources import phantom  # noqa: E402

DRAWN, SIDE, FEW = 200, 64, 1000
TRAINED = 30  # seconds of training after the first step
LEFT = 32  # images that a continued sampling still has to make
CHECKPOINT = "assets/geca-xs-phantom/geca-xs-phantom.pt"


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
    process = started(command)
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode and "--check" not in command:
        raise UserError(f"{command[0]}: failed: {errors.strip().splitlines()[-1]}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def started(command):
    """A script as a process of its own."""
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True)


def wait_for(pattern, folder, process):
    """Seconds until a file of this pattern has something in it. Raises UserError where the process ends before."""
    start = time.perf_counter()
    while not any(file.stat().st_size for file in folder.glob(pattern)):
        if process.poll() is not None:
            raise UserError(f"ended early: {process.stderr.read().strip().splitlines()[-1]}")
        time.sleep(0.05)
    return time.perf_counter() - start


def prepared(folder, count):
    """Prepare, check and extract `count` images; -> rows of the table, name -> (seconds, MiB)."""
    images, root, store = (folder / name for name in ("images", "root", "store"))
    link_many(images, count)
    extract = ("extract_features.py", "--preset", "small-geca-xs", "--data-path", root, "--features-path", store)
    return {"`prepare_data.py`": measured("prepare_data.py", "--source", "folder", "--input", images,
                                          "--patient-pattern", r"^p(\d+)_", "--no-join-identical", "--output", root),
            "`prepare_data.py --check`": measured("prepare_data.py", "--check", root),
            "`extract_features.py`": measured(*extract),
            "`extract_features.py`, complete already": measured(*extract)}


def trained(folder):
    """Train for TRAINED seconds; -> seconds to the first step, steps/s after it, peak memory in MiB."""
    process = started(("train.py", "--preset", "small-geca-xs", "--data-path", folder / "root", "--feature-path",
                       folder / "store", "--log-every", 1, "--val-samples", 2, "--num-sampling-steps", 2,
                       "--results-dir", folder / "results"))
    first = wait_for("results/*/metrics.jsonl", folder, process)
    time.sleep(TRAINED)
    process.send_signal(signal.SIGTERM)
    process.stderr.read()
    usage = os.wait4(process.pid, 0)[2]
    lines = read_jsonl(next(folder.glob("results/*/metrics.jsonl")), "measure again", {})
    rates = sorted(row["steps_per_second"] for row in lines if "steps_per_second" in row)
    return first, rates[len(rates) // 2], usage.ru_maxrss / 1024


def sampled(folder, count):
    """Stop a sampling of `count` images at its start, link what it lacks up to LEFT, go on; -> (seconds, MiB)."""
    command = ("sample_ddp.py", "--ckpt", CHECKPOINT, "--labels", "DR", "--count", count, "--sampler", "ddim",
               "--num-sampling-steps", 2, "--per-proc-batch-size", LEFT, "--sample-dir", folder / "samples")
    process = started(command)
    wait_for("samples/*/asked/000000.png", folder, process)
    process.send_signal(signal.SIGTERM)
    process.wait()
    asked = next(folder.glob("samples/*/asked"))
    for number in range(count - LEFT):
        if not (target := asked / f"{number:06d}.png").exists():
            os.link(asked / "000000.png", target)
    return measured(*command), measured(*command)


def measure(folder, count):
    """All rows for `count` images: name -> text."""
    folder.mkdir()
    rows = {name: f"{seconds:.0f} s, {count / seconds:,.0f} images/s, {memory:,.0f} MiB"
            for name, (seconds, memory) in prepared(folder, count).items()}
    first, rate, memory = trained(folder)
    rows["`train.py`"] = f"first step after {first:.0f} s, {rate:.2f} steps/s, {memory:,.0f} MiB"
    going_on, again = sampled(folder, count)
    rows[f"`sample_ddp.py`, {LEFT} images missing"] = f"{going_on[0]:.0f} s, {going_on[1]:,.0f} MiB"
    rows["`sample_ddp.py`, complete already"] = f"{again[0]:.0f} s, {again[1]:,.0f} MiB"
    return rows


def main():
    p = Parser(__doc__)
    p.add_argument("--count", type=integer(FEW), default=100_000, help="images")
    p.add_argument("--output", type=Path, required=True, metavar="DIR", help="an empty folder for all of it")
    args = p.parse_args()
    if args.output.exists():
        raise UserError(f"--output {args.output}: already exists; remove it or choose another")
    make_folder(args.output, "--output")
    few, many = (measure(args.output.resolve() / str(count), count) for count in (FEW, args.count))
    print(f"| images of {SIDE} × {SIDE} pixels | {FEW:,} | {args.count:,} |\n|---|---|---|")
    for name in few:
        print(f"| {name} | {few[name]} | {many[name]} |")


if __name__ == "__main__":
    run(main)
