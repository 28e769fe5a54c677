"""Have two runs of a table ended with the same files? Exit code 1 and a line for each difference if not.

    python scripts/slurm/same_files.py ONE OTHER

Names and bytes are compared; of checkpoints, which hold the minutes of training, every tensor and number of theirs but
these, bit by bit; of logs, which hold times and what was continued, the name alone.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from core.cli import Parser, run

LOGS = ("log.txt", "metrics.jsonl", "*.lock")
TIMES = {"minutes"}  # of a checkpoint


def files(root):
    """Path below the root -> file. TensorBoard has a log, named by its time, for each time that a run was started."""
    return {str(path.relative_to(root)): path for path in Path(root).rglob("*")
            if path.is_file() and not path.match("events.out.tfevents.*")}


def same(one, other):
    if any(one.match(pattern) for pattern in LOGS):
        return True
    if one.suffix == ".pt":
        return equal(*(torch.load(path, weights_only=True) for path in (one, other)))
    return one.read_bytes() == other.read_bytes()


def equal(one, other):
    """Are two values of a checkpoint the same, but for times?"""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one.keys() - TIMES)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def differences(one, other):
    """A line for each file of two folders that only one has, or that is not the same."""
    first, second = files(one), files(other)
    both = sorted(first.keys() & second.keys())
    return [f"only in {one if name in first else other}: {name}" for name in sorted(first.keys() ^ second.keys())] + [
        f"differs: {name}" for name in both if not same(first[name], second[name])]


def main():
    p = Parser(__doc__)
    p.add_argument("one", type=Path, help="output folder of a table")
    p.add_argument("other", type=Path, help="another one")
    args = p.parse_args()
    found = differences(args.one, args.other)
    print("\n".join(found) or f"all {len(files(args.one))} files are the same")
    sys.exit(bool(found))


if __name__ == "__main__":
    run(main)
