"""Whatever happens to a process or its disk, nothing is lost and nothing is wrong: killed, full, twice at once.

Each fault is tried a few times here; many times, on every script, with `./test.sh --long`. What came of it:
docs/ROBUSTNESS.md.
"""

import os
import random
import shutil
import signal
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import call_script, succeeded
from faults import Job, contents, counts, may_mount, ranks, size_of, small_disk, torchrun

from core.files import TEMPORARY
from core.tensors import read_tensors, write_tensors
from dataset.root import read_split

SIZE = ("--image-size", 32)
NET = ("--backbone", "test_byobnet", "--no-pretrained", *SIZE, "--lr", 0.05, "--log-every", 1, "--permutations", 99)
RUN = "000-GeCA-XS-0"
LONG = pytest.mark.long


@pytest.fixture(scope="module", name="world")
def made_world(tmp_path_factory, tiny_vae):
    """What the scripts take: a data root, its latents, a run, samples, scores; made without a fault."""
    place = tmp_path_factory.mktemp("world")
    at = SimpleNamespace(vae=tiny_vae, data=place / "data", store=place / "store", place=place,
                         ckpt=place / "runs" / RUN / "checkpoints" / "last_ckpt.pt")
    succeeded(call_script("prepare_data.py", "--source", "phantom", "--count", 56, *SIZE, "--folds", 2, "--output",
                          at.data))
    succeeded(call_script("extract_features.py", *extract(at, at.store)))
    succeeded(call_script("train.py", *train(at, place / "runs")))
    succeeded(call_script("sample_ddp_val.py", *sample(at, place / "samples")))
    (at.samples,) = (place / "samples").iterdir()
    succeeded(call_script("evaluate.py", *evaluate(at, place / "scores")))
    succeeded(call_script("classify.py", *classify(at, place / "scores" / "classified")))
    return at


def prepare(at, out):
    return "--source", "phantom", "--count", 24, *SIZE, "--folds", 2, "--output", out / "data"


def extract(at, out):
    return "--data-path", at.data, "--features-path", out, "--vae", at.vae, *SIZE, "--global-batch-size", 2


def train(at, out):
    return ("--model", "GeCA-XS", "--data-path", at.data, "--feature-path", at.store, "--vae", at.vae, "--features",
            at.vae, *SIZE, "--global-batch-size", 4, "--num-sampling-steps", 2, "--val-samples", 2, "--log-every", 1,
            "--lr", "1e-3", "--epochs", 2, "--validate-every", 1, "--ckpt-every", 1, "--results-dir", out)


def train_vae(at, out):
    return ("--data-path", at.data, "--output", out / "vae", "--steps", 6, "--batch-size", 2, "--crop", 16, "--widths",
            4, 4, 8, 8, "--scales", 32, "--sizes", 32, "--save-every", 1)


def sample(at, out):
    return ("--ckpt", at.ckpt, "--data-path", at.data, "--num-sampling-steps", 2, "--per-proc-batch-size", 2,
            "--sample-dir", out)


def evaluate(at, out):
    return ("--real", at.data, "--gen", at.samples, *SIZE, "--features", at.vae, "--lpips", "none", "--resamples", 20,
            "--subset-size", 2,
            "--output", out / "evaluated", "--cache", out / "cache")


def classify(at, out):
    return "--data-path", at.data, "--fold", 0, *NET, "--epochs", 3, "--output", out


def make_tables(at, out):
    return at.place / "scores" / "evaluated", at.place / "scores" / "classified", "--output", out / "tables"


def grow(at, out):
    return ("--ckpt", at.ckpt, "--labels", "null", "--count", 1, "--num-sampling-steps", 3, "--moments", 2, "--slow", 0,
            "--output", out / "growth")


def convert(at, out):
    return at.ckpt, "--to", out / "weights.safetensors"


SCRIPTS = {"prepare_data.py": prepare, "extract_features.py": extract, "train.py": train, "train_vae.py": train_vae,
           "sample_ddp.py": sample, "sample_ddp_val.py": sample, "evaluate.py": evaluate, "classify.py": classify,
           "make_tables.py": make_tables, "grow.py": grow, "generation/checkpoint.py": convert}


@pytest.fixture(scope="module")
def undisturbed(world):
    """A function: script -> what it makes where nothing happens (contents, events, seconds, bytes). Each runs once."""
    done = {}

    def result(script):
        if script not in done:
            out = world.place / "undisturbed" / script
            out.mkdir(parents=True)
            job = Job(script, SCRIPTS[script](world, out), out)
            assert job.wait() == 0, job.text
            sizes = [path.stat().st_size for path in out.rglob("*") if path.is_file()]
            done[script] = SimpleNamespace(contents=contents(out), events=job.events.value, seconds=job.seconds,
                                           largest=max(sizes), bytes=size_of(out), files=len(sizes))
        return done[script]

    return result


