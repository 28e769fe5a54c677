r"""How few steps does a model need? KID of each model, sampler and number of steps: json, a table and a plot.

    python scripts/study_samplers.py --ckpt runs/a/checkpoints/last_ckpt.pt runs/b/checkpoints/last_ckpt.pt \
        --data-path data/phantom --fold 0 --images 64 --output study
    python scripts/study_samplers.py --plot study other_study --output study

All points have the same labels, those of validation images drawn at random, and the same starting noise; each is scored
against all validation images of the fold. So two points of one model are pairs of images: `paired` is the KID of a
point minus that of --reference, with the 95 % interval and p of metrics/uncertainty.paired_difference. Without it, two
KIDs that lie within each other's spread may still differ, or not. A point that is in study/points.jsonl already is not
measured again; its features are kept beside it, so that another --reference needs no new images.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib

matplotlib.use("Agg")  # no screen needed

import numpy as np
import torch
from matplotlib import pyplot as plt

from benchmarks.bench import Case, operations
from core import runtime
from core.cli import Parser, integer, number, run
from core.errors import UserError
from core.files import make_folder, read_array, read_jsonl, write_array, write_atomically, write_text
from core.random import generator
from core.schema import Number
from core.text import markdown, p_is
from dataset import outside
from dataset.images import load_images
from dataset.root import read_split
from dataset.vae import cells_per_side, open_codec
from diffusion.samplers import SAMPLERS
from evaluation.features import open_features
from generation import checkpoint as checkpoints
from generation.sampling import SamplingOptions, sample_images
from metrics.kid import SUBSETS, kid
from metrics.uncertainty import paired_difference

PAIRED = {"difference": float, "p": float, "interval": [float], "reference": str}
POINT = {"model": str, "sampler": str, "steps": Number(), "kid": float, "kid_std": float, "gflop_per_image?": float,
         "paired?": PAIRED}


class Study:
    """What all points have in common."""

    def __init__(self, args):
        self.args, self.device = args, runtime.start().device
        split = read_split(args.data_path, f"val_{args.fold}")
        order = torch.randperm(len(split), generator=generator(args.global_seed, "study"))[:args.images]
        if args.images > len(split):
            raise UserError(f"--images {args.images}: {split.csv} has {len(split)} images; give fewer")
        self.split, self.labels = split, torch.as_tensor(split.labels)[order]
        self.space, self.real = open_features("retina", self.device), None
        self.file = args.output / "points.jsonl"
        self.points = read_points([args.output]) if self.file.is_file() else []

    def measure(self, path):
        """All points of one checkpoint."""
        checkpoint = checkpoints.load(path)
        trained = checkpoint.args
        codec = open_codec(trained["vae"], trained["image_space"], self.device)
        model = checkpoints.build(checkpoint).to(self.device)
        cells = cells_per_side(trained["image_size"], codec)
        if self.real is None:
            self.real = self.space(load_images(self.split.paths, trained["image_size"]))
        cost = operations(Case(trained["model"], cells, 8, self.device), "guided", "asynchronous") / 8
        ways = [(sampler, steps) for sampler in self.args.samplers for steps in self.args.steps]
        for sampler, steps in dict.fromkeys([self.args.reference, *ways]):
            about = {"model": trained["model"], "step": checkpoint.step, "sampler": sampler, "steps": steps,
                     "images": self.args.images, "seed": self.args.global_seed, "cfg_scale": self.args.cfg_scale}
            if self.features_of(about).is_file() and any(about.items() <= point.items() for point in self.points):
                continue
            started = time.perf_counter()
            features = self.sampled(model, codec, cells, sampler, steps)
            seconds = (time.perf_counter() - started) / self.args.images
            write_array(self.features_of(about), features)
            self.add({**about, **self.score(features), "gflop_per_image": steps * cost / 1e9,
                      "seconds_per_image": seconds})

    def features_of(self, about):
        """The file that keeps the features of a point."""
        values = [about[key] for key in ("model", "step", "sampler", "steps", "images", "seed", "cfg_scale")]
        return self.args.output / "features" / f"{'-'.join(map(str, values)).replace('/', '-')}.npy"

    def compare(self):
        """Note the paired difference to --reference at every point whose images are kept, and its own; write all."""
        sampler, steps = self.args.reference
        for i, point in enumerate(self.points):
            reference = {**point, "sampler": sampler, "steps": steps}
            files = [self.features_of(about) for about in (point, reference)] if point["model"] != "real" else []
            plain = {key: value for key, value in point.items() if key != "paired"}
            if files and files[0] != files[1] and all(file.is_file() for file in files):
                features = [read_array(file, "remove it and its point", 2) for file in files]
                found = paired_difference(self.real, *features)
                plain["paired"] = {"difference": found.value, "p": found.p, "interval": [found.low, found.high],
                                   "reference": f"{sampler} {steps}"}
            self.points[i] = plain
        write_text(self.file, "".join(json.dumps(point) + "\n" for point in self.points))

    def sampled(self, model, codec, cells, sampler, steps):
        """Features (n, D) of what a model makes of the labels."""
        options = SamplingOptions(steps=steps, sampler=sampler, cfg_scale=self.args.cfg_scale,
                                  seed=self.args.global_seed)
        ids = range(len(self.labels))
        images = [made for _, made in sample_images(model, codec, self.labels, ids, cells, options, self.device)]
        return self.space(np.concatenate(images))

    def score(self, features):
        mean, std = kid(self.real, features, len(features) // 4, SUBSETS, self.args.global_seed)
        return {"kid": mean, "kid_std": std}

    def add(self, point):
        self.points.append(point)
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps(point) + "\n")
        print(row(point), flush=True)

    def noise_floor(self):
        """KID of as many training images against the validation images."""
        train = read_split(self.args.data_path, f"train_{self.args.fold}")
        order = torch.randperm(len(train), generator=generator(self.args.global_seed, "noise floor"))
        paths = [train.paths[i] for i in order[:self.args.images].tolist()]
        size = checkpoints.load(self.args.ckpt[0]).args["image_size"]
        self.add({"model": "real", "sampler": "-", "steps": 0, "images": self.args.images,
                  **self.score(self.space(load_images(paths, size)))})


def read_points(folders):
    points = [point for folder in folders for point in read_jsonl(Path(folder) / "points.jsonl", "remove it", POINT)]
    return list({json.dumps(point): point for point in points}.values())


def row(point):
    score = f"{1e3 * point['kid']:7.1f} ± {1e3 * point['kid_std']:5.1f}"
    cost = f"{point['gflop_per_image']:9.1f}" if "gflop_per_image" in point else f"{'-':>9}"
    cells = [f"{markdown(point['model']):8}", f"{markdown(point['sampler']):7}", f"{point['steps']:5}", score, cost]
    return f"| {' | '.join([*cells, paired(point)])} |"


def paired(point):
    """The difference to the reference, its interval and p, as text; nothing where a study has not kept it."""
    if "paired" not in point:
        return ""
    found = point["paired"]
    low, high = (1e3 * end for end in found["interval"])
    return (f"{1e3 * found['difference']:+.1f} ({low:+.1f} to {high:+.1f}), {markdown(p_is(found['p']))}, "
            f"against {markdown(found['reference'])}")


def table(points):
    """Markdown, sorted."""
    head = ("| model | sampler | steps | KID[retina] × 1e-3 | GFLOP per image | paired difference of KID (95 %) |\n"
            "|---|---|---|---|---|---|")
    return "\n".join([head, *map(row, sorted(points, key=lambda p: (p["model"], p["sampler"], p["steps"])))]) + "\n"


def plot(points, path):
    """KID against steps and against operations, a line for each model and sampler; the noise floor in grey."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    models = sorted({p["model"] for p in points} - {"real"})
    for axis, key, label in zip(axes, ("steps", "gflop_per_image"), ("sampling steps", "GFLOP per image"), strict=True):
        for color, model in enumerate(models):
            for sampler, style in zip(SAMPLERS, ("-o", "--s", ":^"), strict=True):
                line = sorted((p[key], 1e3 * p["kid"]) for p in points
                              if (p["model"], p["sampler"]) == (model, sampler))
                if line:
                    axis.plot(*zip(*line, strict=True), style, color=f"C{color}", label=f"{model}, {sampler}", ms=4)
        for p in points:
            if p["model"] == "real":
                axis.axhline(1e3 * p["kid"], color="grey", lw=1)
        axis.set(xlabel=label, xscale="log")
    axes[0].set_ylabel("KID[retina] × 1e-3")
    axes[0].legend(fontsize=7)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))


