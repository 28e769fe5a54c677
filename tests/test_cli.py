"""Command lines: what a flag comes to from the command line, a preset, --as-released or its default."""

from types import SimpleNamespace

import pytest

from core.cli import Parser, integer, number

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
