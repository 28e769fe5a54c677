"""Compare generated images with the real validation images of a fold: the KID column of the paper's Table 1.

    python evaluate.py --fold 0 --real data/oct --gen synthetic/GeCA-S-GS-fold-0-nstep-250-...
    python evaluate.py --fold 0 --image-size 64 --real data/phantom --gen FOLDER_A FOLDER_B --output results

Real: ROOT/val_{fold}.csv. Generated: FOLDER/val_syn_{fold}.csv or, where there is none, the PNG files of
FOLDER/gen_samples_val, or of FOLDER itself; never gen_samples, the expansion of the training set.
The first rows are the noise floor: the validation images against as many real training images; no generator
need come closer. Writes metrics_{fold}.json, metrics_{fold}.txt and real_vs_generated_{fold}.png.
"""

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from metrics.features import SPACES, extract, open_features
from metrics.kid import SUBSETS, check_subset_size, kid
from pipeline import runtime
from pipeline.cli import Parser, UserError, integer, run
from pipeline.data import check_images, load_image, read_split
from pipeline.files import make_folder, write_atomically, write_text
from pipeline.pictures import caption, stack
from pipeline.seeds import generator

FEW = 50  # images per subset; with fewer, a warning says that KID spreads widely
SHOWN = 8  # images of each set in the picture
PICTURE = "real_vs_generated"


@dataclass(frozen=True)
class ImageSet:
    """n images under one name in the table."""

    name: str
    folder: Path
    paths: list
    labels: np.ndarray | None = None  # (n, K), None where nothing says what they show


