"""Run folders: which one a command belongs to, and what is logged there."""

import json

import pytest

from core import runs
from core.errors import UserError

SETTINGS = {"lr": 1e-4, "fold": 0}


def make_run(folder, settings=SETTINGS):
    runs.RunLog(folder, settings, active=True).close()


def test_runs_are_numbered_after_the_highest(tmp_path):
    """Not by counting them: a deleted run must not make the next one land in another's folder."""
    assert runs.find_or_number(tmp_path / "nowhere", "GeCA-S-0", SETTINGS) == (tmp_path / "nowhere/000-GeCA-S-0", False)
    make_run(tmp_path / "000-GeCA-S-0")
    make_run(tmp_path / "004-DiT-S-0")
    assert runs.find_or_number(tmp_path, "GeCA-S-0", {"lr": 3e-4}) == (tmp_path / "005-GeCA-S-0", False)


def test_the_same_settings_continue_the_newest_run(tmp_path):
    make_run(tmp_path / "000-GeCA-S-0")
    make_run(tmp_path / "002-GeCA-S-0")
    make_run(tmp_path / "003-GeCA-S-0", {"lr": 2e-4, "fold": 0})
    make_run(tmp_path / "004-DiT-S-0")
    assert runs.find_or_number(tmp_path, "GeCA-S-0", SETTINGS) == (tmp_path / "002-GeCA-S-0", True)


def test_what_only_looks_like_a_run_is_passed_over(tmp_path):
    for name in ("100epochs-GeCA", "notes", "12-GeCA-S-0", "007-unfinished"):
        (tmp_path / name).mkdir()
    (tmp_path / "900-archive.zip").touch()
    assert runs.find_or_number(tmp_path, "GeCA-S-0", SETTINGS) == (tmp_path / "008-GeCA-S-0", False)


def test_damaged_settings_are_one_line(tmp_path):
    make_run(tmp_path / "000-GeCA-S-0")
    (tmp_path / "000-GeCA-S-0" / "settings.json").write_text('{"lr": 1e')
    with pytest.raises(UserError, match=r"settings\.json: damaged") as error:
        runs.find_or_number(tmp_path, "GeCA-S-0", SETTINGS)
    assert "\n" not in str(error.value)


def test_what_is_logged_and_by_whom(tmp_path, capsys):
    for active in (True, False):
        log = runs.RunLog(tmp_path / str(active), SETTINGS, active)
        log.text("half-way")
        log.metrics(7, loss=0.5, rate=2.0)
        log.close()
    assert not (tmp_path / "False").exists() and capsys.readouterr().out.count("half-way") == 1
    folder = tmp_path / "True"
    assert json.loads((folder / "metrics.jsonl").read_text()) == {"step": 7, "loss": 0.5, "rate": 2.0}
    lines = (folder / "log.txt").read_text().splitlines()
    assert [line.partition("] ")[2].split(":")[0] for line in lines] == ["command", "versions", "half-way"]
    assert json.loads((folder / "settings.json").read_text()) == SETTINGS and (folder / "checkpoints").is_dir()
