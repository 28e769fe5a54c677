"""A set of images: the files, and what is known of each of them."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from core.random import generator
from dataset import contents
from dataset.patients import same_name


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """n images. What is None is unknown; everything else about single images has n entries, in the same order.

    A split of a data root (`dataset.root.read_split`) knows all of it, a folder of PNG files only its `paths`.
    """

    paths: tuple  # n image files
    labels: np.ndarray | None = None  # (n, K) float32, 0 or 1
    label_names: tuple | None = None  # K names
    filenames: tuple | None = None  # n names as their CSV has them: relative to `folder`, or absolute
    patients: tuple | None = None  # n names; a file name where the CSV does not name the patient
    eyes: tuple | None = None  # n names: the same for images of one eye, different for any two eyes of the data set
    csv: Path | None = None  # the table that lists them
    folder: Path | None = None
    name: str = ""  # in tables and messages
    about: dict = field(default_factory=dict)  # generated images: model, seed, steps, ... as the sampler wrote them

    def __len__(self):
        return len(self.paths)

    def take(self, indices, name=None):
        """The images of these indices, in their order, as a set."""
        def chosen(column):
            return None if column is None else tuple(column[i] for i in indices)

        return replace(self, paths=chosen(self.paths), labels=None if self.labels is None else self.labels[indices],
                       filenames=chosen(self.filenames), patients=chosen(self.patients), eyes=chosen(self.eyes),
                       name=name or self.name)

    def split_at_random(self, count, *seed):
        """`count` images drawn at random and the rest, both in their old order."""
        order = torch.randperm(len(self), generator=generator(*seed)).tolist()
        return self.take(sorted(order[:count])), self.take(sorted(order[count:]))

    @property
    def digest(self):
        """SHA-256 over the contents of the files, in their order."""
        return contents.digest(self.paths)

    @property
    def known_patients(self):
        """The patients as they are compared (`same_name`), without those that the CSV does not name."""
        return {same_name(patient) for patient in {*self.patients} - {*self.filenames}} if self.patients else set()
