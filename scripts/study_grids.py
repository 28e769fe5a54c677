"""Held-out error of cellular automata on grids they were not trained on: whole wide scans; docs/GROWTH.md.

    python scripts/study_grids.py --data data/oct --ckpt RUN1/checkpoints/last_ckpt.pt RUN2/checkpoints/last_ckpt.pt

The validation images of a fold, short side reduced to the size of the training, are encoded twice: the central square,
and as wide as all of them are. Printed is the squared error of ε (x 1e-4) on both, of the same diffusion steps, with as
much noise drawn anew per cell. The wide one holds more dark background: compare columns, not rows of one column.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.cli import Parser, integer, run
from core.errors import UserError
from core.text import aligned
from dataset import outside
from dataset.images import load_image
from dataset.root import read_split
from dataset.vae import open_codec
from generation import checkpoint as checkpoints
from models import MODELS
from scripts.study_learning import held_out_error


def main():
    p = Parser(__doc__)
    p.add_argument("--data", type=Path, required=True, metavar="ROOT", help="data root")
    outside.add_flag(p)
    p.add_argument("--ckpt", type=Path, required=True, nargs="+", metavar="FILE", help="cellular automata")
    p.add_argument("--fold", type=integer(0), default=0, help="measure on val_{fold}")
    args = p.parse_args()
    split, rows = read_split(args.data, f"val_{args.fold}"), []
    for file in args.ckpt:
        checkpoint = checkpoints.load(file)
        if not MODELS[checkpoint.model_args["model"]].any_grid:
            raise UserError(f"--ckpt {file}: holds a {checkpoint.model_args['model']}, which works on one grid; give a "
                            "GeCA")
        trained, model = checkpoint.args, checkpoints.build(checkpoint, checkpoint.default_kind)
        codec = open_codec(trained["vae"], trained["image_space"])
        wide = strips(split.paths, trained["image_size"], codec.factor)  # (n, H, W, 3)
        left = (wide.shape[2] - wide.shape[1]) // 2
        for images in (wide[:, :, left:left + wide.shape[1]], wide):
            latents, _ = codec.moments(images)
            error, bins = held_out_error(model, latents, torch.as_tensor(split.labels))
            rows.append((str(file), model.position_code, " x ".join(map(str, latents.shape[2:])), f"{1e4 * error:.0f}",
                         " ".join(f"{1e4 * value:.0f}" for value in bins)))
    print(aligned([("checkpoint", "position code", "cells", "error", "in five bins of t"), *rows]))


def strips(paths, height, factor):
    """Images with this height, as wide as the narrowest, the centre of each: uint8 (n, height, W, 3), W whole cells."""
    images = []
    for path in paths:
        image = Image.fromarray(load_image(path))
        width = round(image.width * height / image.height)
        images.append(np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)))
    width = min(image.shape[1] for image in images) // factor * factor
    starts = [(image.shape[1] - width) // 2 for image in images]
    return np.stack([image[:, start:start + width] for image, start in zip(images, starts, strict=True)])


if __name__ == "__main__":
    run(main)
