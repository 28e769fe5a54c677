"""Faults made on purpose: scripts in processes of their own that are killed or run out of disk, and counts of it all.

    FAULTS=docs/logs/faults.json ./test.sh --long tests/test_faults.py
    FAULTS=docs/logs/damage.json ./test.sh --long tests/test_fuzz.py
    python tests/faults.py docs/logs/faults.json docs/logs/damage.json     writes the tables of docs/ROBUSTNESS.md

A process is forked from a server that has imported the libraries already, so that a hundred runs take minutes.
"""

import hashlib
import json
import multiprocessing
import os
import re
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core.cli import Parser, run  # noqa: E402

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1",
               "GIT_DIR": os.devnull}  # a commit, which reports name, may be made while the suite runs
LIBRARIES = ["accelerate", "diffusers", "matplotlib.pyplot", "numpy", "PIL.Image", "safetensors.torch", "scipy.stats",
             "sklearn", "timm", "torch", "torch.utils.tensorboard", "torchmetrics", "torchvision", "lpips"]
WAIT = 300  # seconds after which a script that should have ended is taken to hang

# ---- scripts in processes of their own

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(LIBRARIES)


class Job:
    """A script at work; `events` counts what it did to the file system below `folder`."""

    def __init__(self, script, arguments, folder, kill_at=0, file_limit=0, die_of_limit=False):
        """Dies before its event number `kill_at`; files end at `file_limit` bytes, by an error or by its death."""
        self.events = server.Value("q", 0, lock=False)
        self.printed = bytearray()
        reader, writer = server.Pipe(duplex=False)  # a limit on files is none for a pipe
        self.process = server.Process(target=_work, args=(script, [*map(str, arguments)], str(folder), writer,
                                                          self.events, kill_at, file_limit, die_of_limit))
        self.started = time.monotonic()
        with mock.patch.dict(os.environ, ENVIRONMENT):  # the server takes it when it starts
            self.process.start()
        writer.close()
        self.reader = threading.Thread(target=self._read, args=(reader,), daemon=True)
        self.reader.start()

    def _read(self, reader):
        while piece := os.read(reader.fileno(), 1 << 16):
            self.printed += piece

    def wait(self, seconds=WAIT):
        """The exit code; negative is a signal. Killed, and an error, where it takes longer."""
        self.process.join(seconds)
        self.seconds = time.monotonic() - self.started
        if self.process.exitcode is None:
            self.kill()
            raise AssertionError(f"hangs: {self.text[-2000:]}")
        return self.process.exitcode

    def kill(self):
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()

    @property
    def text(self):
        """What it has printed, once it has ended."""
        self.reader.join(10)
        return self.printed.decode(errors="replace")

    @property
    def refused(self):
        """Whether it ended as a mistake of the user does: exit code 2, one line that names the script, no traceback."""
        lines = re.findall(r"^\w+\.py: error: .*$", self.text, re.MULTILINE)
        return self.process.exitcode == 2 and len(lines) == 1 and "Traceback" not in self.text


def _work(script, arguments, folder, output, events, kill_at, file_limit, die_of_limit):
    """In the new process: run the script as `python script arguments` would."""
    os.dup2(output.fileno(), 1), os.dup2(output.fileno(), 2)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    os.chdir(ROOT)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if file_limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if die_of_limit else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

    def notice(event, details):
        if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            return
        if event == "open" and not (isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if isinstance(details[0], (str, Path)) and str(details[0]).startswith(folder):
            events.value += 1
            if events.value == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(notice)
    torch.set_num_threads(1)
    sys.argv = [str(ROOT / script), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


def ranks(launched):
    """The processes that torchrun (a Popen) has started: rank -> process id."""
    found = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError):  # it may end while we look
            if int(file.read_text().rpartition(")")[2].split()[1]) == launched.pid:
                environment = (file.parent / "environ").read_bytes().split(b"\0")
                found |= {int(entry[5:]): int(file.parent.name) for entry in environment if entry.startswith(b"RANK=")}
    return found


def torchrun(output, *command, processes=2):
    """Start a script as several processes -> Popen; what they print goes to a file."""
    with open(output, "wb") as file:
        return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone",
                                 f"--nproc_per_node={processes}", *map(str, command)], cwd=ROOT, stdout=file,
                                stderr=subprocess.STDOUT, env={**os.environ, **ENVIRONMENT})


# ---- disks

