"""Watch an image grow: its life as an animation and as a still; and damage it on its way.

    python grow.py --ckpt assets/geca-xs-oct/geca-xs-oct.pt --labels DME --preset small-geca-xs
    python grow.py --ckpt assets/geca-xs-oct/geca-xs-oct.pt --labels DME --preset small-geca-xs --grid 8 20
    python grow.py --ckpt RUN1 RUN2 --labels DME --damage hole

Writes OUTPUT/growth.webp and growth.gif (animated), strip.png and strip.pdf (still), image.png: the noisy image and
what the model predicts from it over diffusion time, its two guidance copies; of a cellular automaton also the hidden
channels, and the steps of one call with the cells that fire, the light cones of the seed cell and of a cell of your
choice, and that cell's attention. The image is the one that sample_ddp.py makes of the same flags as number --number.

With --damage, cells lose their noisy image and their state at the diffusion step --damage-at, and sampling goes on;
OUTPUT/recovery.webp, .gif, .png, .pdf then show damaged and undamaged lives of every checkpoint, and recovery.json says
how far all images of --labels and --count found back. docs/GROWTH.md explains the pictures.
"""

import time
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from core import runtime
from core.cli import Parser, integer, run
from core.errors import UserError
from core.files import make_folder, write_atomically, write_json
from core.text import aligned
from dataset.pictures import caption
from evaluation import growth as pictures
from evaluation.features import open_features
from evaluation.recovery import in_pixels, recovery
from generation import growth
from generation.damage import KINDS, Damage, damaged_cells
from generation.output import write_image
from generation.sampling import SamplingOptions, sample_images
from generation.trained import TrainedModel, names_of, open_trained
from presets import presets_of
from sample_ddp import RELEASED, add_label_flags, add_sampling_flags, asked_labels, options_of, read_checkpoint


class Generator(NamedTuple):
    """One checkpoint, and what is asked of it."""

    trained: TrainedModel
    grid: tuple  # (rows, columns) of cells
    options: SamplingOptions
    labels: torch.Tensor  # (N, K)
    asked: str  # labels of the shown image, in words

    @property
    def name(self):
        """Of the model."""
        return self.trained.name

    @property
    def remark(self):
        """What a picture must say of the grid, where it is not that of the training."""
        (h, w), side = self.grid, self.trained.cells
        return "" if self.grid == (side, side) else (
            f"Not the grid of the training: {self.name} was trained on {side} × {side} cells and has never seen "
            f"{h} × {w}.")


def main():
    args = parse_args()
    runtime.alone("grow.py")
    started = time.monotonic()
    generators = [open_generator(args, path) for path in args.ckpt]
    make_folder(args.output, "--output")
    (watch_recovery if args.damage else watch_growth)(args, generators)
    print(f"{args.output}: {time.monotonic() - started:.0f} s")


def parse_args():
    p = Parser(__doc__, RELEASED, presets=presets_of("sample"))
    p.add_argument("--ckpt", type=Path, required=True, nargs="+", metavar="RUN",
                   help="run folder, or file: checkpoint, ours or published, or weights; several with --damage")
    add_label_flags(p)
    p.add_argument("--number", type=integer(0), default=0, help="which of the images of --labels and --count is shown, "
                   "from 0, as sample_ddp.py numbers them")
    p.add_argument("--output", type=Path, default="growth", metavar="DIR", help="where the pictures go")
    p.add_argument("--grid", type=integer(1, 1024), nargs=2, metavar=("H", "W"), help="rows and columns of cells, for "
                   "a cellular automaton (default: as trained)")
    p.add_argument("--cell", type=integer(0), nargs=2, metavar=("Y", "X"), help="row and column, from 0, of the cell "
                   "whose light cone and attention are shown (default: a quarter from the upper left)")
    p.add_argument("--inside", type=integer(0, 999), default=500, metavar="T", help="diffusion step whose call the "
                   "strip shows step by step: the nearest that was visited")
    p.add_argument("--moments", type=integer(2), default=25, help="diffusion steps that are recorded, at most")
    p.add_argument("--slow", type=integer(0), default=5, metavar="N", help="calls of which the animation shows every "
                   "step")
    p.add_argument("--damage", choices=KINDS, help="cells that are damaged: half the height and width in the middle, "
                   "the right half, or every second one at random")
    p.add_argument("--damage-at", type=integer(0, 999), nargs="+", default=[250], metavar="T", help="diffusion steps "
                   "at which they are, each in a run of its own; the pictures show the first")
    add_sampling_flags(p)
    args = p.parse_args()
    if not args.labels:
        raise UserError("--labels: is missing; name what the image shall show, or null for an image of any kind")
    if len(args.ckpt) > 1 and not args.damage:
        raise UserError(f"--ckpt: found {len(args.ckpt)}, expected one (several are compared with --damage)")
    if args.damage and args.sampler == "dpmpp":
        raise UserError("--damage: not with --sampler dpmpp, whose memory of its last prediction is not damaged; give "
                        "ddim or ddpm")
    return args


