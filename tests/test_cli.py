"""Command lines: what a flag comes to from the command line, a preset, --as-released or its default."""

import argparse
from types import SimpleNamespace

import pytest
from helpers import parse

from core.cli import Parser, integer, number, run
from core.errors import UserError

PRESETS = {
    "paper": SimpleNamespace(settings={"lr": 3e-4, "fold": 2, "warmup": False, "of_another_script": 7},
                             source="Table 1", description="the large model"),
    "small": SimpleNamespace(settings={"lr": 1e-2}, source="our run of two hours", description="the small model"),
}


def toy():
    p = Parser("A toy.", released={"warmup": False, "lr": 1.0, "steps": 1000}, presets=PRESETS)
    p.add_argument("--lr", type=number(0), default=1e-4, help="learning rate")
    p.add_argument("--fold", type=integer(0), default=0, help="which fold")
    p.add_argument("--steps", type=integer(1), default=250, help="how many")
    p.add_argument("--warmup", action="store_true", default=True, help="whether")
    p.add_argument("--sizes", type=integer(1), nargs="+", default=(8, 16), help="of images")
    p.add_argument("--vae", help="which (default: that of the data)")
    return p


@pytest.mark.parametrize("line, expected", [
    ("", {"lr": 1e-4, "fold": 0, "steps": 250, "warmup": True}),
    ("--as-released", {"lr": 1.0, "fold": 0, "steps": 1000, "warmup": False}),
    ("--preset paper", {"lr": 3e-4, "fold": 2, "steps": 250, "warmup": False}),
    ("--preset=paper --as-released", {"lr": 3e-4, "fold": 2, "steps": 1000, "warmup": False}),
    ("--as_released --fold 5 --preset paper --lr 0.5", {"lr": 0.5, "fold": 5, "steps": 1000, "warmup": False}),
    ("--preset small --lr 1e-4", {"lr": 1e-4, "fold": 0, "steps": 250, "warmup": True}),  # given, though the default
])
def test_given_comes_before_preset_before_as_released_before_default(line, expected):
    flags = vars(toy().parse_args(line.split()))
    assert {name: flags[name] for name in expected} == expected
    assert set(flags) == {*expected, "sizes", "vae", "as_released"}  # no setting of a run, no flag of another script


def test_a_dry_run_shows_where_every_value_comes_from_and_ends(capsys):
    with pytest.raises(SystemExit) as stop:
        toy().parse_args(["--dry-run", "--preset", "paper", "--as-released", "--fold", "0"])
    assert not stop.value.code
    assert capsys.readouterr().out.splitlines() == [
        "--as-released  True     (given)",
        "--lr           0.0003   (preset paper)",
        "--fold         0        (given)",
        "--steps        1000     (--as-released)",
        "--warmup       False    (preset paper)",
        "--sizes        8 16     (default)",
        "--vae          not set  (default)"]


@pytest.mark.parametrize("line, message", [
    ("--preset large", "argument --preset: invalid choice: 'large'"), ("--preset", "expected one argument"),
    ("--dry-run --fold -1", "expected an integer of at least 0"), ("--dry-run --no-such-flag", "--no-such-flag")])
def test_mistakes_are_one_line(line, message, capsys):
    with pytest.raises(SystemExit) as stop:
        toy().parse_args(line.split())
    printed = capsys.readouterr()
    assert stop.value.code == 2 and not printed.out
    assert message in printed.err and len(printed.err.splitlines()) == 1


def test_presets_are_listed_in_the_help(capsys):
    with pytest.raises(SystemExit):
        toy().parse_args(["--help"])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[-3:] == ["presets:", "paper  the large model (Table 1)",
                          "small  the small model (our run of two hours)"]


def test_without_presets_there_is_no_such_flag(capsys):
    for flag in ("--preset", "--dry-run"):
        with pytest.raises(SystemExit):
            Parser("A toy.", released={"lr": 1.0}).parse_args([flag, "paper"])
        assert f"unrecognized arguments: {flag}" in capsys.readouterr().err


def test_defaults_are_those_that_are_declared():
    p = toy()
    p.add_argument("--folds", type=lambda text: text.split(), default="0 1", help="read as if it were given")
    before = p.defaults()
    assert before == {"as_released": False, "lr": 1e-4, "fold": 0, "steps": 250, "warmup": True, "sizes": (8, 16),
                      "vae": None, "folds": ["0", "1"]}
    p.parse_args(["--preset", "paper", "--as-released"])
    assert p.defaults() == before


def help_of(p, capsys):
    """What --help prints, without its line breaks."""
    with pytest.raises(SystemExit):
        p.parse_args(["--help"])
    return " ".join(capsys.readouterr().out.split())


def test_the_help_shows_ranges_and_defaults(capsys):
    p = toy()
    p.add_argument("--size", type=integer(8, 2048), help="pixels (default: that of the data)")
    p.add_argument("--eta", type=number(0, 0.5), help="noise")
    p.add_argument("--share", default="50 %", help="of all")
    p.add_argument("--folds", nargs="*", type=integer(0), default=[], help="which")
    p.add_argument("--hidden", type=integer(0), default=3, help=argparse.SUPPRESS)
    shown = help_of(p, capsys)
    for expected in ("learning rate (at least 0; default: 0.0001)", "which fold (at least 0; default: 0)",
                     "of images (at least 1; default: 8 16)", "which (default: that of the data)",
                     "pixels (8 to 2048; default: that of the data)", "noise (0 to 0.5)", "of all (default: 50 %)",
                     "which (at least 0)"):
        assert expected in shown
    assert "--hidden" not in shown


@pytest.mark.parametrize("name", ["train", "evaluate", "classify", "sample_ddp", "prepare_data", "train_vae"])
def test_every_range_of_a_script_is_in_its_help(name, capsys):
    p, _ = parse(name, None)
    shown = help_of(p, capsys)
    ranges = [action.type.range for action in p._actions if hasattr(action.type, "range")]
    assert ranges and all(bounds in shown for bounds in ranges)


def test_a_script_may_speak_under_another_name(capsys):
    def fail():
        raise UserError("--x: is wrong")

    with pytest.raises(SystemExit):
        run(fail, name="table1.sh")
    assert capsys.readouterr().err == "table1.sh: error: --x: is wrong\n"
