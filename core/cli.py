"""Command lines: one parser for every script, ranges checked while parsing, user errors in one line."""

import argparse
import math
import os
import re
import sys
from pathlib import Path

from core import assets
from core.errors import UserError
from core.text import aligned


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


class _Unset:
    """What a flag is that nobody gave; repeatable flags (action="append") begin a list with it."""

    def __copy__(self):
        return []


class _Assets(argparse.Action):
    """`--assets DIR`: obeyed at once, and kept out of the settings; a run goes on where the folder lies elsewhere."""

    def __call__(self, parser, namespace, folder, option_string=None):
        try:
            assets.use(folder)
        except UserError as error:
            parser.exit(2, f"{parser.prog}: error: {error}\n")


class Parser(argparse.ArgumentParser):
    """argparse with both spellings of every flag, no abbreviations and defaults in the help; `--assets` everywhere.

    `released`: dest -> value that it has under `--as-released` (docs/FIDELITY.md).
    `presets`: name -> object with `settings` (dest -> value), `source` and `description` (texts); adds `--preset NAME`
    and, unless the script has its `own_dry_run`, `--dry-run`, which shows what every flag comes to and why. A preset
    may have settings for other scripts: they are passed over. Neither flag is among the parsed ones.
    What is given on the command line comes before the preset, that before `--as-released`, that before the default;
    flags that are required must be given.
    """

    def __init__(self, description, released=None, presets=None, own_dry_run=False, **options):
        super().__init__(description=description, formatter_class=_Help, allow_abbrev=False, **options)
        self.released, self.presets, self.own_dry_run = released, presets, own_dry_run
        self.add_argument("--assets", action=_Assets, default=argparse.SUPPRESS, metavar="DIR",
                          help="folder of fetch_assets.py: look for third-party weights only there, use no network")
        if released:
            spelt = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in released.items())
            spelt = re.sub("--([a-z-]+) (True|False)", lambda m: f"--{'no-' * (m[2] == 'False')}{m[1]}", spelt)
            self.add_argument("--as-released", action="store_true", help=f"behave as the published code: {spelt}")
        if presets:
            self.add_argument("--preset", choices=presets, default=argparse.SUPPRESS, metavar="NAME",
                              help="take the settings of one of the presets below, where a flag is not given")
            if not own_dry_run:
                self.add_argument("--dry-run", action="store_true", default=argparse.SUPPRESS,
                                  help="show what every flag comes to, and do nothing")
            rows = [("", name, f"{preset.description} ({preset.source})") for name, preset in presets.items()]
            self.epilog = "\n".join(filter(None, [self.epilog, "presets:", aligned(rows, left=3)]))

    def error(self, message):
        """One line, as for every mistake of the user; argparse would print the usage first."""
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")

    def defaults(self):
        """dest -> what a flag is where nothing else says it: neither the command line, a preset nor --as-released."""
        return {action.dest: action.type(action.default) if isinstance(action.default, str) and action.type
                else action.default for action in self._actions if action.default is not argparse.SUPPRESS}

    def parse_known_args(self, args=None, namespace=None):
        args = [_dashes(a) for a in (sys.argv[1:] if args is None else args)]
        if not self.released and not self.presets:
            return super().parse_known_args(args, namespace)
        known, unset = self.defaults(), _Unset()
        bare, _ = super().parse_known_args(args, argparse.Namespace(**dict.fromkeys(known, unset)))
        given = {dest: value for dest, value in vars(bare).items() if value is not unset}
        layers = {}  # where settings come from -> dest -> value; later ones count
        if "as_released" in given:
            layers["--as-released"] = self.released
        if "preset" in given:
            settings = self.presets[given["preset"]].settings
            layers[f"preset {given['preset']}"] = {dest: settings[dest] for dest in settings if dest in known}
        taken = {dest: value for layer in layers.values() for dest, value in layer.items()}
        parsed, rest = super().parse_known_args(args, argparse.Namespace(**taken))  # what is given replaces them
        dry_run = self.presets and not self.own_dry_run
        for dest in ("preset", *["dry_run"] * bool(dry_run)):
            vars(parsed).pop(dest, None)
        if dry_run and "dry_run" in given and not rest:
            sources = {dest: source for source, layer in layers.items() for dest in layer}
            print(self._shown(parsed, sources | dict.fromkeys(given, "given")))
            self.exit()
        return parsed, rest

    def _shown(self, parsed, sources):
        """A line for every flag: what it comes to, and where that comes from."""
        flags = {action.dest: (action.option_strings or [action.dest])[0] for action in reversed(self._actions)}
        rows = [(flags[dest], _spelt(getattr(parsed, dest)), f"({sources.get(dest, 'default')})")
                for dest in dict.fromkeys(action.dest for action in self._actions) if hasattr(parsed, dest)]
        return aligned(rows, left=3)


def _spelt(value):
    """A parsed value as it would be given; None has no spelling."""
    if value is None:
        return "not set"
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


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
    except BrokenPipeError:  # whoever read our output has gone, as `head` does: nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # as a shell reports SIGPIPE
    except (UserError, OSError) as error:
        rank = f"[rank {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
        print(f"{rank}{Path(sys.argv[0]).name}: error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        sys.exit(2)
