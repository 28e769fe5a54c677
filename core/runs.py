"""Run folders: which one a command belongs to, and what it logs there."""

import json
import sys
import time
from pathlib import Path

from core import claims
from core.files import read_jsonl, write_text
from core.runtime import versions


def find_or_number(results_dir, name, settings, defaults=None, renamed=None):
    """The folder of the run with these settings, or the next free one: (folder, whether it exists, note).

    Folders are {results_dir}/{index:03d}-{name}. The newest run with the same settings (`core.claims.differences`;
    with its `defaults`, here those of the flags, `core.cli.Parser.defaults`, and `renamed` settings) is continued,
    so that the same command resumes; the number of a new run is one more than the highest, so a deleted run frees no
    number. `note`: where a new run starts although others have its name, one line that says in which settings the most
    similar one differs; else None.
    """
    runs = sorted(path for path in Path(results_dir).glob("[0-9][0-9][0-9]*-*")
                  if path.is_dir() and path.name.partition("-")[0].isdecimal())
    similar = []  # the runs of this name, the newest first: (folder, what differs)
    for path in reversed(runs):
        stored = claims.read_settings(path, "remove the run folder") if path.name.partition("-")[2] == name else None
        if stored is not None:
            similar.append((path, claims.differences(stored, settings, defaults, renamed)))
            if not similar[-1][1]:
                return path, True, None
    index = max((int(path.name.partition("-")[0]) for path in runs), default=-1) + 1
    folder = Path(results_dir) / f"{index:03d}-{name}"
    if not similar:
        return folder, False, None
    nearest, different = min(similar, key=lambda run: len(run[1]))
    return folder, False, (f"run {nearest.name} would be continued but for {claims.described(different)}; "
                           f"starting {folder.name}")


class RunLog:
    """log.txt and the screen, metrics.jsonl, TensorBoard; silent on all processes but the first."""

    def __init__(self, folder, settings, active, step=0):
        """`step`: where the run goes on; what was logged after it is forgotten, since it comes again."""
        self.folder, self.active = Path(folder), active
        if not active:
            return
        from torch.utils.tensorboard import SummaryWriter  # here, so that only who logs waits for it

        (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        claims.write_settings(self.folder, settings)
        self.board = SummaryWriter(self.folder, purge_step=step + 1)
        self._forget_after(step)
        self.text("command: " + " ".join(sys.argv))
        self.text(f"versions: {versions()}")

    def _forget_after(self, step):
        file = self.folder / "metrics.jsonl"
        if file.is_file():
            records = read_jsonl(file, "remove it; the run goes on without its earlier metrics")
            write_text(file, "".join(json.dumps(record) + "\n" for record in records if record["step"] <= step))

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
