"""The sets of images of one evaluation: those of a fold, the noise floor, and what samplers made; all checked."""

from dataclasses import dataclass, replace
from pathlib import Path

from core.errors import UserError
from dataset.images import check_images
from dataset.samples import check_size, open_generated, open_real
from dataset.sets import LabelledImages
from metrics.kid import check_subset_size
from metrics.prdc import NEAREST


@dataclass(frozen=True)
class Sets:
    """Real images of one fold and the generated sets that are compared with them."""

    real: LabelledImages  # the validation images
    training: LabelledImages  # what the generators were trained on
    floor: LabelledImages  # real images scored as if they were generated: the noise floor
    generated: list  # of LabelledImages, each with a name of its own
    label_names: tuple
    remarks: list  # what the user should know of how they were found

    def check_counts(self, subset_size=None):
        """Raise UserError for sets that are too small for KID or coverage; subset_size None: a fourth of each set."""
        for images in self.generated:
            check_subset_size(subset_size or len(images) // 4, real=len(self.real), generated=len(images))
        for images in (self.real, self.floor, self.training, *self.generated):
            if len(images) <= NEAREST:
                raise UserError(f"{images.name}: found {len(images)} images, expected more than {NEAREST}; coverage "
                                "looks at so many neighbours of each")

    def check_files(self, image_size):
        """Raise UserError for a damaged image, a generated one of another size, or the same set twice."""
        for images in self.generated:
            check_size(images.paths, image_size)
        check_images(self.real.paths + self.training.paths + self.floor.paths)
        digests = [images.digest for images in self.generated]
        twice = [images.name for images in self.generated if digests.count(images.digest) > 1]
        if twice:
            raise UserError(f"--gen: {' and '.join(twice)} hold the same images; give each set once")


def open_sets(root, folders, fold, seed):
    """The images of a fold of the data root and of sample folders -> Sets. `seed` draws the noise floor.

    Raises UserError.
    """
    root = Path(root)
    real, label_names = open_real(root, f"val_{fold}")
    training, training_labels = open_real(root, f"train_{fold}")
    if training_labels != label_names:
        raise UserError(f"{root}: train_{fold}.csv has the labels {' '.join(training_labels)}, val_{fold}.csv "
                        f"{' '.join(label_names)}; prepare the data again")
    floor = _noise_floor(root, training, label_names).split_at_random(len(real), seed, "noise floor", fold)[0]
    opened = [open_generated(folder, fold, label_names) for folder in folders]
    generated = _distinct([images for images, _ in opened])
    return Sets(real, training, floor, generated, label_names, [remark for _, remark in opened if remark])


def _noise_floor(root, training, label_names):
    """The test images; where there are none, the training images."""
    if not (root / "test.csv").is_file():
        return replace(training, name=f"{training.name}, a part")
    test, test_labels = open_real(root, "test")
    if test_labels != label_names:
        raise UserError(f"{root}/test.csv: labels {' '.join(test_labels)}, expected {' '.join(label_names)}")
    return test


def _distinct(sets):
    """The same sets, with the shortest names that tell them apart: of the model, the folder, or its place."""
    def with_seed(images):
        about = images.about
        return f"{about['model']}, seed {about['seed']}" if {"model", "seed"} <= about.keys() else images.name

    def with_weights(images):
        return f"{with_seed(images)}, {images.about['weights']}" if "weights" in images.about else images.name

    for name_of in (lambda images: images.about.get("model", images.name), with_seed, with_weights,
                    lambda images: images.name, lambda images: str(images.folder)):
        names = [name_of(images) for images in sets]
        if len({*names}) == len(names):
            return [replace(images, name=name) for images, name in zip(sets, names, strict=True)]
    raise UserError(f"--gen: names {next(n for n in names if names.count(n) > 1)} twice; give each folder once")
