"""presets.py: every name in it is a flag of the script that reads it; what a preset fills in, what the defaults are."""

import shlex

import pytest
from conftest import call_script

import classify
import extract_features
import sample_ddp
import train
from presets import PAPER_CLASSIFIER, PAPER_SAMPLING, PAPER_SPACE, PAPER_TRAINING, PRESETS, presets_of
from scripts import plan

PARSERS = {"extract": extract_features.parser(), "train": train.parser(), "sample": sample_ddp.parser("", ""),
           "expand": sample_ddp.parser("", "", "expand"), "classify": classify.parser(),
           "table": plan.parser()}
REQUIRED = {"extract": "--data-path a --features-path b", "train": "--data-path a --feature-path b",
            "sample": "--data-path a --ckpt b", "expand": "--data-path a --ckpt b", "classify": "--data-path a",
            "table": "1 --data a"}


@pytest.mark.parametrize("name", PRESETS)
def test_every_setting_is_a_flag_and_has_a_value_that_it_takes(name):
    preset = PRESETS[name]
    assert preset.description and preset.source
    for section, settings in preset.settings.items():
        parser = PARSERS[section]
        assert settings.keys() <= parser.defaults().keys()
        single = {action.dest for action in parser._actions if action.nargs is None}
        flags = []
        for dest, value in settings.items():
            words = list(map(str, value)) if isinstance(value, list) else [str(value)]
            flags += [f"--{dest.replace('_', '-')}", *([" ".join(words)] if dest in single else words)]
        given = parser.parse_args([*shlex.split(REQUIRED[section]), *flags])
        assert all(getattr(given, dest) == value for dest, value in settings.items())


@pytest.mark.parametrize("name", presets_of("train"))
def test_a_preset_fills_in_what_is_not_given(name):
    bare = shlex.split(REQUIRED["train"])
    taken = vars(train.parser().parse_args(["--preset", name, *bare]))
    settings = PRESETS[name].settings["train"]
    assert {dest: taken[dest] for dest in settings} == settings
    assert vars(train.parser().parse_args(["--preset", name, "--lr", "0.5", *bare])) == {**taken, "lr": 0.5}


def test_without_a_preset_the_scripts_have_the_numbers_of_the_paper():
    assert {**PAPER_SPACE, **PAPER_TRAINING}.items() <= PARSERS["train"].defaults().items()
    assert PAPER_SPACE.items() <= PARSERS["extract"].defaults().items()
    assert PAPER_SAMPLING.items() <= PARSERS["sample"].defaults().items()
    assert PAPER_CLASSIFIER.items() <= PARSERS["classify"].defaults().items()


def test_validation_is_cheap_where_no_preset_says_otherwise():
    defaults = PARSERS["train"].defaults()
    assert (defaults["sampler"], defaults["num_sampling_steps"], defaults["cfg_scale"]) == ("dpmpp", 25, 1.5)


def test_dry_run_says_where_each_setting_comes_from_and_does_nothing(tmp_path):
    """Without data nothing can be estimated: the settings are shown, and one line says what is missing."""
    done = call_script("train.py", "--preset", "small-geca-xs", "--lr", "0.5", "--data-path", tmp_path / "no",
                       "--feature-path", tmp_path / "no", "--dry-run")
    assert done.returncode == 2 and done.stderr.startswith("train.py: error: ") and done.stderr.count("\n") == 1
    rows = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert "0.5" in rows["--lr"] and "(given)" in rows["--lr"]
    assert "64" in rows["--image-size"] and "(preset small-geca-xs)" in rows["--image-size"]
    assert "(default)" in rows["--fold"] and not any(tmp_path.iterdir())


def test_a_table_of_small_runs_trains_every_model_by_its_own_preset(tmp_path, capsys):
    args = plan.parser().parse_args(["1", "--data", str(tmp_path), "--preset", "small"])
    assert args.model_preset == "small" and {f"small-{model.lower()}" for model in args.models} <= PRESETS.keys()
