"""Put the images of a collection into a data root, several at a time."""

import os
import shutil
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from PIL import Image, ImageFilter

from core.errors import UserError
from core.files import json_line, read_jsonl, write_atomically, write_text
from dataset import contents
from dataset.images import center_crop, load_image, pixel_hash

MADE = ("name", "digest", "size", "linked")  # what is known of an image when it is stored
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
    names, journal = {}, Journal(root / "stored.jsonl")

    def finished():
        with ThreadPoolExecutor(options.workers) as pool:
            waiting = deque()
            for record in collection.records:
                other = names.setdefault(record.name.casefold(), record)
                if other is not record:
                    raise UserError(f"two images want the name {record.name}: {other.file or 'drawn'} and "
                                    f"{record.file or 'drawn'}; rename one of them")
                waiting.append((record, pool.submit(_store_one, record, root, options, journal.find(record))))
                if len(waiting) > WAITING * options.workers:
                    yield taken(*waiting.popleft())
            while waiting:
                yield taken(*waiting.popleft())

    def taken(record, task):
        return (record.labels, record.patient, record.eye, record.split), journal.add(record, task.result())

    rows = list(progress(finished()))
    journal.close()
    if not rows:
        raise UserError("found no image in this source; check --input")
    known, made = zip(*rows, strict=True)
    labels, patients, eyes, splits = map(np.array, zip(*known, strict=True))
    names, digests, sizes, linked = (np.array([one[key] for one in made]) for key in MADE)
    return Stored(names, labels, patients, eyes, splits, digests, sizes, linked)


class Journal:
    """What has been stored in an unfinished root: a line for each image, so that a killed job goes on behind it."""

    def __init__(self, path):
        self.path = path
        lines = read_jsonl(path, "remove its folder") if path.is_file() else []
        self.known = {line["record"]: line for line in lines}
        write_text(path, "".join(map(json_line, lines)))  # without a torn one
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (kept open)

    def find(self, record):
        """What `add` was given for a record whose file nobody has touched since; None where it must be stored."""
        line = self.known.get(record.name)
        return line if line and line["state"] == _state(record) else None

    def add(self, record, made):
        """Note what was made of a record (a dict with the keys MADE) -> the same."""
        if made is not self.known.get(record.name):
            self.file.write(json_line({"record": record.name, "state": _state(record), **made}))
            self.file.flush()
        return made

    def close(self):
        """All is stored: nobody needs it."""
        self.file.close()
        self.path.unlink()


def _state(record):
    """What tells whether the file of a record is as it was; a drawn one always is."""
    return list(contents.state(record.file)) if record.file else None


def _store_one(record, root, options, known):
    """One record -> dict with the keys MADE; `known` where it is stored already."""
    if known is not None and (root / known["name"]).is_file():
        return known
    pixels = load_image(record.file) if record.file else np.asarray(record.draw())
    digest = pixel_hash(pixels)
    as_is = record.file and not options.changes_pixels
    suffix = record.file.suffix.lower() if as_is else ".png"
    filename = str(PurePosixPath("images") / f"{record.name}{suffix}")
    (root / filename).parent.mkdir(parents=True, exist_ok=True)
    linked = False
    if as_is:
        linked = place(record.file, root / filename, options.copy)
    else:
        picture = changed(Image.fromarray(pixels), options)
        write_atomically(root / filename, lambda path: picture.save(path, format="PNG"))
    height, width = pixels.shape[:2]
    return {"name": filename, "digest": digest, "size": [width, height], "linked": linked}


def place(file, target, copy=False):
    """Link a file, or copy it where it cannot be linked -> whether it is a link."""
    if not copy:
        try:
            target.unlink(missing_ok=True)  # a killed job may have left it
            os.link(file.resolve(), target)
            return True
        except OSError:  # another file system, or one without links
            pass
    write_atomically(target, lambda temporary: shutil.copyfile(file, temporary))
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
