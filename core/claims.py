"""A folder belongs to the settings it was made with: they stand in its settings.json.

Whoever is about to continue a folder reads them (`read_settings`), compares them with its own (`differences`) and then
continues, takes another folder, or refuses (`described` says why). Whoever starts a folder writes them
(`write_settings`), before anything else in it.

Settings are what the contents depend on: names -> numbers, strings, lists and dicts of them, None. What another run
may choose anew (how often to log, where the folder lies) does not belong among them. To keep something else beside
them in the same file, as the sampler does, leave it out of what is compared.
"""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from core import locks
from core.errors import UserError, first_line
from core.files import OBJECT, make_folder, plain, read_json, remove_leftovers, write_json

FILE = "settings.json"
SHOWN = 60  # characters of a value in a message


def read_settings(folder, advice="remove the folder", schema=OBJECT):
    """The settings a folder belongs to; None where it has none. Raises UserError where they are not as in `schema`."""
    file = Path(folder) / FILE
    return read_json(file, advice, schema) if file.is_file() else None


def write_settings(folder, settings):
    """From now on, the folder belongs to these settings. The folder must exist."""
    write_json(Path(folder) / FILE, settings)


def differences(stored, wanted, defaults=None, renamed=None):
    """Settings that a folder has (`stored`) and settings that are asked for -> name -> (stored value, wanted value).

    Empty if they are the same: the folder may be continued. A setting that `stored` does not know counts as its
    default (`defaults`: name -> value, None where it is not there), so that what was made before a flag existed is
    continued by the same command. `renamed`: settings of older folders that have another name now -> (that name, {old
    value: new value}). Any other stored setting that is not known counts as None in `wanted`. Values are compared as
    JSON gives them back, so that a tuple equals a list.
    """
    for old, (name, values) in (renamed or {}).items():
        if old in stored:
            new = next((new for was, new in values.items() if was == stored[old]), stored[old])
            stored = {**{k: v for k, v in stored.items() if k != old}, name: new}
    wanted, defaults = _as_json(wanted), _as_json(defaults or {})
    stored = {name: stored.get(name, defaults.get(name)) for name in wanted} | stored
    return {name: (value, wanted.get(name)) for name, value in stored.items() if value != wanted.get(name)}


def described(different):
    """What `differences` returned, for a message: "lr 0.0003 (now 0.001), fold 0 (now 1)"."""
    return ", ".join(f"{name} {str(old)[:SHOWN]} (now {str(new)[:SHOWN]})" for name, (old, new) in different.items())


def _as_json(settings):
    return plain(settings, default=str)  # defaults of flags may be paths


@contextmanager
def built_whole(root, settings=None, flag="--output"):
    """A temporary folder beside `root` that takes its place when the block ends well.

    What a killed job with the same settings left in it is still there, unless they are None; what others left goes, and
    what a block that raises an error leaves. Raises UserError where `root` is no empty folder, or another job is at
    work.
    """
    target = Path(root).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{flag} {root}: already exists; remove it or choose another")
    temporary = target.with_name(f".{target.name}.unfinished")
    make_folder(temporary, flag)
    lock = temporary / ".lock"
    locks.hold(lock)
    remove_leftovers(target.parent)
    try:
        if settings is None or read_settings(temporary) != _as_json(settings):
            _empty(temporary, lock)
            write_settings(temporary, settings)
        for place in (temporary, *filter(Path.is_dir, temporary.rglob("*"))):
            remove_leftovers(place)
        yield temporary
        (temporary / FILE).unlink()
        lock.unlink()
        os.sync()  # many files at once
        os.replace(temporary, target)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):  # no permission, disk full
            raise UserError(f"{flag} {root}: cannot be made ({first_line(error)})") from None
        raise
    finally:
        locks.release(lock)


def _empty(folder, kept):
    """Remove all in a folder but one file."""
    for path in folder.iterdir():
        if path != kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
