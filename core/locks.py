"""One job in a folder at a time: a lock that ends with the process that holds it, however that ends."""

import fcntl
import os
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

from core.errors import UserError, first_line
from core.files import HOST

_held = {}  # lock file -> its open file: closed, and so unlocked, when this process ends


def hold(file):
    """Keep every other job from what a lock file stands for, until this process ends. Raises UserError if one is there.

    The file is made where it is missing, stays, and names the job that holds it. Its folder must exist.
    """
    file = Path(file).resolve()
    if file in _held:
        return
    opened = open(file, "a+", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115 (kept open)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        opened.seek(0)
        other = opened.read(300).strip() or "it does not say which"
        raise UserError(f"{file.parent}: another job works here ({other}); wait for it or stop it") from None
    except OSError as error:  # a file system without locks: better to work and say so than not to work
        print(f"warning: {file.parent}: cannot be locked ({first_line(error)}); start no second job in it",
              file=sys.stderr)
    opened.truncate(0)
    opened.write(f"process {os.getpid()} on {HOST}: {' '.join(sys.argv)}\n")
    opened.flush()
    _held[file] = opened


def release(file):
    """Let others have what this process holds."""
    _held.pop(Path(file).resolve()).close()


@contextmanager
def alone(file):
    """Within it no other job is within it for the same lock file; others wait. For work of a moment."""
    with open(file, "a", encoding="utf-8") as opened:
        with suppress(OSError):  # a file system without locks: `hold`, which follows, says so
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield
