"""Compare generated images with the real ones of a fold: a row of the paper's Table 1, and how certain it is.

    python evaluate.py --fold 0 --real data/oct --gen synthetic/GeCA-S-GS-fold-0-nstep-250-...
    python evaluate.py --real data/phantom --features retina --lpips none --gen FOLDER_A FOLDER_B

Real: ROOT/val_{fold}.csv; what the generator was trained on: ROOT/train_{fold}.csv. Generated: the images that
FOLDER/val_syn_{fold}.csv lists (made by sample_ddp_val.py). The first row of the table is the noise floor: real images
that were neither trained on nor compared with, those of ROOT/test.csv; no generator need come closer.
Several folders are rows side by side, are compared with each other where they answer the same labels, and where they
differ in their seed alone are also averaged. Writes results.json, report.html, results.txt and
real_vs_generated.png to --output. The report also shows how one image of each generator grows, and how its training
went, where the checkpoint is found (--runs).

KID, FID, precision, recall, density and coverage are measured in the spaces of --features, the generalisation gap (GG)
and copies of training images in that of --gg-extractor, LPIPS between samples. Without the network and without weights
from fetch_assets.py: `--features retina --lpips none`.
"""

import argparse
import sys
from pathlib import Path

import torch

from core import runtime
from core.cli import Parser, integer, run
from core.errors import UserError
from core.files import make_writable
from core.tensors import weights_hash
from dataset import outside
from dataset.pictures import caption
from evaluation import curves, growth, page, pictures
from evaluation import report as reports
from evaluation.comparison import same_method
from evaluation.evaluation import Evaluation, EvaluationSettings
from evaluation.features import NAMES, PUBLISHED
from evaluation.networks import Networks
from evaluation.sets import open_sets
from generation.trained import open_trained, read

CACHE = Path("~/.cache/geca/features")
MOMENTS = 9  # of a growing image
SMOOTH = 10  # log lines over which a curve is smoothed