def main():
    args = parser().parse_args()
    make_folder(args.output / "features", "--output")
    if args.plot:
        points = read_points(args.plot)
    elif not args.ckpt or not args.data_path:
        raise UserError("found neither --plot nor --ckpt with --data-path; give one of them")
    else:
        study = Study(args)
        for path in args.ckpt:
            study.measure(path)
        if not any(point["model"] == "real" for point in study.points):
            study.noise_floor()
        study.compare()
        points = study.points
    write_text(args.output / "table.md", table(points))
    plot(points, args.output / "steps.png")
    print(f"{args.output}: table.md, steps.png")


def parser():
    p = Parser(__doc__)
    p.add_argument("--ckpt", type=Path, nargs="+", metavar="FILE", help="checkpoints of train.py")
    p.add_argument("--data-path", type=Path, metavar="ROOT", help="data root they were trained on")
    outside.add_flag(p)
    p.add_argument("--fold", type=integer(0), default=0, help="whose validation images are the real ones")
    p.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=list(SAMPLERS), metavar="NAME", help="which")
    p.add_argument("--steps", type=integer(1, 1000), nargs="+", default=[10, 25, 50, 100, 250], metavar="N",
                   help="numbers of sampling steps")
    p.add_argument("--reference", type=point_name, default="ddpm 250", metavar="'SAMPLER STEPS'", help="what every "
                   "other point of a model is compared with, pair by pair; it is measured too")
    p.add_argument("--images", type=integer(8), default=64, help="images per point")
    p.add_argument("--cfg-scale", type=number(0), default=1.5, help="guidance")
    p.add_argument("--global-seed", type=integer(0), default=0, help="seed of labels, images and subsets")
    p.add_argument("--plot", type=Path, nargs="+", metavar="DIR", help="join the points of earlier studies")
    p.add_argument("--output", type=Path, required=True, metavar="DIR", help="points.jsonl, table.md, steps.png")
    return p


def point_name(text):
    """An argparse type: a sampler and a number of steps."""
    sampler, _, steps = text.partition(" ")
    if sampler not in SAMPLERS:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected one of {', '.join(SAMPLERS)} and a number of steps")
    return sampler, integer(1, 1000)(steps)


if __name__ == "__main__":
    run(main, runtime.stop)
