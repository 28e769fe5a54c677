"""Put the images of a collection into a data root, several at a time."""

import hashlib
import os
import shutil
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from PIL import Image, ImageFilter

from core.errors import UserError
from dataset.images import center_crop, load_image

WAITING = 4  # images per worker that are read ahead: memory does not grow with the collection


@dataclass(frozen=True)
class StoreOptions:
    """What is done with each image on its way into the data root."""

    copy: bool = False  # copy files instead of linking them
    resize: int | None = None  # keep only what the crop to this size would take, as PNG
    median: bool = False  # 3×3 median against the speckle of OCT
    clahe: bool = False  # contrast-limited adaptive histogram equalisation of the lightness (fundus)
    workers: int = 4

    @property
    def changes_pixels(self):
        return bool(self.resize or self.median or self.clahe)


@dataclass(frozen=True, eq=False)
class Stored:
    """The images of a data root: n entries in each column."""

    filenames: np.ndarray  # relative to the root
    labels: np.ndarray  # (n, K) of 0 and 1
    patients: np.ndarray  # "" where unknown
    eyes: np.ndarray  # "" where unknown
    splits: np.ndarray  # of the authors; "" where they have none
    digests: np.ndarray  # SHA-256 of size and pixels, as they were found
    sizes: np.ndarray  # (n, 2) width and height as found
    linked: np.ndarray  # whether it is a link to the file of the collection

    def __len__(self):
        return len(self.filenames)

    def take(self, chosen):
        """The images of a mask or of indices."""
        return Stored(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))


def store(collection, root, options, progress):
    """Write the images below ROOT/images -> Stored, in the order of the records.

    `progress` wraps an iterator of finished images. Raises UserError for names that meet, and for unreadable files.
    """
    names, rows = {}, []

    def finished():
        with ThreadPoolExecutor(options.workers) as pool:
            waiting = deque()
            for record in collection.records:
                other = names.setdefault(record.name.casefold(), record)
                if other is not record:
                    raise UserError(f"two images want the name {record.name}: {other.file or 'drawn'} and "
                                    f"{record.file or 'drawn'}; rename one of them")
                waiting.append(pool.submit(_store_one, record, root, options))
                if len(waiting) > WAITING * options.workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    rows.extend(progress(finished()))
    if not rows:
        raise UserError("found no image in this source; check --input")
    return Stored(*(np.array(column) for column in zip(*rows, strict=True)))


def _store_one(record, root, options):
    """One record -> its row of Stored."""
    pixels = load_image(record.file) if record.file else np.asarray(record.draw())
    digest = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()
    as_is = record.file and not options.changes_pixels
    suffix = record.file.suffix.lower() if as_is else ".png"
    filename = str(PurePosixPath("images") / f"{record.name}{suffix}")
    (root / filename).parent.mkdir(parents=True, exist_ok=True)
    linked = False
    if as_is:
        linked = _place(record.file, root / filename, options.copy)
    else:
        changed(Image.fromarray(pixels), options).save(root / filename)
    height, width = pixels.shape[:2]
    return (filename, record.labels, record.patient, record.eye, record.split, digest, (width, height), linked)


def _place(file, target, copy):
    """Link a file, or copy it where it cannot be linked -> whether it is a link."""
    if not copy:
        try:
            os.link(file.resolve(), target)
            return True
        except OSError:  # another file system, or one without links
            pass
    shutil.copyfile(file, target)
    return False


def changed(image, options):
    """--resize, --median and --clahe, in this order: the filters see what the network will see."""
    if options.resize:
        image = center_crop(image.convert("RGB"), options.resize)
    if options.median:
        image = image.filter(ImageFilter.MedianFilter(3))
    return _clahe(image) if options.clahe else image


def _clahe(image):
    """Equalise the lightness (CIE Lab) of a picture; colours stay."""
    try:
        from skimage import color, exposure
    except ImportError:
        raise UserError("--clahe: needs scikit-image; pip install scikit-image") from None
    lab = color.rgb2lab(np.asarray(image.convert("RGB")))
    lab[..., 0] = 100 * exposure.equalize_adapthist(lab[..., 0] / 100)
    return Image.fromarray(np.rint(255 * color.lab2rgb(lab).clip(0, 1)).astype(np.uint8))
