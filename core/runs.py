"""Run folders: which one a command belongs to, and what it logs there."""

import json
import sys
import time
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from core.errors import UserError
from core.files import write_text
from core.runtime import versions


def find_or_number(results_dir, name, settings):
    """The folder of the run with these settings, or the next free one: (folder, whether it exists).

    Folders are {results_dir}/{index:03d}-{name}. The newest run with the same settings is continued, so the same
    command resumes; the number of a new run is one more than the highest, so a deleted run frees no number.
    """
    runs = sorted(path for path in Path(results_dir).glob("[0-9][0-9][0-9]*-*")
                  if path.is_dir() and path.name.partition("-")[0].isdecimal())
    for path in reversed(runs):
        if path.name.partition("-")[2] == name and _settings(path) == settings:
            return path, True
    index = max((int(path.name.partition("-")[0]) for path in runs), default=-1) + 1
    return Path(results_dir) / f"{index:03d}-{name}", False


def _settings(path):
    file = path / "settings.json"
    try:
        return json.loads(file.read_text()) if file.is_file() else None
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: damaged ({error}); remove the run folder") from None


class RunLog:
    """log.txt and the screen, metrics.jsonl, TensorBoard; silent on all processes but the first."""

    def __init__(self, folder, settings, active, step=0):
        """`step`: where the run goes on; what was logged after it is forgotten, since it comes again."""
        self.folder, self.active = Path(folder), active
        if not active:
            return
        (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        write_text(self.folder / "settings.json", json.dumps(settings, indent=1) + "\n")
        self.board = SummaryWriter(self.folder, purge_step=step + 1)
        self._forget_after(step)
        self.text("command: " + " ".join(sys.argv))
        self.text(f"versions: {versions()}")

    def _forget_after(self, step):
        file = self.folder / "metrics.jsonl"
        if file.is_file():
            kept = [line for line in file.read_text().splitlines() if json.loads(line)["step"] <= step]
            write_text(file, "".join(f"{line}\n" for line in kept))

    def text(self, line):
        """One line to the screen and log.txt."""
        if self.active:
            print(line, flush=True)
            with open(self.folder / "log.txt", "a", encoding="utf-8") as file:
                file.write(f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] {line}\n")

    def metrics(self, step, **values):
        """One line of metrics.jsonl, and a point of each value in TensorBoard."""
        if self.active:
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def close(self):
        if self.active:
            self.board.close()
