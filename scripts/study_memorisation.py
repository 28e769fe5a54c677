"""Study of memorisation: scores against the length of training on few images; docs/COMPARISON.md.

    export ACCELERATE_MIXED_PRECISION=bf16
    python scripts/study_memorisation.py --data data/oct --output runs/memorisation --images 148 --steps 360 720 1440
    python scripts/study_memorisation.py --plot runs/memorisation/points.jsonl --output docs/images/memorisation.png

Each model trains once on --images training images of the fold (whole patients, in random order), at a constant
learning rate, and is sampled after each of --steps with the labels of all validation images. OUTPUT/points.jsonl gets a
line per model and point: KID and FID in each feature space, the generalisation gap (GG), copies and AuthPct, all as
evaluate.py has them, and the squared error of ε on validation and on training images. The same command goes on where
it stopped. --plot draws these lines.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.cli import Parser, integer, run
from core.errors import UserError
from core.files import make_folder, read_json, read_jsonl, write_atomically
from core.random import generator
from core.schema import Number
from dataset import outside
from dataset.images import load_images
from dataset.root import read_split, write_split
from dataset.store import place
from dataset.vae import open_codec
from generation import checkpoint as checkpoints
from scripts.plot_learning import COLOURS
from scripts.study_learning import BATCH, MODELS, MUON, SIZE, append_row, call, held_out_error

FOLD = 0
RATES = {model: float(rate) / 2 for model, rate in MUON.items()}  # constant: half of what is best with decay to 0
POINT = {"model": str, "images": Number(), "steps": Number(), "kid": {}, "fid": {}, "gg": float, "copies": float,
         "copies_expected": float, "authentic": float, "error": float, "training_error": float}  # schema of a line
COLUMNS = 3
ERROR = "error, validation (full) and training × 1e-4"


def subset(args):
    """A data root with the first --images training images, whole patients in random order; -> its folder."""
    root = args.output / f"data-{args.images}"
    if (root / f"train_{FOLD}.csv").is_file():  # written last
        return root
    splits = {name: read_split(args.data, name) for name in (f"val_{FOLD}", "test", f"train_{FOLD}")}
    for name, split in splits.items():
        rows = first_patients(split.patients, args.images) if name.startswith("train") else range(len(split))
        for k in rows:
            (root / split.filenames[k]).parent.mkdir(parents=True, exist_ok=True)
            place(split.paths[k], root / split.filenames[k])
        write_split(root, name, *([values[k] for k in rows] for values in (split.filenames, split.labels)),
                    split.label_names, *([values[k] for k in rows] for values in (split.patients, split.eyes)))
    return root


def first_patients(patients, count):
    """Rows of `count` images: those of the first patients of a random order; the last one may lose some."""
    names = sorted(set(patients))
    order = torch.randperm(len(names), generator=generator(0, "subset")).tolist()
    place = {names[k]: position for position, k in enumerate(order)}
    rows = sorted(range(len(patients)), key=lambda k: (place[patients[k]], k))[:count]
    if len(rows) < max(count, BATCH):
        raise UserError(f"--images {count}: there are {len(rows)} training images, expected {BATCH} to that many")
    return sorted(rows)


def train(model, steps, root, args):
    """Train to a number of steps, from where the last point stopped; -> a copy of the checkpoint."""
    kept = args.output / "weights" / f"{model}-{args.images}-{steps}.pt"
    if kept.is_file():
        return kept
    runs, per_epoch = args.output / "train" / f"{model}-{args.images}", args.images // BATCH
    epochs = -(-steps // per_epoch)
    call(["train.py", *outside.flags(), "--model", model, "--data-path", root, "--feature-path",
          args.output / f"latents-{args.images}", "--fold", FOLD, "--image-size", SIZE, "--vae", "retina",
          "--global-batch-size", BATCH, "--optimizer", "muon", "--lr", RATES[model], "--warmup", 50, "--clip-norm", 1,
          "--ema-decay", 0.999, "--epochs", epochs, "--val-samples", 24, "--sampler",
          "ddim", "--num-sampling-steps", 25, "--log-every", 90, "--ckpt-every", 500, "--no-checkpoint-steps",
          "--results-dir", runs])
    last = next(runs.glob("000-*/checkpoints/last_ckpt.pt"))
    found = checkpoints.load(last).step
    if found != epochs * per_epoch:
        raise UserError(f"{last}: is at step {found}, expected {epochs * per_epoch}, and training does not go back; "
                        "give another --output")
    kept.parent.mkdir(exist_ok=True)
    write_atomically(kept, lambda temporary: shutil.copyfile(last, temporary))
    return kept


def sampled(model, steps, weights, root, args):
    """Samples with the labels of the validation images; -> their folder."""
    folder = args.output / "samples" / f"{args.images}-{steps}"
    call(["sample_ddp_val.py", *outside.flags(), "--ckpt", weights, "--data-path", root, "--fold", FOLD, "--sampler",
          "ddim", "--num-sampling-steps", 25, "--per-proc-batch-size", 74, "--sample-dir", folder])
    return next(folder.glob(f"{model}-GS-*-{weights.stem}-*"))


def measure(steps, weights, samples, root, args):
    """Lines of points.jsonl of all models at one point."""
    output = args.output / "scores" / f"{args.images}-{steps}"
    call(["evaluate.py", *outside.flags(), "--real", root, "--fold", FOLD, "--features", *args.features,
          "--lpips", "none", "--no-growth", "--gen", *samples.values(), "--output", output])
    report = read_json(output / "results.json", "remove its folder and measure again")
    rows = {row["about"]["model"]: row for row in report["rows"] if row["kind"] == "generated"}
    floor, codec = report["rows"][0], open_codec("retina")
    for model, file in weights.items():
        errors = [error_on(checkpoints.build(checkpoints.load(file)), codec, read_split(root, name))
                  for name in (f"val_{FOLD}", f"train_{FOLD}")]
        yield {"model": model, "images": args.images, "steps": steps, **scores(rows[model]), "error": errors[0],
               "training_error": errors[1], "floor": scores(floor)}


def scores(row):
    """What is kept of a row of results.json."""
    close = row["memorisation"]["close"]
    return {"kid": row["kid"], "fid": row["fid"], "gg": row["gg"]["gap"], "gg_interval": row["gg"]["gap_interval"],
            "copies": close["value"], "copies_interval": [close["low"], close["high"]],
            "copies_expected": close["expected"], "authentic": row["memorisation"]["authentic_percent"]}


def error_on(model, codec, split):
    """Squared error of ε on the images of a split."""
    latents, _ = codec.moments(torch.as_tensor(load_images(split.paths, SIZE)))
    return held_out_error(model, latents, torch.as_tensor(split.labels))[0]


def study(args):
    make_folder(args.output, "--output")
    root, file = subset(args), args.output / "points.jsonl"
    call(["extract_features.py", *outside.flags(), "--data-path", root, "--features-path",
          args.output / f"latents-{args.images}", "--fold", FOLD, "--image-size", SIZE, "--vae", "retina"])
    weights = {model: {steps: train(model, steps, root, args) for steps in sorted(args.steps)} for model in args.models}
    known = {(row["images"], row["steps"], row["model"]) for row in lines(file)} if file.is_file() else set()
    for steps in sorted(args.steps):
        files = {model: kept[steps] for model, kept in weights.items()
                 if (args.images, steps, model) not in known}
        if files:
            samples = {model: sampled(model, steps, kept, root, args) for model, kept in files.items()}
            for row in measure(steps, files, samples, root, args):
                append_row(file, row)


def lines(file):
    return read_jsonl(file, "remove that line and measure again", POINT)


def panels(spaces):
    """What is drawn side by side: title, value of a line, its interval. KID in each feature space, then the rest."""
    return [*((f"KID[{name}] × 1e-3", lambda row, name=name: 1e3 * row["kid"][name]["value"],
               lambda row, name=name: [1e3 * v for v in row["kid"][name]["interval"]]) for name in spaces),
            (f"GG[{spaces[0]}]", lambda row: row["gg"], lambda row: row["gg_interval"]),
            ("AuthPct", lambda row: row["authentic"], None),
            ("copies, %", lambda row: 100 * row["copies"], None),
            (ERROR, lambda row: 1e4 * row["error"], None)]


def plot(file):
    """The lines of points.jsonl as a figure: COLUMNS panels beside each other, from the fewest images to the most."""
    rows = lines(file)
    counts, shown = sorted({row["images"] for row in rows}), panels(list(rows[0]["kid"]))
    high = -(-len(shown) // COLUMNS)
    figure = Figure(figsize=(3.6 * COLUMNS, 3 * high * len(counts)), layout="constrained")
    for count, part in zip(counts, np.atleast_1d(figure.subfigures(len(counts), 1)), strict=True):
        part.suptitle(f"{count} training images", fontsize=11)
        for axes, panel in zip(part.subplots(high, COLUMNS).flat, shown, strict=False):
            draw(axes, [row for row in rows if row["images"] == count], *panel)
        part.axes[0].legend(fontsize=8)
    return figure


def draw(axes, rows, title, value, interval):
    """One panel: a curve with intervals for each model; dashed: real test images, or the error on training images."""
    for model in MODELS:
        own = sorted((row for row in rows if row["model"] == model), key=lambda row: row["steps"])
        steps, shade = [row["steps"] for row in own], COLOURS[model]
        if own:
            axes.plot(steps, [value(row) for row in own], color=shade, marker="o", markersize=3, label=model)
        if own and interval:
            axes.fill_between(steps, *zip(*map(interval, own), strict=True), color=shade, alpha=0.12)
        if own and title == ERROR:
            axes.plot(steps, [1e4 * row["training_error"] for row in own], color=shade, linestyle="--")
    if title != ERROR:
        axes.axhline(value(rows[0]["floor"]), color="grey", linestyle="--", label="real test images")
    axes.set_title(title, fontsize=9)
    axes.set_xscale("log")
    steps = sorted({row["steps"] for row in rows})
    axes.set_xticks(steps, map(str, steps), fontsize=8)
    axes.minorticks_off()
    axes.set_xlabel("training steps of 32 images", fontsize=8)
    axes.grid(alpha=0.3)


def main():
    args = parser().parse_args()
    if args.plot:
        make_folder(args.output.parent, "--output")
        plot(args.plot).savefig(args.output, dpi=110)
    elif not args.data:
        raise UserError("--data: is missing; give the data root, or --plot points.jsonl")
    else:
        study(args)


def parser():
    p = Parser(__doc__)
    p.add_argument("--data", type=Path, metavar="ROOT", help="data root")
    outside.add_flag(p)
    p.add_argument("--output", type=Path, required=True, metavar="PATH", help="folder for all of it; the picture")
    p.add_argument("--images", type=integer(BATCH), default=148, help="training images")
    p.add_argument("--steps", type=integer(1), nargs="+", default=[360, 720, 1440, 2160, 2880],
                   help="steps of 32 images after which it is measured")
    p.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="which denoisers")
    p.add_argument("--features", nargs="+", default=["retina", "imagenet-lite"],
                   help="feature spaces of evaluate.py; GG and copies are of the first")
    p.add_argument("--plot", type=Path, metavar="FILE", help="draw the lines of points.jsonl")
    return p


if __name__ == "__main__":
    run(main)
