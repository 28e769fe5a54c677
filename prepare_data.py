"""Make a data root: images, and CSV files that say which of them train, validate and test in each fold.

    python prepare_data.py --source phantom --output data/phantom
    python prepare_data.py --source topcon-mm --input FOLDER --modality oct --output data/oct
    python prepare_data.py --source csv --input IMAGES --csv LABELS.csv --output data/mine
    python prepare_data.py --source folder --input FOLDER --output data/mine         one folder per class
    python prepare_data.py --check data/mine                                         what is wrong with a data root

`phantom` draws artificial OCT scans and needs no download; docs/DATA.md says where the others come from and what is
done about their faults. Writes ROOT/images/, ROOT/test.csv, for each fold k ROOT/train_{k}.csv and val_{k}.csv, and
report.json, report.txt, report.png. A split that the authors made is kept, else patients are dealt out; all or nothing:
ROOT appears when it is complete.
"""

import sys
from argparse import BooleanOptionalAction
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np

from core import runtime
from core.claims import built_whole
from core.cli import Parser, integer, number, run
from core.errors import UserError
from core.progress import progress_bar
from dataset import audit, outside, report
from dataset.patients import conflicts, join_identical
from dataset.root import write_split
from dataset.splits import deal, keep_published
from dataset.store import StoreOptions, store

REQUIRED = None


@dataclass(frozen=True)
class Source:
    """Where images come from. To add one: a module in dataset/sources/ that returns a Collection, a row in SOURCES."""

    module: str
    function: str = "read"
    flags: dict | None = None  # its own flags -> their defaults, REQUIRED if there is none; passed by name
    about: str = ""

    def read(self, args):
        """The Collection that the flags name."""
        function = getattr(import_module(f"dataset.sources.{self.module}"), self.function)
        given = {flag: getattr(args, flag) for flag in self.flags}
        if "input" in given:
            return function(Path(given.pop("input")), **given)
        return function(seed=args.global_seed, **given)


FOLDER = {"input": REQUIRED}
COLUMNS = ("image_column", "label_columns", "patient_column", "eye_column", "split_column", "extension")
SOURCES = {
    "phantom": Source("phantom", flags={"count": 2000, "image_size": 256}),
    "topcon-mm": Source("topcon_mm", flags={**FOLDER, "modality": REQUIRED}),
    "retinamnist": Source("medmnist", "read_retinamnist", FOLDER),
    "octmnist": Source("medmnist", "read_octmnist", FOLDER),
    "octdl": Source("octdl", flags=FOLDER),
    "oct2017": Source("oct2017", flags=FOLDER),
    "odir5k": Source("odir5k", flags={**FOLDER, "label_level": "eye"}),
    "rfmid": Source("rfmid", flags=FOLDER),
    "aptos2019": Source("aptos2019", flags=FOLDER),
    "idrid": Source("idrid", flags=FOLDER),
    "messidor2": Source("messidor2", flags=FOLDER),
    "dr-rahim": Source("dr_rahim", flags=FOLDER),
    "oct-and-eye-fundus": Source("oct_and_eye_fundus", flags={**FOLDER, "modality": REQUIRED}),
    "geca": Source("geca", flags=FOLDER),
    "csv": Source("csv_table", flags={**FOLDER, "csv": REQUIRED, **dict.fromkeys(COLUMNS, "")}),
    "folder": Source("folder", flags={**FOLDER, "patient_pattern": ""}),
}


def main():
    args = parse_args()
    runtime.alone("prepare_data.py")
    if args.check:
        check(args.check, args.workers)
    else:
        prepare(args)


def prepare(args):
    """Read the source, store its images, split them, report."""
    collection = SOURCES[args.source].read(args)
    options = StoreOptions(args.store == "copy", args.resize, args.median, args.clahe, args.workers)
    with built_whole(args.output, settings_of(args)) as root:
        stored = store(collection, root, options, lambda images: bar(images, args.source, collection.count))
        stored, remarks = settle_conflicts(stored, args.on_conflict, root)
        groups, joined = groups_of(stored, args.join_identical)
        splits, more = split(stored, groups, args)
        for name, chosen in splits.items():
            part = stored.take(chosen)
            write_split(root, name, part.filenames, part.labels, collection.labels, part.patients, part.eyes)
        facts = report.facts(stored, splits, collection)
        facts["remarks"] += [*remarks, *joined, *more]
        facts["command"] = {key: value for key, value in sorted(vars(args).items()) if value not in (None, "")}
        report.write(facts, root)
    print((Path(args.output) / "report.txt").read_text(encoding="utf-8"), end="")
    print(f"\n{args.output}: {len(stored)} images ({facts['linked']} linked), splits {' '.join(splits)}; "
          "report.txt, report.json, report.png")


def settings_of(args):
    """What the images of an unfinished root depend on, for the same command to go on with them."""
    ways = ("output", "workers", "check", "folds", "test_fraction", "resplit", "on_conflict", "join_identical")
    return {key: value if isinstance(value, (int, float, str, list)) else str(value)
            for key, value in sorted(vars(args).items()) if key not in ways}


def bar(images, title, count):
    return progress_bar(images, total=count, unit="images", title=title)


def settle_conflicts(stored, choice, root):
    """One picture with different labels: refuse, keep all, or drop all -> Stored, remarks. Raises UserError."""
    groups = conflicts(stored.digests, stored.labels)
    if not groups or choice == "keep":
        return stored, []
    named = " = ".join(stored.filenames[groups[0]])
    if choice is None:
        raise UserError(f"{len(groups)} picture(s) occur with different labels, the first is {named}; give "
                        "--on-conflict drop to leave all of them out, or keep")
    dropped = [i for group in groups for i in group]
    for i in dropped:
        (root / stored.filenames[i]).unlink()
    kept = np.setdiff1d(np.arange(len(stored)), dropped)
    return stored.take(kept), [f"--on-conflict drop: {len(dropped)} images of {len(groups)} pictures with different "
                               f"labels are left out: {', '.join(stored.filenames[dropped])}"]


