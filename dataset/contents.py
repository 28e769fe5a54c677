"""Images by what they hold, not by what they are called: the files' bytes, hashed.

A file is read once in a process, as long as nothing touches it.
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

from core.errors import UserError, first_line
from core.files import file_hash

WORKERS = 8  # threads: hashing lets the interpreter go
_known = {}  # (path, its state) -> hash


def hashes(paths):
    """SHA-256 of each file, in order. Raises UserError for one that cannot be read."""
    paths = [os.path.abspath(path) for path in paths]
    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(_hash, paths))


def _hash(path):
    try:
        key = path, state(path)
        if key not in _known:
            _known[key] = file_hash(path)
        return _known[key]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}); restore or remove it") from None


def state(path):
    """What changes whenever somebody writes a file, without reading it: (bytes, times of change of data and of inode).

    The second time cannot be set back, unlike the first.
    """
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def remember(paths, states, known):
    """What the files held when they were in these states: nobody need read those that still are."""
    for path, then, value in zip(paths, states, known, strict=True):
        _known[os.path.abspath(path), tuple(then)] = value


def digest(paths):
    """One SHA-256 over the contents of the files, in order."""
    return combined(hashes(paths))


def combined(parts):
    """One SHA-256 over values that can be written down, in order."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()
