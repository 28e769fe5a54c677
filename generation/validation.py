"""Validation during training: sample, score, and show real images beside generated ones."""

import copy

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm

from core.errors import UserError
from core.files import write_atomically
from core.random import generator
from dataset import pictures
from dataset.images import load_images
from evaluation.features import open_features
from generation.sampling import sample_images
from metrics.kid import SUBSETS, kid, polynomial_mmd


class Validation:
    """Samples with the labels of validation images, scored by KID against all validation images of the fold."""

    def __init__(self, args, accelerator, codec, split):
        self.args, self.accelerator, self.codec, self.split = args, accelerator, codec, split
        if len(split) < 2:
            raise UserError(f"{split.path}: holds one image, KID needs two; prepare more patients or fewer folds")
        self.features = open_features(args.features, accelerator.device)
        self.real = load_images(split.image_paths, args.image_size, args.num_workers)
        self.real_features = self.features(self.real)
        chosen = torch.randperm(len(split), generator=generator(args.global_seed, "validation"))
        self.chosen = chosen[: args.val_samples].tolist()

    def __call__(self, training, folder):
        """Sample -> KID; writes the grid samples/epoch-{epoch}.png."""
        rank, processes, args = self.accelerator.process_index, self.accelerator.num_processes, self.args
        ids = list(range(len(self.chosen)))[rank::processes]
        labels = torch.as_tensor(self.split.labels[self.chosen])
        if args.validation_labels == "null":
            labels = torch.zeros_like(labels)
        net = training.ema
        if args.validation_weights == "model":  # in a copy: the net itself would compute in --mixed_precision
            net = copy.deepcopy(net)
            net.load_state_dict(self.accelerator.unwrap_model(training.net).state_dict())
        options = {"steps": args.num_sampling_steps, "batch_size": 32, "cfg_scale": args.cfg_scale,
                   "cells": training.model_args["input_size"], "multi_scale": args.multi_scale,
                   "seed": args.global_seed, "device": self.accelerator.device, "unguided_state": args.unguided_state}
        with tqdm(total=len(ids) * args.num_sampling_steps, desc="validation", unit="image-step", mininterval=5,
                  leave=False, disable=rank != 0) as bar:
            batches = sample_images(net, self.codec, labels[ids], ids, progress=bar, **options)
            made = [pair for batch in batches for pair in zip(*batch, strict=True)]
        made = gather_object(made)
        images = np.stack([image for _, image in sorted(made, key=lambda pair: pair[0])])
        if rank == 0:
            self.write_grid(images, folder / "samples" / f"epoch-{training.epoch:05d}.png")
        found = [self.kid(self.features(images), training.validated) if rank == 0 else None]
        return broadcast_object_list(found)[0]  # one number: the processes must agree on what is best

    def kid(self, features, before):
        """KID of generated features (n, D); `before` are those of earlier validations, to which it adds these.

        `accumulated` is the published metric that is never reset (train.py:203, 434-436): all generated images since
        the start, against the same few real ones counted as often, over 100 subsets of ⌊n / 4⌋.
        """
        if self.args.validation_kid == "fresh":
            return float(polynomial_mmd(self.real_features, features))
        before.append(torch.as_tensor(features))
        real = np.tile(self.real_features[self.chosen], (len(before), 1))
        return kid(real, np.concatenate(before), max(2, len(features) // 4), SUBSETS, self.args.global_seed)[0]

    def write_grid(self, images, path):
        """Real images above generated ones with the same labels."""
        count = min(len(images), 16)
        real = self.real[self.chosen[:count]]
        captions = [pictures.caption(self.split.labels[i], self.split.label_names) for i in self.chosen[:count]]
        path.parent.mkdir(exist_ok=True)
        picture = pictures.pairs(real, images[:count], captions)
        write_atomically(path, lambda temporary: picture.save(temporary, format="PNG"))
