"""What is wrong with a data root, ours or made by hand: everything at once, not the first fault only."""

from concurrent.futures import ThreadPoolExecutor
from itertools import combinations, compress
from pathlib import Path

from core.errors import UserError
from dataset.images import load_image, pixel_hash
from dataset.patients import conflicts
from dataset.root import read_split

SHOWN = 3  # examples of each fault


def audit(root, workers, progress):
    """Yield one sentence for each fault of ROOT/*.csv and of the images they list.

    `progress` wraps the iterator of pictures that are read. Raises UserError where ROOT has no split at all.
    """
    files = sorted(path.stem for path in Path(root).glob("*.csv"))
    if not files:
        raise UserError(f"--check {root}: no CSV file there, expected train_0.csv, val_0.csv, test.csv; make a data "
                        "root with prepare_data.py")
    splits = {}
    for name in files:
        try:
            splits[name] = read_split(root, name)
        except UserError as error:
            yield str(error)
    yield from _incomplete(files)
    yield from _label_sets(splits)
    yield from _one_sided_labels(splits)
    paths = sorted({path for split in splits.values() for path in split.paths})
    digests, unreadable = {}, []
    with ThreadPoolExecutor(workers) as pool:
        for path, digest in zip(paths, progress(pool.map(_digest, paths), len(paths)), strict=True):
            if isinstance(digest, UserError):
                unreadable.append(str(digest))
            digests[path] = digest if isinstance(digest, str) else str(path)
    yield from unreadable
    yield from _leaks(splits, digests)
    yield from _conflicts(splits, digests)


def _digest(path):
    """SHA-256 of size and pixels, or the UserError."""
    try:
        return pixel_hash(load_image(path))
    except UserError as error:
        return error


def folds(names):
    """The numbers of the folds that have a training or validation set, in order."""
    numbers = {name.rpartition("_")[2] for name in names if name.startswith(("train_", "val_"))}
    return sorted((n for n in numbers if n.isdecimal()), key=int)


def _incomplete(files):
    if not folds(files):
        yield f"no train_0.csv and val_0.csv (found: {', '.join(files)}.csv)"
    for k in folds(files):
        for name in (f"train_{k}", f"val_{k}"):
            if name not in files:
                yield f"{name}.csv: missing, fold {k} has only the other half"
    if "test" not in files:
        yield "test.csv: missing, nothing is held out from the choice of checkpoints and settings"


def _label_sets(splits):
    first = next(iter(splits.values()), None)
    for split in splits.values():
        if split.label_names != first.label_names:
            how = "order differs" if {*split.label_names} == {*first.label_names} else "names differ"
            yield (f"{split.csv.name}: labels {' '.join(split.label_names)}, but {first.csv.name} has "
                   f"{' '.join(first.label_names)} (their {how})")


def _one_sided_labels(splits):
    for name, split in splits.items():
        for k, label in enumerate(split.label_names):
            share = split.labels[:, k].mean()
            if share in (0, 1):
                yield f"{name}.csv: {label} is {'never' if share == 0 else 'always'} positive in {len(split)} images"


def _leaks(splits, digests):
    """Patients, eyes and pictures that two sides of a fold share."""
    for i, k in enumerate(folds(splits)):
        names = (f"train_{k}", f"val_{k}", *["test"] * (i == 0))  # a fold has all images but those of the test set
        for a, b in combinations([splits[name] for name in names if name in splits], 2):
            yield from _shared(a, b, digests)


def _shared(a, b, digests):
    kinds = {"patient": [s.known_patients for s in (a, b)],
             "eye": [{*s.eyes} if s.eyes else set() for s in (a, b)],
             "picture": [{digests[path] for path in s.paths} for s in (a, b)]}
    for kind, (one, other) in kinds.items():
        if both := one & other:
            images = [name for name, path in zip(a.filenames, a.paths, strict=True) if digests[path] in both]
            named = images if kind == "picture" else sorted(both)
            yield (f"{a.name}.csv and {b.name}.csv share {len(both)} {kind}(s): {', '.join(named[:SHOWN])}"
                   f"{', …' if len(named) > SHOWN else ''}")


def _conflicts(splits, digests):
    """The same picture, or the same file, with different labels."""
    rows = sorted({(name, digests[path], tuple(sorted(compress(split.label_names, y)))) for split in splits.values()
                   for name, path, y in zip(split.filenames, split.paths, split.labels, strict=True)})
    names, pictures, labels = zip(*rows, strict=True) if rows else ((), (), ())
    for same in conflicts(pictures, labels):
        yield f"{' = '.join(sorted({names[i] for i in same}))}: one picture with different labels"