def finished(job, out, expected):
    """Whether a job that nothing happened to has made just what an undisturbed one makes, or finds it made."""
    assert job.wait() == 0 or (job.refused and "data: already exists; remove it" in job.text), job.text
    made = contents(out)
    assert made.keys() == expected.contents.keys(), job.text
    assert made == expected.contents


# ---- killed


def killed(script, world, out, expected, draw):
    """Start a script and kill it at a random moment -> "inside a write", "between writes", or None: it ended before.

    The moment is one of its events in the file system, a time, or a byte of one of its files.
    """
    kind, arguments = draw.choice(("event", "time", "byte")), SCRIPTS[script](world, out)
    if kind == "event":
        job = Job(script, arguments, out, kill_at=draw.randint(1, expected.events))
    elif kind == "byte":
        job = Job(script, arguments, out, file_limit=draw.randint(1, expected.largest), die_of_limit=True)
    else:
        job = Job(script, arguments, out)
        job.process.join(draw.uniform(0, expected.seconds))
        job.kill()
    code = job.wait()
    if code == 0:
        return None
    assert code in (-signal.SIGKILL, -signal.SIGXFSZ), job.text
    half = any(TEMPORARY.fullmatch(path.name) for path in out.rglob(".*.tmp"))
    return "killed inside a write" if half else "killed between writes"


@pytest.mark.parametrize("script, times", [("extract_features.py", 2), *(pytest.param(script, 12, marks=LONG)
                                                                          for script in SCRIPTS)])
def test_killed_and_started_again_is_as_if_never_killed(script, times, world, undisturbed, tmp_path):
    draw, expected, kills, chain = random.Random(script), undisturbed(script), 0, 0
    while kills < times:
        chain += 1
        assert chain <= 3 * times, "it always ends before it is killed"
        out = tmp_path / str(chain)
        out.mkdir()
        for _ in range(4):  # and then it may end
            moment = killed(script, world, out, expected, draw)
            if moment is None:
                break
            kills += 1
            counts.add("Killed at a random moment, then started again", script, moment)
        finished(Job(script, SCRIPTS[script](world, out), out), out, expected)
        shutil.rmtree(out)


@pytest.mark.parametrize("script", [pytest.param(script, marks=LONG) for script in (
    "extract_features.py", "train.py", "train_vae.py", "sample_ddp.py", "classify.py")])
