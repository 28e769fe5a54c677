"""Run folders: which one a command belongs to, and what is logged there."""

import io
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from core import claims, runs
from core.errors import UserError
from core.files import HOST, read_jsonl

SETTINGS = {"lr": 1e-4, "fold": 0}


def make_run(folder, settings=SETTINGS):
    folder.mkdir(parents=True, exist_ok=True)
    claims.write_settings(folder, settings)


# ---- settings

@pytest.mark.parametrize("stored, wanted, defaults, expected", [
    ({"lr": 1e-4, "sizes": [1, 2]}, {"lr": 1e-4, "sizes": (1, 2)}, {}, {}),
    ({"lr": 1e-4}, {"lr": 1e-4, "warmup": True}, {"warmup": True}, {}),  # from before there was the flag
    ({"lr": 1e-4}, {"lr": 1e-4, "warmup": False}, {"warmup": True}, {"warmup": (True, False)}),
    ({"lr": 1e-4}, {"lr": 1e-4, "codec": "a"}, {}, {"codec": (None, "a")}),
    ({"lr": 1e-4}, {"lr": 1e-4, "codec": None}, None, {}),
    ({"lr": 1e-4, "gone": None}, {"lr": 1e-4}, {"gone": 1}, {}),
    ({"lr": 1e-4, "gone": 3}, {"lr": 1e-4}, {}, {"gone": (3, None)}),
    ({"warmup": False}, {"warmup": True}, {"warmup": True}, {"warmup": (False, True)}),  # stored: no default counts
    ({}, {"sizes": (8, 16)}, {"sizes": (8, 16)}, {}),
])
def test_differences_of_settings(stored, wanted, defaults, expected):
    assert claims.differences(stored, wanted, defaults) == expected


def test_settings_are_read_back_and_may_be_absent(tmp_path):
    assert claims.read_settings(tmp_path) is None
    claims.write_settings(tmp_path, {"sizes": (1, 2), "lr": 1e-4})
    assert claims.read_settings(tmp_path) == {"sizes": [1, 2], "lr": 1e-4}
    assert claims.described({"lr": (3e-4, 1e-3), "codec": ("x" * 99, None)}) == (
        f"lr 0.0003 (now 0.001), codec {'x' * 60} (now None)")


# ---- folders

def test_runs_are_numbered_after_the_highest(tmp_path):
    """Not by counting them: a deleted run must not make the next one land in another's folder."""
    assert runs.find(tmp_path / "nowhere", "GeCA-S-0", SETTINGS) == (
        tmp_path / "nowhere/000-GeCA-S-0", False, None)
    make_run(tmp_path / "000-GeCA-S-0")
    make_run(tmp_path / "004-DiT-S-0")
    assert runs.find(tmp_path, "GeCA-S-0", {"lr": 3e-4})[:2] == (tmp_path / "005-GeCA-S-0", False)
    assert runs.find(tmp_path, "LDM-B-0", SETTINGS) == (tmp_path / "005-LDM-B-0", False, None)


def test_the_same_settings_continue_the_newest_run(tmp_path):
    make_run(tmp_path / "000-GeCA-S-0")
    make_run(tmp_path / "002-GeCA-S-0")
    make_run(tmp_path / "003-GeCA-S-0", {"lr": 2e-4, "fold": 0})
    make_run(tmp_path / "004-DiT-S-0")
    assert runs.find(tmp_path, "GeCA-S-0", SETTINGS) == (tmp_path / "002-GeCA-S-0", True, None)


def test_a_run_from_before_a_flag_existed_is_continued(tmp_path):
    make_run(tmp_path / "000-GeCA-S-0")
    wanted, defaults = {**SETTINGS, "ema_warmup": True}, {"ema_warmup": True, "lr": 7, "other": 1}
    assert runs.find(tmp_path, "GeCA-S-0", wanted, defaults) == (tmp_path / "000-GeCA-S-0", True, None)
    make_run(tmp_path / "000-GeCA-S-0", wanted)  # as it is when it goes on
    assert runs.find(tmp_path, "GeCA-S-0", wanted, defaults) == (tmp_path / "000-GeCA-S-0", True, None)
    other = {**wanted, "ema_warmup": False}
    assert runs.find(tmp_path, "GeCA-S-0", other, defaults) == (
        tmp_path / "001-GeCA-S-0", False,
        "run 000-GeCA-S-0 would be continued but for ema_warmup True (now False); starting 001-GeCA-S-0")


def test_the_most_similar_run_is_named(tmp_path):
    make_run(tmp_path / "000-GeCA-S-0", {"lr": 1e-3, "fold": 0, "epochs": 5})
    make_run(tmp_path / "001-GeCA-S-0", {"lr": 3e-4, "fold": 0, "epochs": 6})
    make_run(tmp_path / "002-GeCA-S-0", {"lr": 2e-4, "fold": 1, "epochs": 5})
    make_run(tmp_path / "003-DiT-S-0", {"lr": 1e-4, "fold": 0, "epochs": 6})

    def note(**settings):
        return runs.find(tmp_path, "GeCA-S-0", settings)[2]

    assert note(lr=1e-4, fold=0, epochs=5) == (
        "run 000-GeCA-S-0 would be continued but for lr 0.001 (now 0.0001); starting 004-GeCA-S-0")
    assert note(lr=1e-4, fold=0, epochs=7) == (  # of equals the newest
        "run 001-GeCA-S-0 would be continued but for lr 0.0003 (now 0.0001), epochs 6 (now 7); starting 004-GeCA-S-0")


