"""Run folders: which one a command belongs to, and what it logs there."""

import math
import sys
import time
from pathlib import Path

from core import claims, locks, trackers
from core.errors import UserError
from core.files import json_line, make_folder, read_jsonl, remove_leftovers, write_text
from core.progress import say
from core.runtime import versions
from core.schema import Number

METRICS = {"step": Number(), str: (float, None)}  # schema of a line of metrics.jsonl

LOCK = ".lock"  # in a folder of runs and in each run
CHECKPOINTS = ("best_ckpt.pt", "last_ckpt.pt")  # of a run, in the order in which they are preferred


def checkpoint_file(path, flag):
    """The file that a path of a checkpoint means: itself, or what a run folder holds.

    Of a run folder, or its checkpoints/, that is the best checkpoint or, where none was validated, the last; of another
    folder the only file of weights in it. Raises UserError for a folder with none or several; a missing file is left to
    the reader.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    for file in (folder / name for folder in (path / "checkpoints", path) for name in CHECKPOINTS):
        if file.is_file():
            return file
    files = sorted(p for p in path.iterdir() if p.suffix in (".pt", ".safetensors"))
    if len(files) == 1:
        return files[0]
    inside = files or sorted(p for p in path.iterdir() if (p / "checkpoints").is_dir())
    found = "; name one of " + ", ".join(p.name for p in inside[:3]) + ", ..." * (len(inside) > 3) if inside else ""
    raise UserError(f"{flag} {path}: no run folder (it has no checkpoints/{' or '.join(CHECKPOINTS)}){found}")


def claim(results_dir, name, settings, defaults=None, passed_over=(), renamed=None):
    """What `find` returns, after making the folder: it belongs to these settings, and no other job takes its number."""
    results_dir = Path(results_dir)
    make_folder(results_dir, "--results-dir")
    with locks.alone(results_dir / LOCK):  # two jobs that start together take two numbers
        folder, exists, note = find(results_dir, name, settings, defaults, passed_over, renamed)
        folder.mkdir(exist_ok=True)
        remove_leftovers(folder)
        claims.write_settings(folder, settings)
    return folder, exists, note


def find(results_dir, name, settings, defaults=None, passed_over=(), renamed=None):
    """The folder of the run with these settings, or the next free one: (folder, whether it exists, note).

    Folders are {results_dir}/{index:03d}-{name}. The newest run with the same settings (`core.claims.differences`;
    with its `defaults`, here those of the flags, `core.cli.Parser.defaults`) is continued, so that the same command
    resumes; the number of a new run is one more than the highest, so a deleted run frees no number. `passed_over`:
    names that are no settings, though older runs have them among theirs; `renamed` as in `differences`. `note`: where a
    new run starts although others have its name, one line that says in which settings the most similar one differs;
    else None.
    """
    results_dir = Path(results_dir)
    runs = sorted(path for path in results_dir.glob("[0-9][0-9][0-9]*-*")
                  if path.is_dir() and path.name.partition("-")[0].isdecimal())
    similar = []  # the runs of this name, the newest first: (folder, what differs)
    for path in reversed(runs):
        stored = claims.read_settings(path, "remove the run folder") if path.name.partition("-")[2] == name else None
        if stored is not None:
            stored = {key: stored[key] for key in stored if key in settings or key not in passed_over}
            similar.append((path, claims.differences(stored, settings, defaults, renamed)))
            if not similar[-1][1]:
                return path, True, None
    index = max((int(path.name.partition("-")[0]) for path in runs), default=-1) + 1
    folder = results_dir / f"{index:03d}-{name}"
    if not similar:
        return folder, False, None
    nearest, different = min(similar, key=lambda run: len(run[1]))
    return folder, False, (f"run {nearest.name} would be continued but for {claims.described(different)}; "
                           f"starting {folder.name}")


def hold(folder):
    """Keep other jobs out of a folder until this process ends, and remove what killed ones left half-written there.

    Raises UserError where another job is at work in it.
    """
    make_folder(folder, "folder")
    locks.hold(Path(folder) / LOCK)
    for place in (folder, *filter(Path.is_dir, Path(folder).iterdir())):
        remove_leftovers(place)


class RunLog:
    """log.txt and the screen, metrics.jsonl, a tracker; silent on all processes but the first."""

    def __init__(self, folder, active, step=0, tracker="tensorboard", about=None):
        """`step`: where the run goes on; what was logged after it is forgotten, since it comes again.

        `tracker`: one of core.trackers.TRACKERS; `about`: flags of the run for it, name -> plain value.
        """
        self.folder, self.active, self.tracker = Path(folder), active, None
        if not active:
            return
        (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        self.tracker = trackers.start(tracker, self.folder, step, about or {})
        self._forget_after(step)
        self.text("command: " + " ".join(sys.argv))
        self.text(f"versions: {versions()}")

    def _forget_after(self, step):
        file = self.folder / "metrics.jsonl"
        if file.is_file():
            records = read_jsonl(file, "remove it; the run goes on without its earlier metrics", METRICS)
            write_text(file, "".join(json_line(record) for record in records if record["step"] <= step))

    def text(self, line):
        """One line to the screen and log.txt."""
        if self.active:
            say(line)
            with open(self.folder / "log.txt", "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] {line}\n")

    def metrics(self, step, **values):
        """One line of metrics.jsonl, and a point of each value for the tracker."""
        if self.active:
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
                file.write(json_line({"step": step, **finite}))
            if self.tracker:
                self.tracker.log(values, step=step)

    def picture(self, step, name, picture):
        """A picture, uint8 (H, W, 3), for the tracker."""
        if self.tracker:
            trackers.log_picture(self.tracker, step, name, picture)

    def close(self):
        if self.tracker:
            self.tracker.finish()
