"""What a source of images says: which images there are, and what is known of each."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Record:
    """One image. What is "" is unknown."""

    name: str  # in the data root, below images/ and without suffix: unique in its collection, `/` makes folders
    labels: tuple  # K of 0 and 1
    file: Path | None = None  # the image file, or …
    draw: Callable[[], Image.Image] | None = None  # … what makes the image
    patient: str = ""
    eye: str = ""  # unique within the patient
    split: str = ""  # of SPLITS: on which side the authors of the collection have put it


@dataclass(frozen=True)
class Collection:
    """A set of images as its source hands it over."""

    labels: tuple  # K names
    records: Iterable[Record]
    count: int  # of records
    stated: dict = field(default_factory=dict)  # counts by the authors: "images", "patients", names of labels
    remarks: tuple = ()  # sentences for the report: what the source has left out, guessed or cannot know
