"""What a process needs to know about itself: its rank, its device, its versions."""

import os
import platform
import resource
import signal
import subprocess
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from core.errors import UserError

AGREE_EVERY = 5  # steps after which the processes of a training ask each other whether to stop
AGAIN = 75  # exit code of a job that a signal has stopped and that the same command continues (EX_TEMPFAIL)
PRECISIONS = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # --precision


def start(precision="fp32"):
    """Join the process group that `torchrun` or `accelerate launch` describes; alone, be a group of one.

    TensorFloat-32 is off at `fp32`: it changes numbers.
    Returns accelerate's PartialState (`process_index`, `num_processes`, `device`, `wait_for_everyone`):
    CUDA with nccl where there is a GPU, else CPU with gloo.
    """
    check_environment()
    state = PartialState(cpu=not torch.cuda.is_available())
    allow(precision, state.device)
    return state


def check_environment():
    """Refuse what accelerate takes from the environment, or its configuration file, and these scripts do not do."""
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("", "1"):
        raise UserError(f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS {steps}: gradients are not accumulated here; unset it "
                        "(a smaller --global-batch-size needs less memory)")
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM",
                 "ACCELERATE_USE_TP"):
        if os.environ.get(name, "false").lower() in ("1", "true"):
            raise UserError(f"{name}: these scripts train with DistributedDataParallel; choose that in `accelerate "
                            "config` or unset it")


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


def by_first(process, task):
    """What `task()` returns on the first process, on every one. A UserError of its ends all; it is said once."""
    result = [None, None]
    if process.is_main_process:
        try:
            result[0] = task()
        except UserError as error:
            result[1] = str(error)
    value, error = broadcast_object_list(result)
    if error is None:
        return value
    stop()
    if process.is_main_process:
        raise UserError(error)
    sys.exit(2)


class Interruption:
    """Within it, Ctrl-C or a signal to end is noted, so that work can stop where it loses nothing.

    SIGTERM is what kills and what Slurm sends before it preempts; SIGUSR1 and SIGUSR2 come with `sbatch --signal`,
    SIGHUP from a terminal that closes. A second Ctrl-C is obeyed. The others come more than once without meaning more:
    Slurm tells every process of a job, and so does each launcher between them.
    """

    def __enter__(self):
        self.asked = None  # the signal that came
        kinds = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
        self.before = {kind: signal.signal(kind, self.ask) for kind in kinds}
        return self

    def ask(self, kind, frame):
        self.asked = kind
        if kind == signal.SIGINT:
            self.__exit__()

    def __exit__(self, *error):
        for kind, handler in self.before.items():
            signal.signal(kind, handler)

    @property
    def exit_code(self):
        """130 after Ctrl-C, as shells have it; else AGAIN, also where another process was asked."""
        return 130 if self.asked == signal.SIGINT else AGAIN


def peak_memory(device):
    """MiB that this process has held at most: of the GPU where it computes on one, else of the machine."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


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
