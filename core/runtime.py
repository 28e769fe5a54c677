"""What a process needs to know about itself: its rank, its device, its versions."""

import os
import platform
import signal
import subprocess
from pathlib import Path

import torch
from accelerate import PartialState

from core.errors import UserError

AGREE_EVERY = 5  # steps after which the processes of a training ask each other whether to stop
PRECISIONS = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # --precision


def start(precision="fp32"):
    """Join the process group that `torchrun` or `accelerate launch` describes; alone, be a group of one.

    TensorFloat-32 is off at `fp32`: it changes numbers.
    Returns accelerate's PartialState (`process_index`, `num_processes`, `device`, `wait_for_everyone`):
    CUDA with nccl where there is a GPU, else CPU with gloo.
    """
    state = PartialState(cpu=not torch.cuda.is_available())
    allow(precision, state.device)
    return state


def allow(precision, device):
    """Let this process compute in this precision. Raises UserError for fp16 without a GPU."""
    if precision == "fp16" and torch.device(device).type == "cpu":
        raise UserError("--precision fp16 needs a GPU; give bf16 or fp32")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"


def autocast(precision, device):
    """A context in which matrix products are in half precision, if `precision` is bf16 or fp16."""
    return torch.autocast(torch.device(device).type, PRECISIONS[precision], enabled=PRECISIONS[precision] is not None)


def alone(script):
    """Refuse to run several times over: for scripts that do all their work in one process. Raises UserError."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1:
        raise UserError(f"{script} was started as {processes} processes, it works in one: start it with `python`")


def stop():
    """Leave the process group; without this every run on several processes ends with a warning."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Interruption:
    """Within it, Ctrl-C or a kill is noted, so that training can stop between two steps; a second one is obeyed."""

    def __enter__(self):
        self.asked = False
        self.before = {kind: signal.signal(kind, self.ask) for kind in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, kind, frame):
        self.asked = True
        self.__exit__()

    def __exit__(self, *error):
        for kind, handler in self.before.items():
            signal.signal(kind, handler)


def versions():
    """Software, hardware and git commit of this run, for the head of its log."""
    here = Path(__file__).resolve().parent.parent
    try:
        git = subprocess.run(["git", "-C", here, "describe", "--always", "--dirty"], capture_output=True, text=True)
        commit = git.stdout.strip() or "unknown"
    except OSError:  # no git on this machine
        commit = "unknown"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "python": platform.python_version(), "torch": torch.__version__, "gpu": gpu,
        "cpu_threads": torch.get_num_threads(), "commit": commit,
    }
