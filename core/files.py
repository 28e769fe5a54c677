"""Files that are whole or not there: a job killed half-way leaves nothing that looks finished.

What is read may be damaged all the same; that is reported in one line.
"""

import csv
import hashlib
import json
import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from core.errors import UserError, first_line


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


def write_json(path, content):
    """Write a dict or list as JSON, atomically."""
    write_text(path, json.dumps(content, indent=1) + "\n")


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


def read_json(path, advice):
    """The object (dict) that a JSON file holds. Raises UserError where it cannot be read; `advice` ends the message."""
    with _refused(path, advice):
        return _object(Path(path).read_text(encoding="utf-8"))


def read_jsonl(path, advice):
    """The objects of a file that holds one on each line. Raises UserError as `read_json` does.

    A last line that is torn, because its writer was killed, is left out.
    """
    with _refused(path, advice):
        *lines, last = Path(path).read_text(encoding="utf-8").split("\n")  # a whole file ends with a line break
        objects = [_object(line) for line in lines]
        with suppress(ValueError):
            objects.append(_object(last))
        return objects


def _object(text):
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError(f"found {text.strip()[:40]}, expected an object in braces")
    return content


@contextmanager
def _refused(path, advice):
    """Whatever is wrong with a file that is read within it becomes a UserError."""
    try:
        yield
    except ValueError as error:  # not UTF-8, not JSON
        raise UserError(f"{path}: damaged ({first_line(error)}); {advice}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}); {advice}") from None


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