@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGUSR1])
def test_asked_to_stop_and_started_again(script, kind, world, undisturbed, tmp_path):
    """With what Slurm sends before it preempts: it ends by itself, with the exit code that says so."""
    expected = undisturbed(script)
    moment = random.Random(f"{script} {kind}").randint(3, max(4, expected.events // 2))
    (tmp_path / "out").mkdir()
    job = Job(script, SCRIPTS[script](world, tmp_path / "out"), tmp_path / "out")
    while job.process.is_alive() and job.events.value < moment:
        time.sleep(0.01)
    if job.process.is_alive():
        os.kill(job.process.pid, kind)
    code = job.wait()
    assert code in (0, 75, -kind), job.text
    counts.add("Asked to stop (SIGTERM, SIGUSR1), then started again", script,
               {0: "it had ended", 75: "stopped, with exit code 75"}.get(code, "it had not begun, and ended at once"))
    finished(Job(script, SCRIPTS[script](world, tmp_path / "out"), tmp_path / "out"), tmp_path / "out", expected)


# ---- no room


@pytest.mark.parametrize("script, times", [("train.py", 1), *(pytest.param(script, 6, marks=LONG)
                                                               for script in SCRIPTS)])
def test_no_room_on_the_disk(script, times, world, undisturbed, tmp_path):
    """One line, exit code 2; with room, the same command makes what it makes anyway."""
    expected, draw = undisturbed(script), random.Random(script)
    for i in range(times):
        out = tmp_path / str(i)
        share = draw.uniform(0, 1)
        with small_disk(out, int(share * expected.bytes)) if i % 2 == 0 and may_mount() else nullcontext() as enlarge:
            out.mkdir(exist_ok=True)
            limit = 0 if enlarge else 1 + int(share * expected.largest)
            job = Job(script, SCRIPTS[script](world, out), out, file_limit=limit)
            code = job.wait()
            assert code == 0 or job.refused, job.text
            assert not [path for path in out.rglob(".*.tmp") if TEMPORARY.fullmatch(path.name)], job.text
            counts.add("No room: a full disk, or a limit on the size of files", script,
                       "enough room" if code == 0 else "one line")
            if enlarge:
                enlarge()
            finished(Job(script, SCRIPTS[script](world, out), out), out, expected)


# ---- two at once


@pytest.mark.parametrize("script, times", [("classify.py", 1), *(pytest.param(script, 4, marks=LONG)
                                                                  for script in SCRIPTS)])
def test_two_at_once(script, times, world, undisturbed, tmp_path):
    """One does the work; the other waits, is told who does it, or makes the same."""
    expected, draw = undisturbed(script), random.Random(script)
    for i in range(times):
        out = tmp_path / str(i)
        out.mkdir()
        arguments = SCRIPTS[script](world, out)
        first = Job(script, arguments, out)
        time.sleep(draw.uniform(0, expected.seconds / 2) if i else 0)
        second = Job(script, arguments, out)
        codes = sorted([first.wait(), second.wait()])
        assert codes == [0, 0] or (codes == [0, 2] and (first.refused or second.refused)), first.text + second.text
        counts.add("Two at once", script, "both made the same" if codes == [0, 0] else "one was told of the other")
        finished(Job(script, arguments, out), out, expected)


# ---- several processes, one of which dies


def launched(script, world, out, **changes):
    """A script as two processes, with more work than a minute's -> Popen."""
    more = {"train.py": ("--epochs", 10_000), "classify.py": ("--epochs", 10_000),
            "extract_features.py": ("--image-size", 1024), "sample_ddp.py": ("--expand-ratio", 2000)}[script]
    at = SimpleNamespace(**{**vars(world), **changes})
    if script == "classify.py":  # on a CPU, batch norm is computed in one process
        more += ("--backbone", "test_vit", "--image-size", 160)
    return torchrun(out.with_suffix(".log"), script, *SCRIPTS[script](at, out), *more)


def ended(launch, log, seconds=60):
    """What two processes have printed that end within a minute; no traceback of ours."""
    try:
        launch.wait(seconds)
    finally:
        for pid in [*ranks(launch).values(), launch.pid]:
            os.kill(pid, signal.SIGKILL) if launch.poll() is None else None
    text = log.read_text()
    assert launch.returncode != 0 and "[rank0]:" not in text and "[rank1]:" not in text, text
    return text


@pytest.mark.parametrize("script, rank", [
    ("train.py", 1), *(pytest.param(script, rank, marks=LONG) for rank in (0, 1) for script in
                       ("extract_features.py", "train.py", "sample_ddp.py", "classify.py"))])
def test_when_one_process_is_killed_the_others_end(script, rank, world, tmp_path):
    launch = launched(script, world, tmp_path / "out")
    begun = {"extract_features.py": ".features_0.tmp/settings.json", "train.py": "*/metrics.jsonl",
             "classify.py": "fold-0/metrics.jsonl", "sample_ddp.py": "*/*/*.png"}[script]
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").glob(begun)):
        assert launch.poll() is None and time.monotonic() < deadline, (tmp_path / "out.log").read_text()
        time.sleep(0.1)
    os.kill(ranks(launch)[rank], signal.SIGKILL)
    text = ended(launch, tmp_path / "out.log")
    assert "Signal 9 (SIGKILL)" in text
    counts.add("One of two processes is killed", script, "the other ended within a minute")


def spoil_image(world, place):
    """A data root whose last training image is damaged: the second process finds out, not the first."""
    shutil.copytree(world.data, place / "data")
    file = read_split(place / "data", "train_0").paths[-1]
    target = file.resolve()
    file.unlink()
    file.write_bytes(target.read_bytes()[:100] if target.exists() else b"")
    return {"data": place / "data"}


def spoil_latents(world, place):
    """Latents of which one is not finite: the process that draws it finds out."""
    shutil.copytree(world.store, place / "store")
    (file,) = (place / "store" / "features_0").glob("shard-*")
    tensors, about = read_tensors(file, "")
    tensors["mean"] = tensors["mean"].clone()
    tensors["mean"][-1] = torch.nan
    file.unlink()
    write_tensors(file, tensors, about)
    return {"store": place / "store"}


@pytest.mark.parametrize("script, spoil, message", [
    ("extract_features.py", spoil_image, "cannot be read as an image"),
    pytest.param("train.py", spoil_latents, "are not finite", marks=LONG)])
def test_a_mistake_that_one_process_finds_is_one_line(script, spoil, message, world, tmp_path):
    launch = launched(script, world, tmp_path / "out", **spoil(world, tmp_path))
    text = ended(launch, tmp_path / "out.log", 120)
    assert text.count(message) == 1 and text.count(f"{script}: error: ") == 1, text
    counts.add("One of two processes finds a mistake", script, "its line, and no traceback of the other")
