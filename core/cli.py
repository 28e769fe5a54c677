"""Command lines: one parser for every script, ranges checked while parsing, user errors in one line."""

import argparse
import io
import math
import os
import re
import sys
from contextlib import contextmanager
from pathlib import Path

from core import assets
from core.errors import UserError, first_line
from core.text import aligned, one_line

LARGEST = 2**63 - 1
SHOWN = 60  # characters of a value in a message


class _Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the description (it holds commands); shows the range and the default of every flag."""

    def _get_help_string(self, action):
        if action.help is argparse.SUPPRESS:
            return action.help
        bounds = getattr(action.type, "range", None)
        if "(default: " in action.help:
            return action.help.replace("(default: ", f"({bounds}; default: ", 1) if bounds else action.help
        hidden = not action.option_strings or any(
            action.default is value for value in (None, False, argparse.SUPPRESS))  # but 0 is shown
        default = "" if hidden else _spelt(action.default).replace("%", "%%")
        notes = "; ".join(filter(None, [bounds, default and f"default: {default}"]))
        return f"{action.help} ({notes})" if notes else action.help


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
    `memory`: (dest of a flag, function): the value of that flag, where it is given, names what remembers settings,
    and `function(value)` returns them, dest -> value; paths and the like may be texts.
    What is given on the command line comes before the preset, that before `--as-released`, that before what is
    remembered, that before the default; flags that are required must be given or remembered.
    """

    def __init__(self, description, released=None, presets=None, own_dry_run=False, memory=None, **options):
        super().__init__(description=description, formatter_class=_Help, allow_abbrev=False, **options)
        self.released, self.presets, self.own_dry_run, self.memory = released, presets, own_dry_run, memory
        self.sources = {}  # dest -> where the value that was parsed comes from, if it is no default
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
        self.exit(2, f"{self.prog}: error: {one_line(message)} (--help lists the flags)\n")

    def defaults(self):
        """dest -> what a flag is where nothing else says it: neither the command line, a preset nor --as-released."""
        return {action.dest: action.type(action.default) if isinstance(action.default, str) and action.type
                else action.default for action in self._actions if action.default is not argparse.SUPPRESS}

    def parse_known_args(self, args=None, namespace=None):
        args = [_dashes(a) for a in (sys.argv[1:] if args is None else args)]
        if not self.released and not self.presets:
            return super().parse_known_args(args, namespace)
        known, unset = self.defaults(), _Unset()
        with self._not_required(known):
            bare, _ = super().parse_known_args(args, argparse.Namespace(**dict.fromkeys(known, unset)))
        given = {dest: value for dest, value in vars(bare).items() if value is not unset}
        layers = {}  # where settings come from -> dest -> value; later ones count
        if self.memory and self.memory[0] in given:
            dest, remember = self.memory
            layers[f"{self._flag(dest)} {given[dest]}"] = self._typed(remember(given[dest]))
        if "as_released" in given:
            layers["--as-released"] = self.released
        if "preset" in given:
            settings = self.presets[given["preset"]].settings
            layers[f"preset {given['preset']}"] = {dest: settings[dest] for dest in settings if dest in known}
        taken = {dest: value for layer in layers.values() for dest, value in layer.items()}
        with self._not_required(taken):
            parsed, rest = super().parse_known_args(args, argparse.Namespace(**taken))  # what is given replaces them
        self.sources = {dest: source for source, layer in layers.items() for dest in layer}
        self.sources |= dict.fromkeys(given, "given")
        dry_run = self.presets and not self.own_dry_run
        for dest in ("preset", *["dry_run"] * bool(dry_run)):
            vars(parsed).pop(dest, None)
        if dry_run and "dry_run" in given and not rest:
            print(self.shown(parsed))
            self.exit()
        return parsed, rest

    @contextmanager
    def _not_required(self, dests):
        """Within it, flags of these dests may be left out."""
        actions = [action for action in self._actions if action.required and action.dest in dests]
        for action in actions:
            action.required = False
        try:
            yield
        finally:
            for action in actions:
                action.required = True

    def _flag(self, dest):
        """How a flag is spelt."""
        return next((action.option_strings or [dest])[0] for action in self._actions if action.dest == dest)

    def _typed(self, settings):
        """Those of some settings that are flags here, texts as the flags would have parsed them."""
        types = {action.dest: action.type for action in self._actions}
        return {dest: types[dest](value) if isinstance(value, str) and types[dest] else value
                for dest, value in settings.items() if dest in types}

    def shown(self, parsed):
        """What was parsed last, a line for every flag: what it comes to, and where that comes from."""
        rows = [(self._flag(dest), _spelt(getattr(parsed, dest)), f"({self.sources.get(dest, 'default')})")
                for dest in dict.fromkeys(action.dest for action in self._actions) if hasattr(parsed, dest)]
        return aligned(rows, left=3)


