"""Make a data root: images, and CSV files that say which of them train, validate and test in each fold.

    python prepare_data.py --source phantom --output data/phantom
    python prepare_data.py --source oct-and-eye-fundus --modality oct --input FOLDER --output data/oct
    python prepare_data.py --source oct-and-eye-fundus --modality fundus --input FOLDER --output data/fundus

`phantom` draws artificial OCT scans and needs no download; docs/DATA.md says where the others come from.
Writes ROOT/images/, ROOT/test.csv and, for each fold k, ROOT/train_{k}.csv and val_{k}.csv, split by patient.
All or nothing: ROOT appears when it is complete.
"""

import hashlib
import shutil
from argparse import BooleanOptionalAction
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

from core import runtime
from core.cli import Parser, integer, number, run
from core.errors import UserError
from core.files import built_whole
from core.text import aligned
from dataset.images import load_image
from dataset.root import write_split
from dataset.splits import TEST, split_by_patient


@dataclass(frozen=True)
class Source:
    """Where images come from. To add one: a module in dataset/sources/, a function here, a row in SOURCES."""

    flags: dict  # the flags of this source -> their defaults, REQUIRED if there is none
    open: Callable  # parsed flags -> label names, n, iterator of n times (patient, filename, labels, image);
    # `image` is a PIL image, or the path of a file to copy as it is


def open_phantom(args):
    from dataset.sources import phantom

    return phantom.LABELS, args.count, phantom.draw_patients(args.count, args.global_seed, args.image_size)


def open_oct_and_eye_fundus(args):
    from dataset.sources import oct_and_eye_fundus

    records = oct_and_eye_fundus.read(args.input, args.modality)
    return oct_and_eye_fundus.LABELS, len(records), iter(records)


REQUIRED = None
SOURCES = {
    "phantom": Source({"count": 2000, "image_size": 256}, open_phantom),
    "oct-and-eye-fundus": Source({"input": REQUIRED, "modality": REQUIRED}, open_oct_and_eye_fundus),
}


def main():
    args = parse_args()
    runtime.alone("prepare_data.py")
    with built_whole(args.output) as root:
        label_names, count, records = SOURCES[args.source].open(args)
        records = tqdm(records, args.source, count, unit="image", disable=None)
        filenames, labels, patients, digests = store(records, root)
        groups = join_identical(patients, digests) if args.join_identical else patients
        fold = split_by_patient(labels, groups, args.folds, args.test_fraction, args.global_seed)
        splits = {"test": fold == TEST}
        for k in range(args.folds):
            splits |= {f"train_{k}": (fold != TEST) & (fold != k), f"val_{k}": fold == k}
        for name, chosen in splits.items():
            write_split(root, name, filenames[chosen], labels[chosen], label_names, patients[chosen])
    print(table(labels, patients, label_names, splits | {"total": np.ones(len(fold), bool)}))
    joined = len(set(patients)) - len(set(groups))
    remark = f"; {joined} of them share an image with another and stay on its side" if joined else ""
    print(f"\n{args.output}: {len(fold)} images of {len(set(patients))} patients{remark}, {args.folds} folds")


def store(records, root):
    """Write every image below `root` -> filenames (n,), labels (n, K), patients (n,), hashes of the pixels (n,)."""
    columns = []
    for patient, filename, labels, image in records:
        (root / filename).parent.mkdir(exist_ok=True)
        if isinstance(image, Path):
            pixels = load_image(image)  # a damaged file is reported here, not in the middle of a training run
            shutil.copyfile(image, root / filename)
        else:
            pixels = np.asarray(image)
            image.save(root / filename)
        columns.append((filename, labels, patient, hashlib.sha256(pixels.tobytes()).hexdigest()))
    if not columns:
        raise UserError("found no image in this source; check --input")
    return tuple(np.array(column) for column in zip(*columns, strict=True))


def join_identical(patients, digests):
    """Patients and hashes of pixels (n,) -> (n,): one name, their first, for all patients that share a picture.

    Public collections hold the same picture under several patients; one of them in the training set and another in the
    test set would be a leak.
    """
    names, patient = np.unique(patients, return_inverse=True)
    _, picture = np.unique(digests, return_inverse=True)
    both = coo_matrix((np.ones(len(patient)), (patient, picture + patient.max() + 1)),
                      shape=(patient.max() + picture.max() + 2,) * 2)
    together = connected_components(both, directed=False)[1][:len(names)]
    return names[np.unique(together, return_index=True)[1][together]][patient]


def table(labels, patients, label_names, splits):
    """Images per label (rows) and split (columns), as text."""
    rows = [["", *splits]]
    for k, name in enumerate(label_names):
        rows.append([name, *(int(labels[chosen, k].sum()) for chosen in splits.values())])
    rows.append(["no label", *(int((labels[chosen].sum(axis=1) == 0).sum()) for chosen in splits.values())])
    rows.append(["images", *(int(chosen.sum()) for chosen in splits.values())])
    rows.append(["patients", *(len(set(patients[chosen])) for chosen in splits.values())])
    return aligned(rows, left=0)


def parser():
    p = Parser(__doc__)
    p.add_argument("--source", required=True, choices=SOURCES, help="where the images come from")
    p.add_argument("--output", required=True, metavar="ROOT", help="the data root to make")
    p.add_argument("--input", metavar="DIR", help="oct-and-eye-fundus: the folder with its CSV files")
    p.add_argument("--modality", choices=("oct", "fundus"), help="oct-and-eye-fundus: the images")
    p.add_argument("--count", type=integer(1), help="phantom: number of images (default: 2000)")
    p.add_argument("--image-size", type=integer(16, 2048), help="phantom: size in pixels (default: 256)")
    p.add_argument("--folds", type=integer(2), default=5, help="folds for cross-validation")
    p.add_argument("--test-fraction", type=number(0.01, 0.9), default=0.2, help="share of the test set")
    p.add_argument("--join-identical", action=BooleanOptionalAction, default=True,
                   help="keep patients who share an identical picture on one side of every split")
    p.add_argument("--global-seed", type=integer(0), default=0, help="seed of split and phantoms")
    return p


def parse_args():
    args = parser().parse_args()
    for name, source in SOURCES.items():
        for flag, default in source.flags.items():
            spelled, given = "--" + flag.replace("_", "-"), getattr(args, flag) is not None
            if given and flag not in SOURCES[args.source].flags:
                raise UserError(f"{spelled}: belongs to --source {name}, not to {args.source}; remove it")
            if not given and name == args.source:
                if default is REQUIRED:
                    raise UserError(f"--source {name}: needs {spelled}")
                setattr(args, flag, default)
    return args


if __name__ == "__main__":
    run(main)
