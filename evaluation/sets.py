"""The sets of images of one evaluation: those of a fold, the noise floor, and what samplers made; all checked."""

from dataclasses import dataclass, replace
from pathlib import Path

from core.errors import UserError
from dataset.images import check_images
from dataset.samples import check_size, open_generated, open_real, sample_folders
from dataset.sets import LabelledImages
from evaluation.names import distinct
from metrics.kid import check_subset_size
from metrics.prdc import NEAREST

PUBLISHED_SIZE = 256  # pixels: of the paper's images
SMALLEST_FLOOR = 8  # images: KID over subsets of a fourth of them


@dataclass(frozen=True)
class Sets:
    """Real images of one fold and the generated sets that are compared with them."""

    real: LabelledImages  # the validation images
    training: LabelledImages  # what the generators were trained on
    floor: LabelledImages | None  # real images scored as if they were generated, the noise floor; None: too few
    generated: list  # of LabelledImages, each with a name of its own
    label_names: tuple
    remarks: list  # what the user should know of how they were found
    without_floor: str | None = None  # a sentence: why there is no noise floor

    def check_counts(self, subset_size=None):
        """Raise UserError for sets that are too small for KID or coverage; subset_size None: a fourth of each set."""
        for images in self.generated:
            check_subset_size(subset_size or len(images) // 4, real=len(self.real), generated=len(images))
        for images in (self.real, self.training, *self.generated):
            if len(images) <= NEAREST:
                raise UserError(f"{images.name}: found {len(images)} images, expected more than {NEAREST}; coverage "
                                "looks at so many neighbours of each")

    def image_size(self, given=None):
        """Pixels per side: what --image-size gives, or else what the samplers noted, or else PUBLISHED_SIZE.

        Raises UserError for sets of several sizes.
        """
        noted = {images.about["image_size"]: images.name for images in self.generated if "image_size" in images.about}
        if given is None and len(noted) > 1:
            raise UserError("--gen: " + ", ".join(f"{name} has images of {side} pixels" for side, name in noted.items())
                            + "; sets of one size can be compared")
        return given or next(iter(noted), PUBLISHED_SIZE)

    def check_files(self, image_size):
        """Raise UserError for a damaged image, a generated one of another size, or the same set twice."""
        for images in self.generated:
            check_size(images.paths, image_size)
        check_images(self.real.paths + self.training.paths + (self.floor.paths if self.floor else ()))
        digests = [images.digest for images in self.generated]
        twice = [images.name for images in self.generated if digests.count(images.digest) > 1]
        if twice:
            raise UserError(f"--gen: {' and '.join(twice)} hold the same images; give each set once")


def open_sets(root, folders, fold, seed):
    """The images of a fold of the data root and of sample folders -> Sets. `seed` draws the noise floor.

    A folder may also hold sample folders: then all of this fold that are in it are meant. Raises UserError.
    """
    root = Path(root)
    real, label_names = open_real(root, f"val_{fold}")
    training, training_labels = open_real(root, f"train_{fold}")
    if training_labels != label_names:
        raise UserError(f"{root}: train_{fold}.csv has the labels {' '.join(training_labels)}, val_{fold}.csv "
                        f"{' '.join(label_names)}; prepare the data again")
    floor, without = _noise_floor(root, training, label_names), None
    if len(floor) < SMALLEST_FLOOR:
        without = (f"{floor.csv}: {len(floor)} images, too few to be scored as if they were generated (that takes "
                   f"{SMALLEST_FLOOR}); the row of real images, the noise floor, is left out")
        floor = None
    else:
        floor = floor.split_at_random(len(real), seed, "noise floor", fold)[0]
    csv = f"val_syn_{fold}.csv"
    opened = [open_generated(folder, fold, label_names)
              for path in folders for folder in sample_folders(path, csv) or [path]]
    names = distinct([images for images, _ in opened])
    generated = [replace(images, name=name) for (images, _), name in zip(opened, names, strict=True)]
    return Sets(real, training, floor, generated, label_names, [line for _, line in opened if line], without)


def _noise_floor(root, training, label_names):
    """The test images; where there are none, the training images."""
    if not (root / "test.csv").is_file():
        return replace(training, name=f"{training.name}, a part")
    test, test_labels = open_real(root, "test")
    if test_labels != label_names:
        raise UserError(f"{root}/test.csv: labels {' '.join(test_labels)}, expected {' '.join(label_names)}")
    return test

