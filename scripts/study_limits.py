"""What limits the quality of a trained model: its samples, with one thing changed at a time; docs/LIMITS.md.

    python scripts/study_limits.py --ckpt assets/geca-xs-oct --data data/oct --output runs/limits
    python scripts/study_limits.py --plot runs/limits/points.jsonl --output docs/images/limits.png

Every point samples the labels of all validation images of a fold from the same starting noise; so each is a set of
pairs with the point where nothing is changed (25 steps of ddim, guidance 1.5), and OUTPUT/points.jsonl holds its KID
and the difference of the two by metrics/uncertainty.paired_difference, in each feature space. Two lines bound them:
real test images (the noise floor), and the same encoded and decoded (the ceiling: what a perfect generator of latents
would score). Features are kept: the same command goes on where it stopped.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.cli import Parser, integer, run
from core.errors import UserError
from core.files import make_folder, read_array, read_jsonl, write_array, write_text
from core.runtime import PRECISIONS
from core.schema import Number
from dataset import outside
from dataset.images import load_images
from dataset.root import read_split
from evaluation.features import open_features
from generation import load
from generation.sampling import sample_images
from metrics.uncertainty import kid_interval, paired_difference
from models import MODELS

PLAIN = {"steps": 25, "sampler": "ddim", "cfg_scale": 1.5}  # SamplingOptions where nothing is changed
KNOBS = {"cfg_scale": (1.0, 1.25, 2.0, 3.0, 5.0), "steps": (5, 10, 50, 100), "sampler": ("ddpm", "dpmpp"),
         "heredity": ("none", "below:500")}
CELLS = {"update_rate": (0.25, 0.375, 0.625, 0.75, 1.0), "automaton_steps": (6, 9, 10, 11, 13, 14, 16, 24)}
TITLES = {"cfg_scale": "guidance", "steps": "sampling steps", "sampler": "sampler", "heredity": "heredity",
          "update_rate": "update rate at inference", "automaton_steps": "automaton steps at inference"}
TICKS = (0, 50, 100, 200, 400, 800)  # of KID × 1e-3
SCORE = {"value": float, "interval": [float]}
POINT = {"model": str, "knob": str, "value": (str, float), "images": Number(), "kid": {str: SCORE},
         "difference?": {str: {"value": float, "interval": [float], "p": float}}}  # schema of a line


class Study:
    """What all points have in common."""

    def __init__(self, args):
        self.args, self.model = args, load(args.ckpt)
        self.split = read_split(args.data, f"val_{args.fold}")
        self.spaces = {name: open_features(name) for name in args.features}
        self.real = self.of_images("real", self.split.paths)

    def kept(self, name, images):
        """Features of `images()`, (n, D) for each space: from the file of this name, or computed and kept there."""
        found = {}
        for space, network in self.spaces.items():
            file = self.args.output / "features" / f"{name}-{space}.npy"
            if not file.is_file():
                images = images() if callable(images) else images
                write_array(file, network(images))
            found[space] = read_array(file, "remove it and measure again", 2)
        return found

    def of_images(self, name, paths):
        return self.kept(name, lambda: load_images(paths, self.model.image_size))

    def reconstructed(self, paths):
        """Images encoded and decoded, uint8 (n, H, W, 3)."""
        images = torch.as_tensor(load_images(paths, self.model.image_size))
        return np.concatenate([self.model.codec.decode(self.model.codec.moments(part)[0]) for part in images.split(32)])

    def sampled(self, knob, value):
        """Images with one thing changed, of all seeds: uint8 (seeds · n, H, W, 3)."""
        options, net = PLAIN | {"precision": self.args.precision}, self.model.net
        if knob in CELLS:
            attribute = "steps" if knob == "automaton_steps" else knob
            before = getattr(net, attribute)
            setattr(net, attribute, value)
        elif knob:
            options[knob] = value
        made = []
        for seed in range(self.args.seeds):
            batches = sample_images(net, self.model.codec, torch.as_tensor(self.split.labels),
                                    range(len(self.split)), self.model.cells, self.model.options(**options, seed=seed),
                                    self.model.device)
            made += [images for _, images in batches]
        if knob in CELLS:
            setattr(net, attribute, before)
        return np.concatenate(made)

    def line(self, knob, value, features, plain=None):
        """A line of points.jsonl; `plain`: the features where nothing is changed."""
        row = {"model": self.model.name, "knob": knob, "value": value, "images": len(next(iter(features.values()))),
               "kid": {space: kid_interval(self.real[space], made) for space, made in features.items()}}
        if plain:
            found = {space: paired_difference(self.real[space], made, plain[space])
                     for space, made in features.items()}
            row["difference"] = {space: {"value": d.value, "interval": [d.low, d.high], "p": d.p}
                                 for space, d in found.items()}
        print(json.dumps({"knob": knob, "value": value} | {f"KID[{space}]": round(1e3 * score["value"], 1)
                                                           for space, score in row["kid"].items()}), flush=True)
        return row

    def lines(self):
        """All lines, in order."""
        test = read_split(self.args.data, "test").paths
        yield self.line("floor", "test images", self.of_images("test", test))
        yield self.line("ceiling", "test images, encoded and decoded",
                        self.kept("test-decoded", lambda: self.reconstructed(test)))
        plain = self.kept("plain", lambda: self.sampled("", None))
        yield self.line("nothing", "plain", plain)
        cells = MODELS[self.model.name].any_grid
        for knob, values in {**KNOBS, **(CELLS if cells else {})}.items():
            for value in values if cells or knob != "heredity" else ():
                name = f"{knob}-{value}".replace(":", "-")
                made = self.kept(name, lambda knob=knob, value=value: self.sampled(knob, value))
                yield self.line(knob, value, made, plain)


def plot(file):
    """The lines of points.jsonl as a figure: a panel for each knob."""
    rows = read_jsonl(file, "remove it and measure again", POINT)
    knobs = [knob for knob in TITLES if any(row["knob"] == knob for row in rows)]
    space = next(iter(rows[0]["kid"]))
    special = {row["knob"]: row for row in rows if row["knob"] not in knobs}
    figure = Figure(figsize=(3.3 * -(-len(knobs) // 2), 6), layout="constrained")
    for axes, knob in zip(figure.subplots(2, -(-len(knobs) // 2), sharey=True).flat, knobs, strict=False):
        draw(axes, [row for row in rows if row["knob"] == knob], special, space)
        axes.set_title(TITLES[knob], fontsize=10)
        axes.set_ylabel(f"KID[{space}] × 1e-3", fontsize=8)
        axes.set_yscale("symlog", linthresh=TICKS[1])  # a KID near 0 may be negative, and one far off hides the rest
        axes.set_yticks(TICKS, map(str, TICKS))
        axes.margins(x=0.15)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=7)
    return figure


def draw(axes, rows, special, space):
    """One panel: KID, and the 95 % interval of its difference to where nothing is changed."""
    plain = special["nothing"]["kid"][space]["value"]
    places = [row["value"] if isinstance(row["value"], (int, float)) else str(row["value"]) for row in rows]
    middle = [1e3 * (plain + row["difference"][space]["value"]) for row in rows]
    ends = [[1e3 * (plain + end) for end in row["difference"][space]["interval"]] for row in rows]
    errors = [[m - low for m, (low, _) in zip(middle, ends, strict=True)],
              [high - m for m, (_, high) in zip(middle, ends, strict=True)]]
    axes.errorbar(places, middle, yerr=errors, fmt="o", color="tab:red", markersize=4, capsize=2)
    axes.axhline(1e3 * plain, color="tab:red", lw=1, label="nothing changed")
    for name, style, label in (("ceiling", ":", "real, through the autoencoder"), ("floor", "--", "real")):
        axes.axhline(1e3 * special[name]["kid"][space]["value"], color="grey", linestyle=style, lw=1, label=label)


def main():
    args = parser().parse_args()
    if args.plot:
        make_folder(args.output.parent, "--output")
        plot(args.plot).savefig(args.output, dpi=110)
        return
    if not args.data or not args.ckpt:
        raise UserError("found neither --plot nor --ckpt with --data; give one of them")
    make_folder(args.output / "features", "--output")
    rows = list(Study(args).lines())
    write_text(args.output / "points.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def parser():
    p = Parser(__doc__)
    p.add_argument("--ckpt", type=Path, metavar="RUN", help="run folder or checkpoint")
    p.add_argument("--data", type=Path, metavar="ROOT", help="data root")
    outside.add_flag(p)
    p.add_argument("--fold", type=integer(0), default=0, help="whose validation images are the real ones")
    p.add_argument("--seeds", type=integer(1), default=2, help="of sampling, pooled")
    p.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the denoiser")
    p.add_argument("--features", nargs="+", default=["retina", "imagenet-lite"], help="feature spaces of evaluate.py")
    p.add_argument("--output", type=Path, required=True, metavar="PATH", help="folder for all of it; the picture")
    p.add_argument("--plot", type=Path, metavar="FILE", help="draw the lines of points.jsonl")
    return p


if __name__ == "__main__":
    run(main)
