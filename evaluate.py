"""Compare generated images with the real ones of a fold: a row of the paper's Table 1, and how far to trust it.

    python evaluate.py --fold 0 --real data/oct --gen synthetic/GeCA-S-GS-fold-0-nstep-250-...
    python evaluate.py --image-size 64 --real data/phantom --features retina --lpips none --gen FOLDER_A FOLDER_B

Real: ROOT/val_{fold}.csv; what the generator was trained on: ROOT/train_{fold}.csv. Generated: the images that
FOLDER/val_syn_{fold}.csv lists (made by sample_ddp_val.py). The first row of the table is the noise floor: real images
that were neither trained on nor compared with, those of ROOT/test.csv; no generator need come closer.
Several folders are rows side by side, are compared with each other where they answer the same labels, and where they
differ in their seed alone are also averaged. Writes results.json, report.html, results.txt and
real_vs_generated.png to --output.

KID, FID, precision, recall, density and coverage are measured in the spaces of --features, the generalisation gap (GG)
and copies of training images in that of --gg-extractor, LPIPS between samples. Without the network and without weights
from fetch_assets.py: `--features retina --lpips none`.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from core import runtime
from core.cli import Parser, integer, run
from core.errors import UserError
from core.files import make_writable, write_atomically, write_text
from dataset.images import check_images
from dataset.samples import PICTURE, check_size, open_generated, open_real
from evaluation import report as reports
from evaluation.evaluation import Evaluation, Networks
from evaluation.features import NAMES, PUBLISHED
from evaluation.pictures import picture
from metrics.kid import check_subset_size
from metrics.prdc import NEAREST

CACHE = Path("~/.cache/geca/features")


def main():
    args = parser().parse_args()
    runtime.alone("evaluate.py")
    args.output = args.output or args.gen[0]
    check_devices(args.device_list or [])
    if args.output.exists() and not args.output.is_dir():
        raise UserError(f"--output {args.output}: is a file, expected a folder")
    real, training, label_names = open_splits(args)
    floor = open_floor(args, label_names, training, len(real))
    found = [open_generated(folder, args.fold, label_names) for folder in args.gen]
    generated = distinct([images for images, _ in found])
    for s in generated:
        check_subset_size(args.subset_size or len(s) // 4, real=len(real), generated=len(s))
    for s in (real, floor, training, *generated):
        if len(s) <= NEAREST:
            raise UserError(f"{s.name}: found {len(s)} images, expected more than {NEAREST}; coverage looks at so many "
                            "neighbours of each")
    networks = Networks(args, args.device_list or [runtime.start().device], label_names)
    for s in generated:
        check_size(s.paths, args.image_size)
    check_images(real.paths + training.paths + floor.paths)
    digests = [s.digest for s in generated]
    if len({*digests}) < len(digests):
        twice = [s.name for s, digest in zip(generated, digests, strict=True) if digests.count(digest) > 1]
        raise UserError(f"--gen: {' and '.join(twice)} hold the same images; give each set once")
    make_writable(args.output, "--output")  # if it cannot be, better now than later
    for _, remark in found:
        if remark:
            print(remark)

    evaluation = Evaluation(args, networks, real, training, floor, label_names)
    rows = [evaluation.row(floor), *(evaluation.row(s) for s in generated)]
    report = evaluation.report(rows, generated) | {"settings": settings(args), "versions": runtime.versions()}
    print(reports.text(report))
    for warning in report["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    write_results(args, report, pictures(evaluation, real, generated, label_names, args))


def open_splits(args):
    """Validation images, training images, and the label names of the fold."""
    real, label_names = open_real(args.real, f"val_{args.fold}")
    training, other = open_real(args.real, f"train_{args.fold}")
    if other != label_names:
        raise UserError(f"{args.real}: train_{args.fold}.csv has the labels {' '.join(other)}, val_{args.fold}.csv "
                        f"{' '.join(label_names)}; prepare the data again")
    return real, training, label_names


def open_floor(args, label_names, training, count):
    """Real images for the noise floor: at most `count` of the test images; where there are none, training images."""
    source = replace(training, name=f"{training.name}, a part")
    if (args.real / "test.csv").is_file():
        source, names = open_real(args.real, "test")
        if names != label_names:
            raise UserError(f"{args.real}/test.csv: labels {' '.join(names)}, expected {' '.join(label_names)}")
    return source.split_at_random(count, args.global_seed, "noise floor", args.fold)[0]


def distinct(sets):
    """The same sets, with the shortest names that tell them apart: of the model, the folder, or its place."""
    def with_seed(s):
        return f"{s.about['model']}, seed {s.about['seed']}" if {"model", "seed"} <= s.about.keys() else s.name

    for naming in (lambda s: s.about.get("model", s.name), with_seed, lambda s: s.name, lambda s: str(s.folder)):
        names = [naming(s) for s in sets]
        if len({*names}) == len(names):
            return [replace(s, name=name) for s, name in zip(sets, names, strict=True)]
    raise UserError(f"--gen: names {next(n for n in names if names.count(n) > 1)} twice; give each folder once")


def settings(args):
    """The flags, for results.json."""
    plain = (str, int, float, bool, type(None))
    return {key: value if isinstance(value, plain) else str(value) if not isinstance(value, list)
            else [str(v) for v in value] for key, value in sorted(vars(args).items())}


def pictures(evaluation, real, generated, label_names, args):
    """(caption, image) of report.html: real beside generated, then the closest pairs of each folder."""
    shown = [("Real images above, generated ones below that were asked for the same labels.",
              picture(real, generated, label_names, args.image_size, args.global_seed))]
    for s in generated:
        shown.append((f"{s.name}: the samples nearest to a training image; training image above, sample below. Look: "
                      "are these copies?", evaluation.closest_pairs(s)))
    return shown


def write_results(args, report, shown):
    files = {"results.json": json.dumps(report, indent=1, allow_nan=False) + "\n",
             "results.txt": reports.text(report) + "\n", "report.html": reports.page(report, shown)}
    try:
        for name, text in files.items():
            write_text(args.output / name, text)
        write_atomically(args.output / f"{PICTURE}.png", lambda path: shown[0][1].save(path, "PNG"))
    except OSError as error:
        raise UserError(f"--output {args.output}: cannot be written ({error})") from None
    print(f"\n{args.output}: {', '.join(files)}, {PICTURE}.png")


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
    p.add_argument("--output", type=Path, metavar="DIR", help="for results (default: the first --gen folder)")
    g = p.add_argument_group("scores")
    g.add_argument("--features", nargs="+", metavar="NAME",
                   help=f"feature spaces of KID and FID: {NAMES} (default: inception)")
    g.add_argument("--gg-extractor", metavar="NAME", help="feature space of GG and of the search for copies: "
                   f"{', '.join(PUBLISHED)} or one of --features (default: dino; with --features, its first)")
    g.add_argument("--lpips", default="alex", metavar="NET", help="network of LPIPS: alex, or none to leave it out; "
                   "alex=FILE names a file of weights")
    g.add_argument("--classifier", type=Path, metavar="FILE", help="checkpoint of classify.py, trained on real images: "
                   "does an image show the labels it was asked for?")
    g.add_argument("--subset-size", type=integer(2),
                   help="images per KID subset (default: a fourth of the generated images, as in the paper)")
    g.add_argument("--resamples", type=integer(20), default=1000,
                   help="half-samples from which the interval of KID is made (of FID and GG a tenth)")
    g.add_argument("--global-seed", type=integer(0), default=0, help="seed of the subsets and of all choices")
    g = p.add_argument_group("machine")
    g.add_argument("--device-list", type=device, nargs="+", metavar="DEVICE",
                   help="devices that share the work (default: cuda if there is one, else cpu)")
    g.add_argument("--batch-size", type=integer(1), default=32, help="images per forward pass")
    g.add_argument("--cache", type=Path, default=CACHE, metavar="DIR",
                   help="keeps features, so that the same images are not seen twice")
    return p


if __name__ == "__main__":
    run(main)