def _spelt(value):
    """A parsed value as it would be given; None has no spelling."""
    if value is None:
        return "not set"
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def integer(low, high=LARGEST):
    """An argparse type: an integer in [low, high]; of 64 bit, since seeds and sizes above end in other libraries."""
    return _ranged(int, "an integer", low, high)


def number(low, high=None):
    """An argparse type: a finite number in [low, high]."""
    return _ranged(float, "a number", low, high)


def _ranged(kind, noun, low, high):
    """Its attribute `range` is what --help says of it."""
    unbounded = high in (None, LARGEST)
    bounds = f"{noun} of at least {low}" if unbounded else f"{noun} from {low} to {high}"

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"found {text[:SHOWN]!r}, expected {bounds}") from None
        if kind is int and value > LARGEST:
            raise argparse.ArgumentTypeError(f"found {text[:SHOWN]}, expected {bounds} and at most {LARGEST} (64 bit)")
        if not value >= low or value == math.inf or (high is not None and value > high):  # nan is not >= low
            raise argparse.ArgumentTypeError(f"found {text[:SHOWN]}, expected {bounds}")
        return value

    parse.range = f"at least {low}" if unbounded else f"{low} to {high}"
    return parse


def line(text):
    """An argparse type: a name that is one line of text."""
    if not text.strip() or text != one_line(text):
        raise argparse.ArgumentTypeError(f"found {text[:SHOWN]!r}, expected one line of text")
    return text


def run(main, finish=lambda: None, name=None):
    """Call `main()`, then `finish()`; a UserError becomes one line on stderr and exit code 2.

    `name`: what the line starts with, by default the file name of the script.

    So does an OSError: no permission, disk full, a file where a folder should be. Of several processes, those that fail
    because another one has ended say that in a line, so that the message of that one is seen; their exit code is 1.
    Signs that the encoding of the output lacks are written as their numbers (\\u2193 for an arrow).
    """
    for stream in (sys.stdout, sys.stderr):  # a pipe or file may have an encoding without ± or ↓
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    name = name or Path(sys.argv[0]).name
    try:
        main()
        finish()
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever read our output has gone, as `head` does: nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # as a shell reports SIGPIPE
    except Exception as error:
        several = int(os.environ.get("WORLD_SIZE", 1)) > 1
        who = (f"[rank {os.environ['RANK']}] " if several else "") + name
        if several and _from_another_process(error):
            print(f"{who}: lost another process ({first_line(error)}); its message, or the launcher's, says why",
                  file=sys.stderr)
            sys.exit(1)
        if not isinstance(error, (UserError, OSError)):
            raise
        print(f"{who}: error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)


def _from_another_process(error):
    """Whether an exception says no more than that a process which this one waits for is gone.

    torch has classes for NCCL and its store (DistBackendError, ...), and for gloo RuntimeErrors that differ in text.
    """
    lost = re.search("gloo|connection (closed|reset) by peer", str(error), re.IGNORECASE)
    return type(error).__module__ == "torch.distributed" or (isinstance(error, RuntimeError) and lost is not None)
