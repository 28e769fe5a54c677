"""Files that are whole or not there: a job killed half-way leaves nothing that looks finished.

What is read may be damaged all the same; that is reported in one line.
"""

import hashlib
import json
import os
import re
import shutil
import socket
import stat
import tempfile
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError

from core.errors import UserError, first_line
from core.schema import parse, sealed
from core.text import csv_text

OBJECT = {}  # a schema: an object that may hold anything
LARGEST = 1 << 28  # bytes of a text file that is read at once; a manifest of 100,000 images has 5 MB
UNPACKED = 1 << 34  # bytes that an .npz file may hold; OCTMNIST at 224 pixels has 5.5 GB
MAPPED = 1 << 26  # bytes of an array of an .npz file from which on it is mapped
NUMBERS, TEXTS = "biuf", "UT"  # kinds of dtypes

HOST = socket.gethostname()
TEMPORARY = re.compile(r"\..+\.(?P<pid>\d+)(@(?P<host>.+))?\.tmp")  # what `_temporary` makes; once without the host
UMASK = os.umask(0)  # it can only be read by setting it
os.umask(UMASK)


def write_atomically(path, write):
    """Call `write(temporary_path)`, then rename it to `path`; on any failure the previous file stays.

    What is renamed is on the disk before, and has the permissions that the umask gives. Raises UserError.
    """
    write_together({path: write})


def write_together(writers):
    """`write_atomically` for several files, path -> write: all of them appear, or, where one cannot be written, none.

    A job that is killed between two renames leaves new files beside old ones; each is whole.
    """
    temporaries = {Path(path): _temporary(path) for path in writers}
    try:
        for (path, temporary), write in zip(temporaries.items(), writers.values(), strict=True):
            with _written(path):
                write(temporary)
                os.chmod(temporary, 0o666 & ~UMASK)  # safetensors makes files that nobody else may read
                _sync(temporary)
        for path, temporary in temporaries.items():
            with _written(path):
                os.replace(temporary, path)
                _sync_folder(path.parent)
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)


@contextmanager
def _written(path):
    """What is wrong with a file that is written within it becomes a UserError.

    A full disk is an OSError for Python, an error of its own for safetensors, and a RuntimeError for torch.save.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be written ({first_line(error)}); make room or check the permissions, then "
                        "give the same command again") from error


def _temporary(path):
    """Where something is written before it is renamed to `path`; the name tells whose it is."""
    return Path(path).with_name(f".{Path(path).name}.{os.getpid()}@{HOST}.tmp")


def _sync(path):
    """Wait until a file is on the disk: a rename may outlive a power cut that its contents do not."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder):
    with suppress(OSError):  # some network file systems cannot sync folders
        _sync(folder)


def remove_leftovers(folder):
    """Remove what killed processes of this machine left half-written in a folder; another machine's stays."""
    for path in Path(folder).glob(".*.tmp"):
        owner = TEMPORARY.fullmatch(path.name)
        if owner and owner["host"] in (None, HOST) and not _lives(int(owner["pid"])):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _lives(pid):
    """Whether there is a process of this number on this machine."""
    try:
        os.kill(pid, 0)
    except PermissionError:  # another user's
        return True
    except (OSError, OverflowError):
        return False
    return True


def text_writer(text):
    """What `write_atomically` and `write_together` call to write a text file.

    A path need not be text: bytes of it that are none (surrogates, for Python) are written as their numbers (\\udcff).
    """
    return lambda path: path.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_text(path, text):
    """Write a text file atomically."""
    write_atomically(path, text_writer(text))


def plain(content, default=None):
    """A dict or list as JSON gives it back; `default` is that of json.dumps, for values that JSON has not.

    Bytes of a path that are no text become its text \\udcff: no reader takes half a surrogate pair.
    """
    text = json.dumps(content, ensure_ascii=False, default=default)
    return json.loads(re.sub("[\ud800-\udfff]", lambda half: f"\\\\u{ord(half[0]):04x}", text))


def json_text(content):
    """A dict, with its checksum, or a list as a file holds it."""
    return json.dumps(sealed(plain(content)), indent=1, ensure_ascii=False) + "\n"


def json_line(content):
    """A dict, with its checksum, as a line of a file."""
    return json.dumps(sealed(plain(content)), ensure_ascii=False) + "\n"


def write_json(path, content):
    """Write a dict or list as JSON, atomically."""
    write_text(path, json_text(content))


def write_array(path, array):
    """Write an array as .npy, atomically."""
    def write(temporary):
        with open(temporary, "wb") as file:
            np.save(file, array)

    write_atomically(path, write)


def write_torch(path, content):
    """Write tensors, numbers, strings, lists and dicts with torch.save, atomically."""
    write_atomically(path, lambda temporary: torch.save(content, temporary))


def read_torch(path, flag, advice, allowed=()):
    """What a file of torch.save holds, on the CPU, without executing anything in it.

    Raises UserError for a file that is missing, damaged (every record has a CRC-32, which torch does not look at) or
    holds other objects than tensors, plain values and those of the `allowed` classes; `flag` and `advice` are in the
    message.
    """
    try:
        if zipfile.is_zipfile(path):  # else one of torch before 1.6
            with zipfile.ZipFile(path) as records:
                if damaged := records.testzip():
                    raise ValueError(f"its record {damaged} does not have its checksum")
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch raise a dozen kinds for damaged or unsafe files
        unsafe = re.search(r"GLOBAL (\S+)", str(error))  # without torch's advice to load it unsafely
        reason = f"it holds a {unsafe[1]}" if unsafe else first_line(error)
        raise UserError(f"{flag} {path}: cannot be loaded safely ({reason}); {advice}") from None