def groups_of(stored, join):
    """Who must stay together (n,): patients, or images whose patient is unknown, with those that share a picture."""
    patients = np.where(stored.patients == "", stored.filenames, stored.patients)
    groups = join_identical(patients, stored.digests) if join else patients
    joined = len(set(patients)) - len(set(groups))
    return groups, [f"{joined} patients share a picture with another and stay on its side"] * bool(joined)


def split(stored, groups, args):
    """{name: (n,) bool}, remarks. The authors' split if they made one, else our own."""
    theirs, remarks = {*stored.splits} - {""}, []
    if theirs and not args.resplit and "train" in theirs and "" not in stored.splits:
        if "test" not in theirs:
            remarks.append("the authors keep no test set: there is no test.csv")
        splits = keep_published(stored.labels, groups, stored.splits, args.folds, args.global_seed)
        return {name: chosen for name, chosen in splits.items() if chosen.any()}, remarks
    if theirs and not args.resplit:
        remarks.append(f"the authors' split is here in part only ({' '.join(sorted(theirs))}): dealt anew")
    return deal(stored.labels, groups, args.folds, args.test_fraction, args.global_seed), remarks


def check(root, workers):
    """--check: print what is wrong with a data root; exit with 1 if anything is."""
    faults = list(audit.audit(Path(root), workers, lambda images, count: bar(images, "check", count)))
    for fault in faults:
        print(f"- {fault}")
    print(f"{root}: {len(faults)} fault(s)" if faults else f"{root}: no fault found")
    sys.exit(1 if faults else 0)


def parser():
    p = Parser(__doc__)
    p.add_argument("--source", choices=SOURCES, help="where the images come from")
    p.add_argument("--output", metavar="ROOT", help="the data root to make")
    p.add_argument("--check", metavar="ROOT", help="instead of making one: look for what is wrong with a data root")
    outside.add_flag(p)
    g = p.add_argument_group("of single sources")
    g.add_argument("--input", metavar="DIR", help="folder (or .npz) of the collection; all but phantom")
    g.add_argument("--modality", choices=("oct", "fundus"), help="topcon-mm, oct-and-eye-fundus: the images")
    g.add_argument("--label-level", choices=("eye", "patient"), help="odir5k: whose labels (default: eye)")
    g.add_argument("--count", type=integer(1), help="phantom: number of images (default: 2000)")
    g.add_argument("--image-size", type=integer(16, 2048), help="phantom: size in pixels (default: 256)")
    g.add_argument("--csv", metavar="FILE", help="csv: the table; what the columns below are is guessed and said")
    g.add_argument("--image-column", metavar="NAME", help="csv: names of the image files, relative to --input")
    g.add_argument("--label-columns", nargs="+", metavar="NAME", help="csv: columns of 0 and 1, or one of categories")
    g.add_argument("--patient-column", metavar="NAME", help="csv: who it is")
    g.add_argument("--eye-column", metavar="NAME", help="csv: which eye of the patient")
    g.add_argument("--split-column", metavar="NAME", help="csv: train, val or test")
    g.add_argument("--extension", metavar=".EXT", help="csv: suffix of the files where the table leaves it out")
    g.add_argument("--patient-pattern", metavar="REGEX", help="folder: the patient in a file name, as group 1")
    g = p.add_argument_group("images")
    g.add_argument("--store", choices=("link", "copy"), default="link",
                   help="link image files where the file system allows it (hard links), or copy them")
    g.add_argument("--resize", type=integer(8, 2048), metavar="PIXELS",
                   help="store the crop to this size that training would make each time, as PNG")
    g.add_argument("--median", action="store_true", help="3x3 median (OCT)")
    g.add_argument("--clahe", action="store_true", help="equalise the lightness locally (fundus; scikit-image)")
    g.add_argument("--workers", type=integer(1, 256), default=4, help="threads that read images")
    g = p.add_argument_group("splits")
    g.add_argument("--folds", type=integer(2), help="folds for cross-validation (default: 5, or the one that the "
                   "authors made)")
    g.add_argument("--test-fraction", type=number(0.01, 0.9), default=0.2, help="share of the test set")
    g.add_argument("--resplit", action="store_true", help="make new splits by patient though the authors made some")
    g.add_argument("--on-conflict", choices=("keep", "drop"), help="pictures that occur with different labels "
                   "(default: refuse)")
    g.add_argument("--join-identical", action=BooleanOptionalAction, default=True,
                   help="keep patients who share an identical picture on one side of every split")
    g.add_argument("--global-seed", type=integer(0), default=0, help="seed of split and phantoms")
    return p


def parse_args():
    args = parser().parse_args()
    if args.check:
        return args
    for flag in ("source", "output"):
        if getattr(args, flag) is None:
            raise UserError(f"--{flag}: is missing; give it, or --check ROOT")
    own = SOURCES[args.source].flags
    for flag in {flag: None for source in SOURCES.values() for flag in source.flags}:
        spelled, given = "--" + flag.replace("_", "-"), getattr(args, flag) is not None
        if given and flag not in own:
            owners = ", ".join(name for name, source in SOURCES.items() if flag in source.flags)
            raise UserError(f"{spelled}: belongs to --source {owners}, not to {args.source}; remove it")
        if not given and flag in own:
            if own[flag] is REQUIRED:
                raise UserError(f"--source {args.source}: needs {spelled}")
            setattr(args, flag, own[flag])
    return args


if __name__ == "__main__":
    run(main)
