"""Shared by all tests: the repository on the path, one thread, the reference vectors."""

import contextlib
import io
import os
import runpy
import signal
import subprocess
import sys
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)

from helpers import save_tiny_vae  # noqa: E402

from core import runs  # noqa: E402


def made_weight(key, shape):
    """The value of a state-dict entry in the reference vectors: a function of its name and shape."""
    r = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
    value = 1 + 0.02 * r if key.endswith("norm.weight") else (0.05 if len(shape) >= 2 else 0.02) * r
    return torch.tensor(value * (0.02 if key.startswith("final_layer.linear") else 1), dtype=torch.float32)


def fill(model):
    """Give a model the weights of the reference vectors; a position table keeps the values it has."""
    made = {key: made_weight(key, tuple(v.shape)) for key, v in model.state_dict().items() if key != "pos_embed"}
    model.load_state_dict({**model.state_dict(), **made})
    return model


@pytest.fixture(scope="session")
def golden():
    """name -> tensor: computed once by the published code, float32 (tables float64), on CPU."""
    with np.load(ROOT / "tests" / "reference_vectors.npz") as file:
        return {name: torch.as_tensor(file[name]) for name in file}


def generators(n, seed=0):
    """One generator per image."""
    return [torch.Generator().manual_seed(1000 * seed + i) for i in range(n)]


def largest_relative(a, b):
    """Largest difference as a share of the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


def run_script(*arguments, processes=1, launcher="plain"):
    """Run a script of the repository as a user would -> CompletedProcess. One thread per process."""
    command = [sys.executable, *map(str, arguments)]
    if launcher == "torchrun":
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    elif launcher == "accelerate":
        # As published. `--cpu` in place of `--multi_gpu` would start a single process unless there is MPI.
        command[1:1] = ["-m", "accelerate.commands.launch", "--multi_gpu", f"--num_processes={processes}",
                        "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def call_script(script, *arguments):
    """The same in this process, where the imports are paid already -> CompletedProcess."""
    argv, out, err, code = [str(ROOT / script), *map(str, arguments)], io.StringIO(), io.StringIO(), 0
    AcceleratorState._reset_state(reset_partial_state=True)  # what the script before this one asked for
    with (mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
          torch.random.fork_rng()):
        try:
            runpy.run_path(argv[0], run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
    return subprocess.CompletedProcess(argv, code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def ctrl_c_at(step_to_stop):
    """Within it, Ctrl-C is pressed when a run logs the metrics of this step."""
    log_metrics = runs.RunLog.metrics

    def metrics(log, step, **values):
        log_metrics(log, step, **values)
        if step == step_to_stop:
            signal.raise_signal(signal.SIGINT)

    with mock.patch.object(runs.RunLog, "metrics", metrics):
        yield


def succeeded(done):
    """The output of a run that must have gone well."""
    assert done.returncode == 0, f"{done.args}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def refused(done, *words):
    """A run must have ended as a mistake of the user does: exit code 2 and one line, with these words."""
    assert done.returncode == 2, f"{done.args}\n{done.stdout}\n{done.stderr}"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and all(word in lines[0] for word in words), done.stderr


@pytest.fixture(scope="session")
def tiny_vae(tmp_path_factory):
    """An untrained autoencoder in diffusers' format, with the scale that its feature space needs."""
    from evaluation.features import fit

    folder = tmp_path_factory.mktemp("tiny") / "vae"
    save_tiny_vae(folder)
    noise = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    paths = [folder.parent / f"{i}.png" for i in range(len(noise))]
    for path, image in zip(paths, noise, strict=True):
        Image.fromarray(image).save(path)
    fit(str(folder), [paths], (32,))
    return str(folder)
