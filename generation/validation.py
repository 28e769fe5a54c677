"""Validation during training: sample, score, and show real images beside generated ones."""

from dataclasses import dataclass

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm

from core.errors import UserError
from core.files import write_atomically
from core.random import generator
from dataset import pictures
from dataset.images import load_images
from generation.sampling import SamplingOptions, sample_images
from metrics.kid import SUBSETS, kid, polynomial_mmd


@dataclass(frozen=True)
class ValidationOptions:
    """What is sampled and how it is scored."""

    sampling: SamplingOptions
    samples: int = 24  # images
    labels: str = "own"  # those of validation images, or "null": none at all, as published
    score: str = "fresh"  # KID against all validation images, or "accumulated": never reset, as published


class Validation:
    """Samples with the labels of validation images, scored by KID against all validation images of the fold.

    `features(uint8 images (n, H, W, 3)) -> (n, D)` is the feature space of the KID; `cells` the side of the grid.
    """

    def __init__(self, split, features, codec, image_size, cells, options, accelerator, workers=4):
        if len(split) < 2:
            raise UserError(f"{split.csv}: holds one image, KID needs two; prepare more patients or fewer folds")
        self.split, self.features, self.codec, self.cells = split, features, codec, cells
        self.options, self.accelerator = options, accelerator
        self.real = load_images(split.paths, image_size, workers)
        self.real_features = features(self.real)
        chosen = torch.randperm(len(split), generator=generator(options.sampling.seed, "validation"))
        self.chosen = chosen[: options.samples].tolist()

    def __call__(self, net, picture, before):
        """Sample from `net`, write the grid of images to the file `picture` -> KID, the same on all processes.

        `before`: features of the samples of earlier validations; with score "accumulated" these are added to it.
        """
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        ids = list(range(len(self.chosen)))[rank::processes]
        labels = torch.as_tensor(self.split.labels[self.chosen])
        if self.options.labels == "null":
            labels = torch.zeros_like(labels)
        sampling = self.options.sampling
        with tqdm(total=len(ids) * sampling.steps, desc="validation", unit="image-step", mininterval=5, leave=False,
                  disable=rank != 0) as bar:
            batches = sample_images(net, self.codec, labels[ids], ids, self.cells, sampling, self.accelerator.device,
                                    bar)
            made = gather_object([pair for batch in batches for pair in zip(*batch, strict=True)])
        images = np.stack([image for _, image in sorted(made, key=lambda pair: pair[0])])
        if rank == 0:
            self.write_grid(images, picture)
        score = [self.kid(self.features(images), before) if rank == 0 else None]
        return broadcast_object_list(score)[0]  # one number: the processes must agree on what is best

    def kid(self, features, before):
        """KID of generated features (n, D).

        "accumulated" is the published metric that is never reset (train.py:203, 434-436): all generated images since
        the start, against the same few real ones counted as often, over 100 subsets of ⌊n / 4⌋.
        """
        if self.options.score == "fresh":
            return float(polynomial_mmd(self.real_features, features))
        before.append(torch.as_tensor(features))
        real = np.tile(self.real_features[self.chosen], (len(before), 1))
        return kid(real, np.concatenate(before), max(2, len(features) // 4), SUBSETS, self.options.sampling.seed)[0]

    def write_grid(self, images, path):
        """Real images above generated ones with the same labels."""
        count = min(len(images), 16)
        real = self.real[self.chosen[:count]]
        captions = [pictures.caption(self.split.labels[i], self.split.label_names) for i in self.chosen[:count]]
        path.parent.mkdir(exist_ok=True)
        picture = pictures.pairs(real, images[:count], captions)
        write_atomically(path, lambda temporary: picture.save(temporary, format="PNG"))