@cache
def may_mount():
    """Whether this user may make disks."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(["mount", "-t", "tmpfs", "faults", folder], capture_output=True)
        return done.returncode == 0 and subprocess.run(["umount", folder]).returncode == 0


@contextmanager
def small_disk(folder, size):
    """Within it `folder` is a disk of `size` bytes, or a page -> a function that makes it larger."""
    folder.mkdir()

    def mount(options):
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "faults", folder], check=True)

    mount(f"size={max(size, resource.getpagesize())}")
    try:
        yield lambda: mount("remount,size=1g")
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def size_of(folder):
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# ---- what a script has made

VOLATILE = {"minutes", "seconds", "images_per_second", "steps_per_second", "memory_mib", "versions", "crc32"}
IGNORED = re.compile(r".*\.lock|log\.txt|events\.out\..*|.*\.pdf")  # hold times of day, or nothing
SHARD = re.compile(r"shard-\d+\.safetensors")


def contents(folder):
    """Path -> what stands for all that the file holds, but for times and the name of the folder. To be compared.

    Also what a killed process left half-written, which should not be there.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not IGNORED.fullmatch(path.name)]
    shards = [load_file(path) for path in files if SHARD.fullmatch(path.name)]  # which images are in which may differ
    return {str(path.relative_to(folder)): _content(path, str(folder)) for path in files
            if not SHARD.fullmatch(path.name)} | {f"latents: {name}": fingerprint(torch.cat(
                [shard[name] for shard in shards])) for name in ("mean", "std", "labels") if shards}


def fingerprint(value):
    """What stands for a value of tensors, arrays, paths and plain values. To be compared."""
    if isinstance(value, np.ndarray):
        return _plain(torch.tensor(value), "") if value.dtype.kind in "biuf" else value.tolist()
    if isinstance(value, torch.Tensor):
        return _plain(value, "")
    if isinstance(value, dict):
        return {name: fingerprint(inner) for name, inner in value.items()}
    return [fingerprint(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _content(path, folder):
    if path.suffix == ".pt":
        return _plain(torch.load(path, map_location="cpu", weights_only=True), folder)
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            about = {key: value for key, value in (file.metadata() or {}).items() if key not in VOLATILE}
        return _plain([load_file(path), about], folder)
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return _plain({name: torch.as_tensor(arrays[name]) if arrays[name].dtype.kind in "biuf" else
                           arrays[name].tolist() for name in arrays}, folder)
    if path.suffix == ".json":
        return _plain(json.loads(path.read_text()), folder)
    if path.suffix == ".jsonl":
        return _plain([json.loads(line) for line in path.read_text().splitlines()], folder)
    return hashlib.sha256(path.read_bytes().replace(folder.encode(), b"FOLDER")).hexdigest()


def _plain(value, folder):
    if isinstance(value, torch.Tensor):
        raw = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(raw).hexdigest()}"
    if isinstance(value, dict):
        return {str(key): _plain(inner, folder) for key, inner in value.items() if key not in VOLATILE}
    if isinstance(value, (list, tuple)):
        return [_plain(inner, folder) for inner in value]
    return value.replace(folder, "FOLDER") if folder and isinstance(value, str) else value


# ---- counts

class Counts:
    """How often each fault was tried, on what, and what came of it; kept in a file, if one is named."""

    def __init__(self, file):
        self.file, self.rows = file, defaultdict(Counter)

    def add(self, fault, subject, outcome):
        self.note(fault, subject, outcome)
        self.write()

    def note(self, fault, subject, outcome):
        """Without a write."""
        self.rows[fault, subject][outcome] += 1

    def write(self):
        if self.file:
            rows = [{"fault": fault, "subject": subject, **outcomes} for (fault, subject), outcomes in
                    self.rows.items()]
            Path(self.file).write_text(json.dumps(rows, indent=1) + "\n")


counts = Counts(os.environ.get("FAULTS"))


def tables(rows):
    """Rows of `Counts` as Markdown: a table for each fault, with the sum of its rows."""
    faults = defaultdict(list)
    for row in rows:
        faults[row.pop("fault")].append(row)
    for fault, found in faults.items():
        columns = list(dict.fromkeys(name for row in found for name in row if name != "subject"))
        total = {"subject": "**all**", **{name: sum(row.get(name, 0) for row in found) for name in columns}}
        yield f"\n### {fault}\n"
        yield "| | tried | " + " | ".join(columns) + " |"
        yield "|---|" + "---|" * (len(columns) + 1)
        for row in [*found, total]:
            values = [row.get(name, 0) for name in columns]
            yield f"| {row['subject']} | {sum(values):,} | " + " | ".join(f"{value:,}" for value in values) + " |"


def main():
    p = Parser(__doc__)
    p.add_argument("counts", type=Path, nargs="+", metavar="JSON", help="what the suite wrote")
    args = p.parse_args()
    page = ROOT / "docs" / "ROBUSTNESS.md"
    before, start, _, end, after = re.split(r"(<!-- counts -->\n)(.*)(<!-- end of counts -->\n)", page.read_text(),
                                            flags=re.DOTALL)
    made = "\n".join(tables([row for file in args.counts for row in json.loads(file.read_text())]))
    page.write_text(before + start + made + "\n\n" + end + after)


if __name__ == "__main__":
    run(main)