def main():
    args = parser().parse_args()
    runtime.alone("evaluate.py")
    if args.gg_extractor:
        raise UserError(f"--gg_extractor {args.gg_extractor}: this version scores KID only, not GG; leave the flag out")
    args.output = args.output or args.gen[0]
    check_devices(args.device_list or [])
    if args.output.exists() and not args.output.is_dir():
        raise UserError(f"--output {args.output}: is a file, expected a folder")
    real, training, label_names = open_real(args.real, args.fold, args.global_seed)
    generated = [open_generated(folder, args.fold, label_names) for folder in args.gen]
    sizes = [args.subset_size or len(s.paths) // 4 for s in generated]  # ⌊n/4⌋ as in the paper
    for s, size in zip(generated, sizes, strict=True):
        check_subset_size(size, real=len(real.paths), generated=len(s.paths), training=len(training.paths))
    make_folder(args.output, "--output")  # if it cannot be, better now than later
    state = runtime.start()
    spaces = open_spaces(args.features, args.device_list or [state.device])
    for s in generated:
        check_size(s.paths, args.image_size)
    check_images(real.paths + training.paths)

    for s, size in zip(generated, sizes, strict=True):
        if size < FEW:
            print(f"warning: {s.name}: {len(s.paths)} generated and {len(real.paths)} real images, in subsets of",
                  f"{size}, are few: KID spreads widely, mind the ± and the noise floor", file=sys.stderr)
    rows = score(real, training, generated, sizes, spaces, args)
    report = {
        "fold": args.fold, "image_size": args.image_size, "real": str(args.real), "seed": args.global_seed,
        "subsets": SUBSETS, "features": {name: copies[0].identity for name, copies in spaces.items()},
        "versions": runtime.versions(), "rows": rows,
    }
    print(table(rows, args))
    write_results(args, report, table(rows, args), picture(real, generated, label_names, args))


def open_spaces(names, devices):
    """Name of each feature space -> its copies, one per device."""
    spaces = {}
    for name in names:
        copies = [open_features(name, device) for device in devices]
        if copies[0].name in spaces:
            raise UserError(f"--features: two spaces are called {copies[0].name}; remove or rename one")
        spaces[copies[0].name] = copies
    return spaces


def open_real(root, fold, seed):
    """Validation images, as many training images drawn at random, and the label names of the fold."""
    val, train = read_split(root, f"val_{fold}"), read_split(root, f"train_{fold}")
    order = torch.randperm(len(train), generator=generator(seed, "noise floor", fold))[:len(val)].tolist()
    training = ImageSet(f"real: train_{fold}", root, [train.image_paths[i] for i in order])
    return ImageSet(f"real: val_{fold}", root, val.image_paths, val.labels), training, val.label_names


def open_generated(folder, fold, label_names):
    """The images of a sample folder that answer the validation labels of this fold."""
    name = folder.resolve().name
    if list(folder.glob("val_syn_*.csv")):  # the CSV of another fold is an error, no reason to take any PNG
        split = read_split(folder, f"val_syn_{fold}")
        if split.label_names != label_names:
            raise UserError(f"{split.path}: labels {' '.join(split.label_names)}, expected those of --real: "
                            f"{' '.join(label_names)}")
        return ImageSet(name, folder, split.image_paths, split.labels)
    if (folder / f"val_syn_{fold}.npy").is_file():  # the sampler writes it first and the CSV last
        raise UserError(f"--gen {folder}: its sampling is unfinished (no val_syn_{fold}.csv); run the sampler again")
    for place in (folder / "gen_samples_val", folder):
        paths = sorted(p for p in place.glob("*.png") if not p.name.startswith(PICTURE))
        if paths:
            print(f"{folder}: no val_syn_{fold}.csv; taking {len(paths)} PNG files of {place}, unlabelled")
            return ImageSet(name, folder, paths)
    raise UserError(f"--gen {folder}: no such folder, or no image in it (expected val_syn_{fold}.csv, "
                    "gen_samples_val/*.png or *.png); make them with sample_ddp_val.py")


def check_size(paths, size):
    """Raise UserError unless every file is a readable image of size × size pixels."""
    with ThreadPoolExecutor(4) as pool:
        for path, image in zip(paths, pool.map(load_image, paths), strict=True):
            height, width, _ = image.shape
            if (height, width) != (size, size):
                raise UserError(f"{path}: {width} × {height} pixels, expected {size} × {size}; "
                                "give --image-size as it was in sampling")


def score(real, training, generated, sizes, spaces, args):
    """KID in every feature space -> rows: of the noise floor, one per subset size, then one per folder."""
    sets = {"real": real, "training": training} | dict(enumerate(generated))
    features = {name: {key: features_of(copies, s, args) for key, s in sets.items()}
                for name, copies in spaces.items()}

    def row(key, size):
        s = sets[key]
        found = {"set": s.name, "folder": str(s.folder), "kid": {}, "images": len(s.paths),
                 "real": len(real.paths), "subset_size": size}
        for name, f in features.items():
            mean, std = kid(f["real"], f[key], size, SUBSETS, args.global_seed)
            found["kid"][name] = {"mean": mean, "std": std}
        return found

    return [row("training", size) for size in sorted(set(sizes))] + [row(i, s) for i, s in enumerate(sizes)]


def features_of(copies, images, args):
    """Features (n, D) of a set; each device takes one stretch of its files."""
    stretches = [[str(p) for p in part] for part in np.array_split(images.paths, len(copies))]
    with ThreadPoolExecutor(len(copies)) as pool:
        parts = pool.map(lambda f, paths: extract(f, paths, args.image_size, args.batch_size, images.name),
                         copies, stretches)
        return np.concatenate(list(parts))


def table(rows, args):
    """The rows as text. Numbers of two feature spaces never stand in one column."""
    spaces = list(rows[0]["kid"])
    lines = [["set", *(f"KID[{name}] x1e-3" for name in spaces), "images", "real", "subset", "seed"]]
    for row in rows:
        values = [f"{1e3 * value['mean']:.2f} ± {1e3 * value['std']:.2f}" for value in row["kid"].values()]
        lines.append([row["set"], *values, row["images"], row["real"], row["subset_size"], args.global_seed])
    widths = [max(len(str(cell)) for cell in column) for column in zip(*lines, strict=True)]
    lines = ["  ".join(f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}"
                       for i, (cell, w) in enumerate(zip(line, widths, strict=True))) for line in lines]
    return "\n".join([f"{args.real}, fold {args.fold}, {args.image_size} pixels; against the images of "
                      f"val_{args.fold}, {SUBSETS} subsets", *lines])


