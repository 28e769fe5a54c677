"""Validation during training: sample, score, and show real images beside generated ones."""

import math
import time
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object

from core.errors import UserError
from core.files import write_atomically
from core.progress import progress_bar
from core.random import generator
from dataset import pictures
from dataset.images import load_images
from generation.sampling import SamplingOptions, sample_images
from metrics.kid import SUBSETS, kid, polynomial_mmd

FLOOR_SETS = 8  # sets of real images, each as large as the samples, that the noise floor is measured with
TRIAL = 3  # steps of sampling that are timed; the first is left out


@dataclass(frozen=True)
class ValidationOptions:
    """What is sampled and how it is scored."""

    sampling: SamplingOptions
    samples: int = 24  # images
    labels: str = "own"  # those of validation images, or "null": none at all, as published
    score: str = "fresh"  # KID against all validation images, or "accumulated": never reset, as published


class TimeIsUpError(Exception):
    """Thrown out of sampling that has no time left."""


class Validation:
    """Samples with the labels of validation images, scored by KID against all validation images of the fold.

    `features(uint8 images (n, H, W, 3)) -> (n, D)` is the feature space of the KID; `cells` the side of the grid;
    `training`: the images that the net is trained on, for the noise floor.
    """

    def __init__(self, split, training, features, codec, image_size, cells, options, accelerator, workers=4):
        if len(split) < 2:
            raise UserError(f"{split.csv}: holds one image, KID needs two; prepare more patients or fewer folds")
        self.split, self.training, self.features, self.codec, self.cells = split, training, features, codec, cells
        self.options, self.accelerator, self.load = options, accelerator, (image_size, workers)
        self.real = load_images(split.paths, *self.load)
        self.real_features = features(self.real)
        chosen = torch.randperm(len(split), generator=generator(options.sampling.seed, "validation"))
        self.chosen = chosen[: options.samples].tolist()

    def __call__(self, net, before, deadline=math.inf):
        """Sample from `net` -> (KID, uint8 images (n, H, W, 3)), or None where the deadline came first.

        The KID is the same on all processes, the images are there on the first. `before`: features of the samples of
        earlier validations; with score "accumulated" these are added to it. `deadline`: of time.monotonic().
        """
        made = gather_object(self.share(net, self.options.sampling, deadline))
        images = np.stack([image for _, image in sorted(made, key=lambda pair: pair[0])]) if made else made
        first = self.accelerator.is_main_process
        score = self.kid(self.features(images), before) if first and len(images) == len(self.chosen) else None
        score = broadcast_object_list([score])[0]  # one number: the processes must agree on what is best
        return None if score is None else (score, images)

    def share(self, net, sampling, deadline=math.inf, first=math.inf, on_step=None):
        """What this process samples: (number, image) pairs, none once time is up.

        For a trial: of the `first` images only, without a bar, with `on_step()` called after each step.
        """
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        ids = list(range(min(len(self.chosen), first)))[rank::processes]
        labels = torch.as_tensor(self.split.labels[self.chosen])
        if self.options.labels == "null":
            labels = torch.zeros_like(labels)

        def watch(i, prediction):
            if on_step:
                on_step()
            if time.monotonic() > deadline:
                raise TimeIsUpError

        with progress_bar(total=len(ids) * sampling.steps, unit="image-steps", title="validation", leave=False,
                          active=rank == 0 and on_step is None) as bar:
            batches = sample_images(net, self.codec, labels[ids], ids, self.cells, sampling, self.accelerator.device,
                                    bar, watch)
            try:
                return [pair for batch in batches for pair in zip(*batch, strict=True)]
            except TimeIsUpError:  # the others wait for what this process has
                return []

    def seconds(self, net):
        """How long a validation will take, from a few steps of one batch; the longest of all processes."""
        started, steps = time.monotonic(), []
        sampling, batch = self.options.sampling, self.options.sampling.batch_size * self.accelerator.num_processes
        trial = replace(sampling, steps=min(TRIAL, sampling.steps))
        images = self.share(net, trial, first=batch, on_step=lambda: steps.append(time.monotonic()))
        self.features(np.stack([image for _, image in images] or self.real[:1]))
        whole = time.monotonic() - started
        if len(steps) > 1:
            whole += (steps[-1] - steps[0]) / (len(steps) - 1) * (sampling.steps - trial.steps)
        longest = self.accelerator.gather(torch.tensor([whole], device=self.accelerator.device)).max().item()
        return longest * math.ceil(len(self.chosen) / batch)

    @cached_property
    def floor(self):
        """Mean and standard deviation of the KID of real training images, as many at a time as are sampled.

        What a perfect generator would score. None where there are too few of them, or with score "accumulated".
        """
        n, (size, workers) = len(self.chosen), self.load
        sets = min(FLOOR_SETS, len(self.training) // n)
        if sets < 2 or self.options.score != "fresh":
            return None
        order = torch.randperm(len(self.training), generator=generator(self.options.sampling.seed, "floor"))
        images = load_images([self.training.paths[i] for i in order[:sets * n].tolist()], size, workers)
        kids = [polynomial_mmd(self.real_features, self.features(part)) for part in np.split(images, sets)]
        return float(np.mean(kids)), float(np.std(kids, ddof=1))

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
        """Write real images above generated ones with the same labels -> the picture, uint8 (H, W, 3)."""
        count = min(len(images), 16)
        real = self.real[self.chosen[:count]]
        captions = [pictures.caption(self.split.labels[i], self.split.label_names) for i in self.chosen[:count]]
        path.parent.mkdir(exist_ok=True)
        picture = pictures.pairs(real, images[:count], captions)
        write_atomically(path, lambda temporary: picture.save(temporary, format="PNG"))
        return np.asarray(picture)
