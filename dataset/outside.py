"""What a table or a folder of images names lies in that folder, unless `--allow-outside` says otherwise.

A table of somebody else's must not pick files from the rest of the disk: through an absolute path, through "..", or
through a symbolic link that leads out of the folder. (Hard links, which prepare_data.py makes, lead nowhere.)
"""

import argparse

from core.errors import UserError
from core.files import first_outside

_allowed = False  # for the whole process, as the caches of --assets are


class _Allow(argparse.Action):
    """Obeyed at once and kept out of the settings: it changes what may be read, never what is computed."""

    def __call__(self, parser, namespace, values, option_string=None):
        global _allowed
        _allowed = True


def add_flag(parser):
    """`--allow-outside`, for every script that reads a data root or sample folder."""
    parser.add_argument("--allow-outside", action=_Allow, nargs=0, default=argparse.SUPPRESS,
                        help="follow tables and links that lead out of their folder, to images elsewhere")


def flags():
    """The flag as it was given, for a script that starts others."""
    return ["--allow-outside"] * _allowed


def refuse(folder, names, where):
    """Raise UserError where one of these paths below a folder leads out of it; `where`: what names it, for the message.
    """
    name = None if _allowed else first_outside(folder, names)
    if name is not None:
        raise UserError(f"{where}: {str(name)[:200]} leads out of {folder}; put the file there, or give "
                        "--allow-outside if you trust it")