def test_what_only_looks_like_a_run_is_passed_over(tmp_path):
    for name in ("100epochs-GeCA", "notes", "12-GeCA-S-0", "007-unfinished", "006-GeCA-S-0"):
        (tmp_path / name).mkdir()
    (tmp_path / "900-archive.zip").touch()
    assert runs.find(tmp_path, "GeCA-S-0", SETTINGS) == (tmp_path / "008-GeCA-S-0", False, None)


def test_a_claimed_run_is_this_jobs_and_no_others(tmp_path):
    """A second job with the same settings is told whose it is; one with others gets a number of its own."""
    results = tmp_path / "results"
    folder, exists, note = runs.claim(results, "GeCA-S-0", SETTINGS)
    runs.hold(folder)
    runs.hold(folder)  # its own
    assert (folder, exists, note) == (results / "000-GeCA-S-0", False, None)
    assert claims.read_settings(folder) == SETTINGS
    program = ("import sys; from core import runs; from core.errors import UserError\n"
               "try:\n    found = runs.claim(sys.argv[1], 'GeCA-S-0', {'lr': float(sys.argv[2]), 'fold': 0})[0]\n"
               "    runs.hold(found); print(found.name)\n"
               "except UserError as error: print(error)")

    def other_job(lr):
        return subprocess.run([sys.executable, "-c", program, results, lr], cwd=ROOT, capture_output=True,
                              text=True).stdout.strip()

    assert re.fullmatch(rf"{folder}: another job works here \(process {os.getpid()} on .*\); wait for it or stop it",
                        other_job("1e-4"))
    assert other_job("2e-4") == "001-GeCA-S-0"
    assert other_job("2e-4") == "001-GeCA-S-0"  # the lock has gone with the job


def test_holding_a_folder_removes_what_dead_jobs_left_in_it(tmp_path):
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    pid = dead.stdout.strip()
    gone = [tmp_path / f".a.json.{pid}.tmp", tmp_path / "checkpoints" / f".last.pt.{pid}@{HOST}.tmp"]
    kept = [tmp_path / f".a.json.{pid}@elsewhere.tmp", tmp_path / f".a.json.{os.getpid()}@{HOST}.tmp",
            tmp_path / "mine.tmp"]
    (tmp_path / "checkpoints").mkdir()
    for file in gone + kept:
        file.write_text("half")
    runs.hold(tmp_path)
    assert not any(file.exists() for file in gone) and all(file.exists() for file in kept)


def test_damaged_settings_are_one_line(tmp_path):
    make_run(tmp_path / "000-GeCA-S-0")
    (tmp_path / "000-GeCA-S-0" / "settings.json").write_text('{"lr": 1e')
    with pytest.raises(UserError, match=r"settings\.json: damaged .*; remove the run folder") as error:
        runs.find(tmp_path, "GeCA-S-0", SETTINGS)
    assert "\n" not in str(error.value)


# ---- logs

def test_what_is_logged_and_by_whom(tmp_path, capsys):
    for active in (True, False):
        log = runs.RunLog(tmp_path / str(active), active)
        log.text("half-way")
        log.metrics(7, loss=0.5, rate=2.0)
        log.close()
    assert not (tmp_path / "False").exists() and capsys.readouterr().out.count("half-way") == 1
    folder = tmp_path / "True"
    assert read_jsonl(folder / "metrics.jsonl", "advice") == [{"step": 7, "loss": 0.5, "rate": 2.0}]
    lines = (folder / "log.txt").read_text().splitlines()
    assert [line.partition("] ")[2].split(":")[0] for line in lines] == ["command", "versions", "half-way"]
    assert (folder / "checkpoints").is_dir()


def test_a_command_that_is_no_text_is_logged(tmp_path, monkeypatch):
    """A path in it may have any bytes; the lock names it too."""
    monkeypatch.setattr(sys, "argv", ["train.py", os.fsdecode(b"sch\xfcler")])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace"))
    runs.hold(tmp_path)
    runs.RunLog(tmp_path, active=True).close()
    for name in ("log.txt", runs.LOCK):
        assert "train.py sch\\udcfcler\n" in (tmp_path / name).read_text()


def test_what_comes_again_is_forgotten_and_a_torn_line_is_no_obstacle(tmp_path):
    log = runs.RunLog(tmp_path, active=True)
    for step in (1, 2, 3):
        log.metrics(step, loss=1 / 3)
    log.close()
    kept = "".join((tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)[:2])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    runs.RunLog(tmp_path, active=True, step=2).close()
    assert (tmp_path / "metrics.jsonl").read_text() == kept


def test_tensorboard_is_imported_by_those_who_log_alone():
    program = "import sys; from core import runs; sys.exit('tensorboard' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