def open_generator(args, path):
    """The Generator of one checkpoint, all flags checked."""
    args = Namespace(**{**vars(args), "ckpt": path})
    checkpoint, _ = read_checkpoint(args)
    options, names = options_of(args, checkpoint), names_of(checkpoint)
    labels = asked_labels(args, names)
    if args.number >= len(labels):
        raise UserError(f"--number {args.number}: --labels and --count ask for {len(labels)} images, expected 0 to "
                        f"{len(labels) - 1}")
    process = runtime.start(args.precision)
    trained = open_trained(args.ckpt, checkpoint, args.weights, process.device)
    grid = trained.grid_for(args.grid)
    trained.check_cell(args.cell, grid)
    return Generator(trained, grid, options, torch.as_tensor(labels), caption(labels[args.number], names))


def life_of(args, g, before_step=None):
    """The Life of the shown image."""
    times = growth.evenly(growth.visited(g.options), args.moments)
    return growth.live(g.trained.net, g.trained.codec, g.labels[[args.number]], args.number, g.grid, g.options,
                       g.trained.device, times, args.cell, before_step)


def watch_growth(args, generators):
    """growth.webp, growth.gif, strip.png, strip.pdf and image.png of the only checkpoint."""
    (g,) = generators
    life = life_of(args, g)
    write_image(args.output / "image.png", life.image)
    write_page(args.output / "strip", pictures.strip(life, g.asked, life.nearest(args.inside), note=g.remark))
    write_animation(args.output / "growth", pictures.frames(life, g.asked, args.slow, g.remark))


def watch_recovery(args, generators):
    """recovery.json, and recovery.* that show the first of --damage-at."""
    rows, lives = [], []
    for g in generators:
        mask = damaged_cells(args.damage, g.grid, args.global_seed)
        rows += measured(args, g, mask)
        damage = Damage(mask, args.damage_at[0], args.global_seed, [args.number])
        damaged = life_of(args, g, damage)
        lives.append(pictures.Pair(g.name, life_of(args, g), damaged, mask.numpy(), damage.at_step))
    write_json(args.output / "recovery.json", rows)
    notes = " ".join(dict.fromkeys(g.remark for g in generators if g.remark))
    write_page(args.output / "recovery", pictures.recovery_strip(lives, args.damage, notes))
    write_animation(args.output / "recovery", pictures.recovery_frames(lives, args.damage, notes))
    print(aligned([("model", "damage", "inside", "(another)", "outside", "(another)", "features", "(another)"),
                   *(table_row(row) for row in rows)]))


def measured(args, g, mask):
    """Rows of recovery.json: all images, damaged at each of --damage-at."""
    ids = [*range(len(g.labels))]

    def sampled(numbers, at=None):
        """uint8 (N, H, W, 3), damaged at t = `at` unless that is None; a Damage knows one batch."""
        parts = []
        for start in range(0, len(ids), g.options.batch_size):
            part = slice(start, start + g.options.batch_size)
            damage = None if at is None else Damage(mask, at, args.global_seed, numbers[part])
            parts += [images for _, images in sample_images(g.trained.net, g.trained.codec, g.labels[part],
                                                            numbers[part], g.grid, g.options, g.trained.device,
                                                            before_step=damage)]
        return np.concatenate(parts)

    features, pixels = open_features("retina", g.trained.device), in_pixels(mask.numpy(), g.trained.codec.factor)
    undamaged, others = sampled(ids), sampled([i + len(ids) for i in ids])
    about = {"model": g.name, "damage": args.damage, "images": len(ids), "grid": g.grid, "cells": int(mask.sum()),
             "feature_space": features.identity}
    return [{**about, "at": at, **recovery(sampled(ids, at), undamaged, others, pixels, features)}
            for at in args.damage_at]


def table_row(row):
    """A row of the printed table."""
    values = [f"{row[key + end]:.3f}" if key == "features" else f"{row[key + end]:.1f}"
              for key in ("inside", "outside", "features") for end in ("", "_of_another")]
    return row["model"], f"{row['damage']} at t = {row['at']}", *values


def write_page(path, page):
    """A page as path.png and path.pdf."""
    for kind in ("png", "pdf"):
        write_atomically(path.with_suffix(f".{kind}"), lambda to, kind=kind: pictures.save_page(to, page, kind))


def write_animation(path, frames):
    """Frames as path.webp and path.gif."""
    for kind in ("webp", "gif"):
        write_atomically(path.with_suffix(f".{kind}"), lambda to, kind=kind: pictures.save_animation(to, frames, kind))


if __name__ == "__main__":
    run(main, runtime.stop)