def write_csv(path, header, rows):
    """Write a CSV file atomically."""
    write_text(path, csv_text([header, *rows]))


def read_json(path, advice, schema=OBJECT):
    """What a JSON file holds: an object, as `schema` describes it (core/schema.py).

    Raises UserError where it cannot be read or is something else; `advice` ends the message.
    """
    with refused(path, advice):
        return parse(_text(path), schema)


def read_jsonl(path, advice, schema=OBJECT):
    """The objects of a file that holds one on each line. Raises UserError as `read_json` does, with the line.

    A last line that is torn, because its writer was killed, is left out.
    """
    with refused(path, advice):
        *lines, last = _text(path).split("\n")  # a whole file ends with a line break
        objects = []
        for number, line in enumerate(lines, 1):
            try:
                objects.append(parse(line, schema))
            except ValueError as error:
                raise ValueError(f"line {number}: {first_line(error)}") from None
        with suppress(ValueError):
            objects.append(parse(last, schema))
        return objects


def _text(path):
    """The text of a file that is no larger than any of ours can be."""
    about = os.stat(path)
    if not stat.S_ISREG(about.st_mode):  # a pipe would never end
        raise OSError("it is no file")
    if about.st_size > LARGEST:
        raise ValueError(f"has {about.st_size:,} bytes, expected at most {LARGEST:,}")
    return Path(path).read_text(encoding="utf-8")


def read_array(path, advice, dimensions):
    """The numbers of a .npy file, an array of that many dimensions. Raises UserError. Nothing in it is executed."""
    with refused(path, advice):
        # Mapped first: then a shape that promises more numbers than the file has is an error, and takes no memory.
        return np.array(_checked(np.lib.format.open_memmap(path, mode="r"), "", dimensions, NUMBERS))


def read_arrays(path, advice, wanted):
    """Arrays of a .npz file: wanted, name -> (dimensions, kinds as of numpy's dtypes) -> name -> array.

    Large arrays are unpacked into a temporary file and read from there as they are used: they need not fit into memory.
    Raises UserError. Nothing in the file is executed.
    """
    with refused(path, advice), zipfile.ZipFile(path) as file:
        sizes = {entry.filename: entry.file_size for entry in file.infolist()}
        size = sum(sizes.values())
        if size > UNPACKED:
            raise ValueError(f"holds {size:,} bytes, expected at most {UNPACKED:,}")
        with np.load(path, allow_pickle=False) as arrays:
            missing = [name for name in wanted if name not in arrays]
            if missing:
                raise ValueError(f"has no `{missing[0]}`, expected {', '.join(wanted)}")
            return {name: _checked(_mapped(file, name) if sizes.get(f"{name}.npy", 0) > MAPPED else arrays[name],
                                   f"{name}: ", *expected) for name, expected in wanted.items()}


def _mapped(file, name):
    """An array of an open zip file, mapped from a temporary file that ends with it."""
    with tempfile.NamedTemporaryFile() as unpacked:
        with file.open(f"{name}.npy") as packed:
            shutil.copyfileobj(packed, unpacked, 1 << 20)
        unpacked.flush()
        return np.load(unpacked.name, mmap_mode="r", allow_pickle=False)


def _checked(array, name, dimensions, kinds):
    dimensions = dimensions if isinstance(dimensions, tuple) else (dimensions,)
    if not isinstance(array, np.ndarray) or array.ndim not in dimensions or array.dtype.kind not in kinds:
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "no array"
        raise ValueError(f"{name}found {found}, expected {' or '.join(map(str, dimensions))} dimension(s) of "
                         f"{'text' if kinds == TEXTS else 'numbers'}")
    return array


@contextmanager
def refused(path, advice):
    """Whatever is wrong with a file that is read within it becomes a UserError. To be kept short, for that reason."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}); {advice}") from None
    except Exception as error:  # readers of JSON, arrays, zip files and safetensors have a dozen kinds
        raise UserError(f"{path}: damaged ({first_line(error)}); {advice}") from None


def first_outside(folder, names):
    """The first of these paths below a folder that leads out of it: absolute, through "..", or through a link.

    None where all stay in it. Files need not be there.
    """
    real, parents = os.path.realpath(folder), {}
    for name in names:
        path = os.path.join(real, name)
        parent = os.path.dirname(path)
        if parent not in parents:  # many names, few folders
            parents[parent] = os.path.realpath(parent)
        target = os.path.realpath(path) if os.path.islink(path) else os.path.join(parents[parent],
                                                                                os.path.basename(path))
        if not target.startswith(os.path.join(real, "")):
            return name
    return None


def make_folder(path, flag):
    """Make the folder that `flag` names, or remove what killed processes left half-written in it. Raises UserError."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{flag} {path}: is no text in UTF-8, as TensorBoard expects; give another path") from None
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be written ({error})") from None


def make_writable(path, flag):
    """Make the folder that `flag` names and see that a file can be written there. Raises UserError."""
    make_folder(path, flag)
    try:
        write_text(Path(path) / ".writable", "")
    except UserError as error:
        raise UserError(f"{flag} {error}") from None
    (Path(path) / ".writable").unlink(missing_ok=True)


def file_hash(path, algorithm="sha256"):
    """The hash of a file's bytes, read piece by piece."""
    digest = hashlib.new(algorithm)
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
