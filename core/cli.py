"""Command lines: one parser for every script, ranges checked while parsing, user errors in one line."""

import argparse
import math
import os
import re
import sys
from pathlib import Path

from core.errors import UserError


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the description (it holds commands) and shows every default."""

    def _get_help_string(self, action):
        hidden = any(action.default is value for value in (None, False, argparse.SUPPRESS))  # but 0 is shown
        if hidden or not action.option_strings:
            return action.help
        return super()._get_help_string(action)


def _dashes(argument):
    """`--data_path=x_y` -> `--data-path=x_y`: dash and underscore spell the same flag."""
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    return flag.replace("_", "-") + equals + value


class _Assets(argparse.Action):
    """`--assets DIR`: obeyed at once, and kept out of the settings; a run goes on where the folder lies elsewhere."""

    def __call__(self, parser, namespace, folder, option_string=None):
        from core.assets import use  # here: it needs this module

        try:
            use(folder)
        except UserError as error:
            parser.exit(2, f"{parser.prog}: error: {error}\n")


class Parser(argparse.ArgumentParser):
    """argparse with both spellings of every flag, no abbreviations and defaults in the help; `--assets` everywhere.

    `released`: flag -> value that it has under `--as-released` (docs/FIDELITY.md), unless it is given too.
    """

    def __init__(self, description, released=None, presets=None, **options):
        super().__init__(description=description, formatter_class=_Help, allow_abbrev=False, **options)
        self.released = released
        self.add_argument("--assets", action=_Assets, default=argparse.SUPPRESS, metavar="DIR",
                          help="folder of fetch_assets.py: look for third-party weights only there, use no network")
        if released:
            spelt = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in released.items())
            spelt = re.sub("--([a-z-]+) (True|False)", lambda m: f"--{'no-' * (m[2] == 'False')}{m[1]}", spelt)
            self.add_argument("--as-released", action="store_true", help=f"behave as the published code: {spelt}")

    def error(self, message):
        """One line, as for every mistake of the user; argparse would print the usage first."""
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")

    def parse_known_args(self, args=None, namespace=None):
        args = [_dashes(a) for a in (sys.argv[1:] if args is None else args)]
        if self.released and "--as-released" in args:
            self.set_defaults(**self.released)
        return super().parse_known_args(args, namespace)


def integer(low, high=None):
    """An argparse type: an integer in [low, high]."""
    return _ranged(int, "an integer", low, high)


def number(low, high=None):
    """An argparse type: a finite number in [low, high]."""
    return _ranged(float, "a number", low, high)


def _ranged(kind, noun, low, high):
    bounds = f"{noun} of at least {low}" if high is None else f"{noun} from {low} to {high}"

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"found {text!r}, expected {bounds}") from None
        if not math.isfinite(value) or value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"found {text}, expected {bounds}")
        return value

    return parse


def run(main, finish=lambda: None):
    """Call `main()`, then `finish()`; a UserError becomes one line on stderr and exit code 2.

    So does an OSError: no permission, disk full, a file where a folder should be.
    """
    try:
        main()
        finish()
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        sys.exit(130)
    except (UserError, OSError) as error:
        rank = f"[rank {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
        print(f"{rank}{Path(sys.argv[0]).name}: error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        sys.exit(2)