def picture(real, generated, label_names, args):
    """Real images on top, generated ones below, under each what it shows; columns share it where possible.

    Which images: chosen at random, but each label combination once before any comes twice.
    """
    def order(n, *purpose):
        return torch.randperm(n, generator=generator(args.global_seed, "picture", *purpose)).tolist()

    def open_images(s, indices):
        return [None if i is None else load_image(s.paths[i], args.image_size) for i in indices]

    def captions(s, indices):
        return ["" if i is None or s.labels is None else caption(s.labels[i], label_names) for i in indices]

    sets, titles = [real, *generated], ["real", *(f"generated {i + 1}" for i in range(len(generated)))]
    chosen = [different(real.labels, order(len(real.paths), "real"))[:SHOWN]]
    for i, s in enumerate(generated):
        chosen.append(match(real.labels[chosen[0]], s.labels, order(len(s.paths), i)))
    return stack([*map(open_images, sets, chosen)], titles, [*map(captions, sets, chosen)], len(chosen[0]))


def different(labels, order):
    """Reorder `order` so that the first image of each label combination comes before every repetition."""
    first = {tuple(labels[i]): i for i in reversed(order)}.values()
    return [i for i in order if i in first] + [i for i in order if i not in first]


def match(wanted, labels, order):
    """For each row of `wanted` (n, K) the index of an image with these labels, else of another, else None."""
    free, found = list(order), []
    for row in wanted:
        hit = next((i for i in free if labels is not None and np.array_equal(labels[i], row)), None)
        found.append(hit)
        if hit is not None:
            free.remove(hit)
    return [free.pop(0) if i is None and free else i for i in found]


def write_results(args, report, text, image):
    try:
        write_text(args.output / f"metrics_{args.fold}.json", json.dumps(report, indent=1) + "\n")
        write_text(args.output / f"metrics_{args.fold}.txt", text + "\n")
        write_atomically(args.output / f"{PICTURE}_{args.fold}.png", lambda path: image.save(path, "PNG"))
    except OSError as error:
        raise UserError(f"--output {args.output}: cannot be written ({error})") from None
    print(f"\n{args.output}: metrics_{args.fold}.json, metrics_{args.fold}.txt, {PICTURE}_{args.fold}.png")


def device(text):
    """An argparse type: the name of a device."""
    try:
        found = torch.device(text)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected cpu, cuda or cuda:N")
    return found


def check_devices(devices):
    """Raise UserError for a GPU that this machine does not have."""
    for found in devices:
        count = torch.cuda.device_count()
        if found.type == "cuda" and (found.index or 0) >= count:
            raise UserError(f"--device-list {found}: this machine has {count or 'no'} CUDA device(s); give "
                            f"{'one of them or ' if count else ''}cpu")


def parser():
    p = Parser(__doc__)
    p.add_argument("--real", type=Path, required=True, metavar="ROOT", help="data root of prepare_data.py")
    p.add_argument("--gen", type=Path, nargs="+", required=True, metavar="FOLDER",
                   help="folders of sample_ddp_val.py; each is a row")
    p.add_argument("--fold", type=integer(0), default=0, help="whose validation images are the real ones")
    p.add_argument("--image-size", type=integer(8, 2048), default=256, help="side of the images, in pixels")
    p.add_argument("--features", nargs="+", default=["retina"], metavar="NAME",
                   help=f"feature spaces, each a column: {', '.join(SPACES)} or the folder of an autoencoder")
    p.add_argument("--gg-extractor", choices=("dino", "inception", "clip"),
                   help="published flag for the score GG, which this version does not compute: an error")
    p.add_argument("--subset-size", type=integer(2),
                   help="images per KID subset (default: a fourth of the generated images, as in the paper)")
    p.add_argument("--device-list", type=device, nargs="+", metavar="DEVICE",
                   help="devices that share the work (default: cuda if there is one, else cpu)")
    p.add_argument("--batch-size", type=integer(1), default=32, help="images per forward pass")
    p.add_argument("--global-seed", type=integer(0), default=0, help="seed of the subsets and of all choices")
    p.add_argument("--output", type=Path, metavar="DIR", help="for results (default: the first --gen folder)")
    return p


if __name__ == "__main__":
    run(main)
