"""Files that are whole or not there: a job killed half-way leaves nothing that looks finished."""

import csv
import hashlib
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch

from core.errors import UserError


def write_atomically(path, write):
    """Call `write(temporary_path)`, then rename it to `path`; on any failure the previous file stays."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    """Write a text file atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_torch(path, content):
    """Write tensors, numbers, strings, lists and dicts with torch.save, atomically."""

    def write(temporary):
        with open(temporary, "wb") as file:  # opened here, so that a full disk is an OSError
            torch.save(content, file)

    write_atomically(path, write)


def write_csv(path, header, rows):
    """Write a CSV file atomically."""

    def write(temporary):
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([header, *rows])

    write_atomically(path, write)


def make_folder(path, flag):
    """Make the folder that `flag` names, if it is not there. Raises UserError."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be written ({error})") from None


def make_writable(path, flag):
    """Make the folder that `flag` names and see that a file can be written there. Raises UserError."""
    make_folder(path, flag)
    try:
        write_text(Path(path) / ".writable", "")
        (Path(path) / ".writable").unlink()
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be written ({error})") from None


def file_hash(path):
    """SHA-256 of a file's bytes, read piece by piece."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


@contextmanager
def built_whole(root, flag="--output"):
    """A temporary folder beside `root` that takes its place when the block ends well, and else disappears."""
    target = Path(root).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{flag} {root}: already exists; remove it or choose another")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, target)
    except OSError as error:  # no permission, disk full
        raise UserError(f"{flag} {root}: cannot be made ({error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