def main():
    args = parser().parse_args()
    runtime.alone("evaluate.py")
    args.output = args.output or args.gen[0]
    check_devices(args.device_list or [])
    if args.output.exists() and not args.output.is_dir():
        raise UserError(f"--output {args.output}: is a file, expected a folder")
    sets = open_sets(args.real, args.gen, args.fold, args.global_seed)
    args.image_size = sets.image_size(args.image_size)
    sets.check_counts(args.subset_size)
    networks = Networks(args.device_list or [runtime.start().device], args.features, args.gg_extractor, args.lpips,
                        args.classifier, sets.label_names, args.image_size)
    sets.check_files(args.image_size)
    make_writable(args.output, "--output")  # if it cannot be, better now than later
    for remark in sets.remarks:
        print(remark)

    evaluation = Evaluation(EvaluationSettings(args.fold, args.image_size, args.global_seed, args.subset_size,
                                               args.resamples, args.batch_size, args.cache.expanduser()),
                            networks, sets)
    report = evaluation.report(evaluation.rows()) | {"settings": settings(args), "versions": runtime.versions()}
    print(reports.text(report))
    for warning in report["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    written = page.write(args.output, report, figures(sets, report["rows"], args, networks.devices[0]))
    print(f"\n{args.output}: {', '.join(written)}")


def figures(sets, rows, args, device):
    """The pictures of report.html: real beside generated, the closest pairs, and what is found of the training."""
    closest = {images.name: pictures.closest(row["memorisation"]["closest"], images.paths, sets.training.paths,
                                             args.image_size)
               for images, row in zip(sets.generated, (r for r in rows if r["kind"] == "generated"), strict=True)}
    beside = pictures.side_by_side(sets.real, sets.generated, sets.label_names, args.image_size, args.global_seed)
    lives, logged, notes = {}, {}, []
    for number, images in enumerate(sets.generated):
        if any(same_method(images, other) for other in sets.generated[:number]):
            continue  # another seed of it is shown
        try:
            trained = trained_of(images, args.runs, device)
            run = trained.path.parent.parent
            if (run / "metrics.jsonl").is_file():
                logged[images.name] = curves.read(run)
            if args.growth:
                lives[images.name] = life_of(trained, images)
        except UserError as error:
            notes.append(f"{images.name}: how an image grows is not shown: {error}")
    shades = {images.name: page.colour(number) for number, images in enumerate(sets.generated)}
    return page.Figures(beside, closest, lives, drawn_curves(logged, shades), notes)


def trained_of(images, runs, device):
    """The generator of a sample folder, as a TrainedModel. Raises UserError where it is not found."""
    about, files = images.about, []
    if "checkpoint" in about:
        files.append((images.folder / about["checkpoint"]).resolve())
    files += [file for place in runs for run in (place, *sorted(place.glob("**/")))
              if run.name == about.get("run") for file in sorted((run / "checkpoints").glob("*.pt"))]
    files = [file for file in files if file.is_file()]
    if not files:
        raise UserError(f"its checkpoint was not found ({about.get('checkpoint') or 'the folder does not name it'}), "
                        "nor the curves of its training; --runs says where to look")
    for file in files:
        weights = about.get("weights", "ema")
        checkpoint, _ = read(file, {}, weights)
        trained = open_trained(file, checkpoint, weights, device)
        if about.get("weights_hash") in (None, weights_hash(trained.net)):
            return trained
    raise UserError(f"{files[-1]} holds other weights than those that made its images")


def life_of(trained, images):
    """(caption, picture): one image of a sample folder as it grew, sampled again; the first that shows a label."""
    about = images.about
    if images.labels is None or not all(path.stem.isdecimal() for path in images.paths):
        raise UserError("its images are not labelled and numbered as a sampler leaves them")
    k = next((k for k, row in enumerate(images.labels) if row.any()), 0)
    number, asked = int(images.paths[k].stem), caption(images.labels[k], images.label_names)
    options = {name: about[name] for name in ("steps", "sampler", "cfg_scale", "heredity", "eta", "shared_fire",
                                              "cfg_interval", "precision", "seed") if name in about}
    if options.get("cfg_interval"):
        options["cfg_interval"] = tuple(options["cfg_interval"])
    values = dict(zip(images.label_names, images.labels[k].tolist(), strict=True)) if images.labels[k].any() else None
    life = trained.grow(values, number, MOMENTS, **options)
    strip = growth.strip(life, asked, life.nearest(500)).pixels()
    return f"image {number}, asked for {asked}, over the {options['steps']} steps of {options['sampler']}", strip


def drawn_curves(logged, shades):
    """Pictures of the loss and the validation KID that runs have logged (name -> curves), where there is a curve."""
    shown = []
    for title, values, logarithmic in curves.PANELS[:2]:
        runs = {name: known for name, known in logged.items()
                if any(len(known[value][0]) > 1 for value in values.keys() & known.keys())}
        if runs:
            figure = curves.plot(runs, SMOOTH, [(title, values, logarithmic)], bins=False, colours=shades)
            figure.set_dpi(200)
            shown.append(pictures.drawn(figure))
    return shown


def settings(args):
    """The flags, for results.json."""
    plain = (str, int, float, bool, type(None))
    return {name: value if isinstance(value, plain) else [str(v) for v in value] if isinstance(value, list)
            else str(value) for name, value in sorted(vars(args).items())}


def device(text):
    """An argparse type: the name of a device."""
    try:
        named = torch.device(text)
    except RuntimeError:
        named = None
    if named is None or named.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected cpu, cuda or cuda:N")
    return named


def check_devices(devices):
    """Raise UserError for a GPU that this machine does not have."""
    count = torch.cuda.device_count()
    for named in devices:
        if named.type == "cuda" and (named.index or 0) >= count:
            raise UserError(f"--device-list {named}: this machine has {count or 'no'} CUDA device(s); give "
                            f"{'one of them or ' if count else ''}cpu")


def parser():
    p = Parser(__doc__)
    p.add_argument("--real", type=Path, required=True, metavar="ROOT", help="data root of prepare_data.py")
    p.add_argument("--gen", type=Path, nargs="+", required=True, metavar="FOLDER",
                   help="folders of sample_ddp_val.py, or folders that hold some; each is a row")
    outside.add_flag(p)
    p.add_argument("--fold", type=integer(0), default=0, help="whose validation images are the real ones")
    p.add_argument("--image-size", type=integer(8, 2048), help="side of the images, in pixels (default: that of the "
                   "samples, or 256 where their folders do not say)")
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
    g = p.add_argument_group("report")
    g.add_argument("--runs", type=Path, nargs="+", default=[], metavar="DIR", help="run folders of train.py, or "
                   "folders with such in them, to look for the checkpoints of the samples in (default: where a sample "
                   "folder says that its checkpoint lies)")
    g.add_argument("--growth", action=argparse.BooleanOptionalAction, default=True, help="sample one image of each "
                   "generator again and show how it grows, where its checkpoint is found")
    g = p.add_argument_group("machine")
    g.add_argument("--device-list", type=device, nargs="+", metavar="DEVICE",
                   help="devices that share the work (default: cuda if there is one, else cpu)")
    g.add_argument("--batch-size", type=integer(1), default=32, help="images per forward pass")
    g.add_argument("--cache", type=Path, default=CACHE, metavar="DIR",
                   help="keeps features, so that the same images are not seen twice")
    return p


if __name__ == "__main__":
    run(main)
