"""A folder belongs to the settings it was made with: they stand in its settings.json.

Whoever is about to continue a folder reads them (`read_settings`), compares them with its own (`differences`) and then
continues, takes another folder, or refuses (`described` says why). Whoever starts a folder writes them
(`write_settings`), before anything else in it.

Settings are what the contents depend on: names -> numbers, strings, lists and dicts of them, None. What another run
may choose anew (how often to log, where the folder lies) does not belong among them. To keep something else beside
them in the same file, as the sampler does, leave it out of what is compared.
"""

import json
from pathlib import Path

from core.files import read_json, write_json

FILE = "settings.json"
SHOWN = 60  # characters of a value in a message


def read_settings(folder, advice="remove the folder"):
    """The settings a folder belongs to; None where it has none. Raises UserError where they are damaged."""
    file = Path(folder) / FILE
    return read_json(file, advice) if file.is_file() else None


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
            stored = {**{k: v for k, v in stored.items() if k != old}, name: values.get(stored[old], stored[old])}
    wanted, defaults = _as_json(wanted), _as_json(defaults or {})
    stored = {name: stored.get(name, defaults.get(name)) for name in wanted} | stored
    return {name: (value, wanted.get(name)) for name, value in stored.items() if value != wanted.get(name)}


def described(different):
    """What `differences` returned, for a message: "lr 0.0003 (now 0.001), fold 0 (now 1)"."""
    return ", ".join(f"{name} {str(old)[:SHOWN]} (now {str(new)[:SHOWN]})" for name, (old, new) in different.items())


def _as_json(settings):
    return json.loads(json.dumps(settings, default=str))  # defaults of flags may be paths
