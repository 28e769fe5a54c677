"""A trained model, ready to make images: its checkpoint, its net, and the autoencoder that it was trained with.

The scripts and `generation.load` come to it in the same steps, so that the same seed gives the same image in both.
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

from core import runtime
from core.errors import UserError
from core.progress import progress_bar
from dataset.vae import cells_per_side, open_codec, same_latents
from generation import checkpoint as checkpoints
from generation import growth
from generation.checkpoint import Checkpoint
from generation.labels import between, values_of
from generation.sampling import SamplingOptions, sample_images
from models import MODELS
from presets import PAPER_SPACE

UNSAID = {**PAPER_SPACE, "image_space": False, "multi_scale": False}  # for files that do not say
KNOWN = ("model", "num_classes", "in_channels", "fold", *UNSAID)  # flags that a checkpoint answers


def read(path, said, weights="ema"):
    """The checkpoint in a file, after checking what is `said` of it (name of KNOWN -> value, None where nothing is).

    What the file leaves open, `said` answers, and what that leaves open, a default; the second value names those that
    were taken so. Raises UserError where the two disagree, or the file has no such `weights`.
    """
    checkpoint = checkpoints.load(path)
    trained = {**dict.fromkeys(KNOWN), **checkpoint.args}
    for name in KNOWN:
        checkpoints.check_flag(path, name, said.get(name), trained[name])
    unsaid = [name for name in UNSAID if trained[name] is None]
    for name in unsaid:
        trained[name] = UNSAID[name] if said.get(name) is None else said[name]
    if weights not in checkpoint.kinds:
        raise UserError(f"--weights {weights}: {path} holds {', '.join(checkpoint.kinds)}; give one of them")
    return replace(checkpoint, args=trained), unsaid


def names_of(checkpoint):
    """Its K label names; label_0, label_1, ... where it names none, as published files do."""
    return checkpoint.label_names or [f"label_{k}" for k in range(checkpoint.model_args["num_classes"])]


def options_for(checkpoint, **options):
    """SamplingOptions for a checkpoint, which says itself whether it was trained on several grids."""
    return SamplingOptions(**options, multi_scale=checkpoint.args["multi_scale"])


@dataclass(frozen=True)
class TrainedModel:
    """A generator of images. `sample`, `walk` and `grow` take the names and values of SamplingOptions as options:

    steps (250), sampler ("ddpm", "ddim" or "dpmpp"), cfg_scale (1.5), seed (0), batch_size (32), ...
    """

    path: Path  # of the checkpoint
    checkpoint: Checkpoint
    weights: str  # which of its weights: "ema", "model" or "ema:DECAY"
    net: torch.nn.Module
    codec: object  # of dataset/vae.py
    cells: int  # per side of the grid
    device: torch.device

    def __repr__(self):
        return (f"{self.name} of {self.path} ({self.weights} weights): {self.image_size} px, labels "
                f"{' '.join(self.labels)}")

    @property
    def name(self):
        """Of the model: GeCA-S, DiT-S, ..."""
        return self.checkpoint.model_args["model"]

    @property
    def labels(self):
        """The names of the labels that it knows."""
        return list(names_of(self.checkpoint))

    @property
    def image_size(self):
        """Side of an image, in pixels."""
        return self.checkpoint.args["image_size"]

    def sample(self, labels=None, n=1, first=0, progress=False, **options):
        """Images with these labels -> uint8 (n, H, W, 3).

        labels: ["DR", "FLD"], "DR,FLD", {"DR": 1, "FLD": 0.5} for soft ones, or None for an image of any kind.
        They are the images number `first`, first + 1, ... of their seed, the same as those of these numbers that
        sample_ddp.py makes. Raises UserError.
        """
        rows = np.tile(values_of(labels, self.labels, f"labels {labels}"), (_count("n", n), 1))
        return self._sampled(rows, range(first, first + n), progress, options)

    def walk(self, start, end, n=8, number=0, progress=False, **options):
        """n images on the way from the labels `start` to the labels `end` -> uint8 (n, H, W, 3).

        Everything random is that of the image `number`: only the labels change. Raises UserError.
        """
        ends = (values_of(labels, self.labels, f"labels {labels}") for labels in (start, end))
        return self._sampled(between(*ends, _count("n", n, 2)), [number] * n, progress, options)

    def _sampled(self, rows, ids, progress, options):
        """Images of the labels rows (n, K); `ids` say whose draws they are made with."""
        options = self.options(**options)
        with progress_bar(total=len(rows) * options.steps, unit="image-steps", title="sampling",
                          active=progress) as bar:
            batches = sample_images(self.net, self.codec, torch.as_tensor(rows), [*ids], self.cells, options,
                                    self.device, bar)
            return np.concatenate([images for _, images in batches])

    def grow(self, labels=None, number=0, moments=25, cell=None, grid=None, before_step=None, **options):
        """The life of the image `number` of these labels, recorded at so many diffusion steps -> growth.Life.

        evaluation/growth.py draws it, as grow.py does. cell (row, column): whose light cone and attention are recorded;
        grid (rows, columns): another than that of the training, for an automaton; `before_step` as in
        generation/sampling.py. Raises UserError.
        """
        options, grid = self.options(**options), self.grid_for(grid)
        self.check_cell(cell, grid)
        row = torch.as_tensor(values_of(labels, self.labels, f"labels {labels}"))[None]
        times = growth.evenly(growth.visited(options), _count("moments", moments, 2))
        return growth.live(self.net, self.codec, row, number, grid, options, self.device, times, cell, before_step)

    def options(self, **options):
        """The SamplingOptions of these names and values; the process is set to their precision. Raises UserError."""
        known = [f.name for f in fields(SamplingOptions) if f.name != "multi_scale"]
        for name in options:
            if name not in known:
                raise UserError(f"{name}: no such option, expected some of {', '.join(known)}")
        options = options_for(self.checkpoint, **options)
        runtime.allow(options.precision, self.device)
        return options

    def grid_for(self, asked=None):
        """(rows, columns) that are asked for, or those of the training. Raises UserError where it knows but one."""
        if self.checkpoint.args["multi_scale"]:
            raise UserError(f"{self.path}: was trained with --multi-scale; lives are recorded on one grid only")
        if asked and not MODELS[self.name].any_grid:
            raise UserError(f"--grid {asked[0]} {asked[1]}: {self.name} works on {self.cells} x {self.cells} only; "
                            "give a cellular automaton (GeCA-S, GeCA-XS) or leave it out")
        return tuple(asked or (self.cells, self.cells))

    def check_cell(self, cell, grid):
        """Refuse a cell (row, column) of a model without cells, or outside of the grid."""
        if cell and not MODELS[self.name].any_grid:
            raise UserError(f"--cell {cell[0]} {cell[1]}: {self.name} is no cellular automaton; leave it out")
        if cell and not (0 <= cell[0] < grid[0] and 0 <= cell[1] < grid[1]):
            raise UserError(f"--cell {cell[0]} {cell[1]}: outside of the grid of {grid[0]} x {grid[1]} cells; expected "
                            f"Y from 0 to {grid[0] - 1} and X from 0 to {grid[1] - 1}")


def _count(name, value, low=1):
    if value < low:
        raise UserError(f"{name} {value}: expected at least {low}")
    return value


def open_trained(path, checkpoint, weights, device=None):
    """The TrainedModel of a checkpoint that `read` has read, on a GPU where there is one unless `device` is given.

    Raises UserError where its autoencoder is another than that of the training.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    codec = _open_codec(path, checkpoint, device)
    cells = _check_fit(path, checkpoint, codec)
    net = checkpoints.build(checkpoint, weights).to(device)
    return TrainedModel(Path(path), checkpoint, weights, net, codec, cells, device)


