"""Progress: a bar on a terminal, whole lines in a log."""

import io
import itertools
import sys

from core import progress
from core.progress import progress_bar, say


class Clock:
    """Stands for `time.time` of tqdm: goes on only where a test says so."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def work(steps, seconds, title="training", **options):
    """Work of so many steps of so many seconds each."""
    clock = Clock()
    with progress_bar(total=steps, unit="steps", title=title, **options) as bar:
        bar._time, bar.start_t, bar.last_print_t = clock, clock.now, clock.now
        for i in range(steps - bar.n):
            clock.now += seconds
            bar.set_postfix(loss=f"{1 / (i + 1):.2f}", refresh=False)
            bar.update()


def test_short_work_leaves_nothing_in_a_log(capsys):
    work(steps=9, seconds=1)
    assert capsys.readouterr().err == ""


def test_a_log_has_whole_lines_of_steps_loss_rate_and_time_left(capsys):
    work(steps=12, seconds=5)
    log = capsys.readouterr().err
    first, *_, last = log.splitlines()
    assert first == "training: 2 of 12 steps, 0.20 steps/s, 00:10 gone, 00:50 left, loss=0.50"
    assert last == "training: 12 of 12 steps, 0.20 steps/s, 01:00 gone, 00:00 left, loss=0.08"
    assert "\r" not in log and log.count("12 of 12") == 1


def test_lines_become_rarer(capsys):
    """A line is due after a tenth of the time so far, but after ten minutes at the latest: 24 hours are 200 lines."""
    work(steps=24 * 3600 // 5, seconds=5)
    lines = capsys.readouterr().err.splitlines()
    assert 150 < len(lines) < 250
    steps = [int(line.split()[1]) for line in lines]
    gaps = [5 * (b - a) for a, b in itertools.pairwise(steps)]
    assert gaps[0] == progress.SOONEST and max(gaps) == progress.LATEST


def test_what_was_there_already_counts_as_done_and_not_as_speed(capsys):
    work(steps=12, seconds=5, initial=8)
    first = capsys.readouterr().err.splitlines()[0]
    assert first == "training: 10 of 12 steps, 0.20 steps/s, 00:10 gone, 00:10 left, loss=0.50"


def test_others_than_the_first_process_say_nothing(capsys):
    with progress_bar(total=3, unit="steps", active=False) as bar:
        bar.update(3)
    assert capsys.readouterr().err == ""


def test_a_terminal_has_a_bar_and_lines_stand_above_it(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", terminal)
    with progress_bar(total=4, unit="steps", title="training") as bar:
        bar.update(4)
        say("half-way")
    assert "training: 100%|" in terminal.getvalue() and "4/4 steps" in terminal.getvalue()
    assert "\rhalf-way\n" in terminal.getvalue() or "\nhalf-way\n" in terminal.getvalue()