def _open_codec(path, checkpoint, device):
    """The very autoencoder that the checkpoint was trained with."""
    trained = checkpoint.args
    codec = open_codec(trained["vae"], trained["image_space"], device)
    if checkpoint.codec is not None and not same_latents(codec.identity, checkpoint.codec):
        raise UserError(f"--vae {trained['vae']}: is {codec.identity}, but {path} was trained with "
                        f"{checkpoint.codec}; restore that VAE")
    return codec


def _check_fit(path, checkpoint, codec):
    """Refuse an image size or autoencoder that a checkpoint cannot be run with -> cells per side of the grid.

    Foreign files do not say theirs.
    """
    trained, sizes = checkpoint.args, checkpoint.model_args
    cells = cells_per_side(trained["image_size"], codec)
    if sizes["in_channels"] != codec.channels:
        raise UserError(f"--vae {trained['vae']}: has {codec.channels} channels, {path} was trained on "
                        f"{sizes['in_channels']}; give the VAE it was trained with")
    if not MODELS[sizes["model"]].any_grid and cells != sizes.get("input_size", cells):
        raise UserError(f"--image-size {trained['image_size']}: {cells} cells per side, {path} works on "
                        f"{sizes['input_size']}; give --image-size {sizes['input_size'] * codec.factor}")
    return cells
