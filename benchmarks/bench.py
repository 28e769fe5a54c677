"""How fast the denoisers are on this machine, always against a plain implementation in the same run.

    python benchmarks/bench.py                                     all models, 32 x 32 cells: ten minutes on two cores
    python benchmarks/bench.py --models GeCA-S --json bench.json   one model, and the numbers as json
    python benchmarks/bench.py --models GeCA-XS --scaling          seconds per cell over grids of 8 to 64

Three tasks: `forward` one call without gradients, `guided` one guided sampling step (conditional and unconditional in
one batch), `train` loss, backward and optimiser step. `plain` is automaton/reference.py; `dense` computes every cell;
`asynchronous` is what the scripts use; `kept` is training without --checkpoint-steps. Before anything is timed, all
variants must give the same result. They take turns within each round, and the fastest round counts, so that a busy
machine slows all alike. `memory` is how far the peak rises during the task, in a process of its own. `peak` is the
share of the matrix-product speed of this device, measured in the same run.
"""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from automaton import reference
from core import runtime
from core.cli import Parser, integer, run
from core.errors import UserError
from core.files import write_text
from core.random import generator
from diffusion import create_diffusion, samplers
from generation import guidance
from models import MODELS

TASKS = ("forward", "guided", "train")


class Case:
    """One model on one grid, with everything drawn: `task(name, variant)` is what is timed."""

    def __init__(self, name, cells, batch, device, precision="fp32"):
        torch.manual_seed(0)
        self.model = MODELS[name](input_size=cells).to(device)
        for p in self.model.parameters():  # as initialised, zeros would make half of the arithmetic zeros
            if p.requires_grad:
                torch.nn.init.normal_(p, std=0.02)
        self.living = hasattr(self.model, "update_rate")
        self.batch, self.cells, self.device, self.precision = batch, cells, device, precision
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=1e-6)
        self.diffusion = create_diffusion("250")
        self.x = torch.randn(batch, 4, cells, cells, device=device)
        self.y = torch.zeros(batch, 11, device=device)
        self.i = torch.full((batch,), 100)

    def call(self, variant):
        """A denoiser (x, t, y, state, generators) in this variant."""
        if variant == "plain":
            return self.yardstick
        if self.living:
            self.model.engine = "dense" if variant == "dense" else "asynchronous"
            self.model.checkpoint_steps = variant != "kept"
        return self.model

    def yardstick(self, x, t, y, state, generators):
        if state is None:
            state = self.model.initial_state(*x.shape[:1], *x.shape[2:],
                                             self.model.draw_seed(len(x), generators).to(x.device))
        fire = self.model.draw_fire(len(x), self.cells**2, generators).to(x.device)
        return reference.forward(self.model, x, t, y, fire, state)

    def generators(self, half):
        return [generator(0, half, i) for i in range(self.batch)]

    def task(self, name, variant):
        call = self.call(variant)
        with runtime.autocast(self.precision, self.device):
            getattr(self, name)(call)
        if torch.device(self.device).type == "cuda":
            torch.cuda.synchronize()

    @torch.no_grad()
    def forward(self, call):
        call(self.x, self.diffusion.original(self.i, self.device), self.y, None, self.generators("cells"))

    @torch.no_grad()
    def guided(self, call):
        def denoise(x, t, y, state, generators):
            return call(x, t, y, state, generators)

        if self.living:
            denoise.draw_seed, denoise.initial_state = self.model.draw_seed, self.model.initial_state
            denoise.inherit = self.model.inherit
        guided = guidance.GuidedDenoiser(denoise, self.y, 1.5, (self.generators("cells"), self.generators("null")))
        out, _ = guided(self.x, self.diffusion.original(self.i, self.device), None)
        samplers.p_sample(self.diffusion.p_mean_variance(out, self.x, self.i), self.i, self.x)

    def train(self, call):
        terms = create_diffusion().training_losses(
            lambda x, t: call(x, t, self.y, None, self.generators("cells"))[0], self.x, self.i, torch.ones_like(self.x))
        terms["loss"].mean().backward()
        self.optimiser.step()
        self.optimiser.zero_grad()


def variants(name, task):
    if not name.startswith("GeCA"):
        return ["model"]
    return ["plain", "dense", "asynchronous", *["kept"] * (task == "train")]


AGREE = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 0.1, "fp16": 0.05}  # largest difference, as a share of the largest value


def check_agreement(case, names):
    """Raise RuntimeError unless all variants give the same output: the speed of a wrong result means nothing."""
    outputs = []
    for name in names:
        with torch.no_grad(), runtime.autocast(case.precision, case.device):
            outputs.append(case.call(name)(case.x, case.diffusion.original(case.i, case.device), case.y, None,
                                           case.generators("cells"))[0].float())
    for name, out in zip(names[1:], outputs[1:], strict=True):
        difference = ((out - outputs[0]).abs().max() / outputs[0].abs().max()).item()
        if not difference < AGREE[case.precision]:
            raise RuntimeError(f"{name} differs from {names[0]} by {difference:.1e} of the largest value")


def seconds(case, task, names, rounds):
    """Variant -> fastest of some rounds; the variants take turns."""
    best = {}
    for i in range(rounds + 1):  # the first round warms up
        for name in names:
            started = time.perf_counter()
            case.task(task, name)
            taken = time.perf_counter() - started
            if i:
                best[name] = min(taken, best.get(name, taken))
    return best


class Operations(TorchDispatchMode):
    """Counts the floating point operations of matrix products (FlopCounterMode fails on nested backwards)."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        count = flop_registry.get(function._overloadpacket)
        self.total += count(*args, **(kwargs or {}), out_val=out) if count else 0
        return out


def operations(case, task, variant):
    """Floating point operations of the matrix products of a task."""
    with Operations() as counter:
        case.task(task, variant)
    return counter.total


def product_speed(device, precision):
    """Operations per second of matrix products of this device: the best of 20 times four."""
    size = 8192 if torch.device(device).type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device, dtype=runtime.PRECISIONS[precision] or torch.float32)
    best = float("inf")
    for _ in range(20):
        started = time.perf_counter()
        for _ in range(4):
            a @ b
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 4 * 2 * size**3 / best


def copy_speed(device, numbers=2**26):
    """Bytes per second that this device reads and writes in a copy: the best of 10."""
    a, b = torch.ones(2, numbers, device=device)
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        b.copy_(a)
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 8 * numbers / best


def memory_of(*arguments):
    """Bytes by which the peak rises in a process of its own (`peak_rise`)."""
    command = [sys.executable, __file__, "--memory-of", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return int(done.stdout)


def peak_rise(name, task, variant, cells, batch, device, precision):
    """What --memory-of prints: one warm call of a single image first, so that libraries are loaded."""
    runtime.allow(precision, device)
    Case(name, 8, 1, device, precision).task(task, variant)
    case = Case(name, int(cells), int(batch), device, precision)
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        case.task(task, variant)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew (Linux)
    before = resident("VmRSS")
    case.task(task, variant)
    return resident("VmHWM") - before


def resident(name):
    """Bytes of memory of this process: now (VmRSS) or at most (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{name}:\s*(\d+) kB", status)[1])


def floor(name, flops, speeds):
    """A line: parameters, and the least times of a forward call: its operations, its float32 weights read each step."""
    model = MODELS[name]()
    parameters = sum(p.numel() for p in model.parameters())
    reads = 4 * parameters * getattr(model, "steps", 1)
    return (f"{name:8} {parameters:,} parameters; forward floor: {flops / speeds['products']:.3f} s for its "
            f"operations, {reads / speeds['copy']:.3f} s to read its weights")


def measure(args, device, precision):
    runtime.allow(precision, device)
    speeds = {"products": product_speed(device, precision), "copy": copy_speed(device)}
    print(f"\n{precision}: matrix products {speeds['products'] / 1e9:.0f} GFLOP/s, copies "
          f"{speeds['copy'] / 1e9:.1f} GB/s", flush=True)
    print(f"{'model':8} {'task':8} {'variant':13} {'images':>6} {'seconds':>8} {'images/s':>9} {'x plain':>8} "
          f"{'memory':>9} {'GFLOP':>8} {'peak':>5}", flush=True)
    rows = []
    for name in args.models:
        for task in args.tasks:
            batch = args.train_batch if task == "train" else args.batch
            names = variants(name, task)
            case = Case(name, args.cells, batch, device, precision)
            check_agreement(case, names)
            times = seconds(case, task, names, args.rounds)
            for variant in names:
                flops = operations(case, task, variant)
                memory = memory_of(name, task, variant, args.cells, batch, device, precision) if args.memory else None
                row = {"model": name, "task": task, "variant": variant, "images": batch, "cells": args.cells,
                       "precision": precision, "seconds": times[variant], "memory": memory, "flops": flops,
                       "ratio": times[names[0]] / times[variant] if len(names) > 1 else None}
                rows.append(row)
                print(line(row, speeds), flush=True)
        if "forward" in args.tasks:
            print(floor(name, flops_of(rows, name, "forward"), speeds), flush=True)
    return {"speeds": speeds, "rows": rows}


def flops_of(rows, name, task):
    """The fewest operations that any variant of a task has."""
    return min(row["flops"] for row in rows if (row["model"], row["task"]) == (name, task))


def line(row, speeds):
    ratio = f"{row['ratio']:.2f}" if row["ratio"] else "-"
    memory = f"{row['memory'] / 2**20:.0f} MiB" if row["memory"] is not None else "-"
    share = row["flops"] / row["seconds"] / speeds["products"]
    return (f"{row['model']:8} {row['task']:8} {row['variant']:13} {row['images']:6} {row['seconds']:8.3f} "
            f"{row['images'] / row['seconds']:9.2f} {ratio:>8} {memory:>9} {row['flops'] / 1e9:8.0f} {share:5.0%}")


def scaling(args, device, precision):
    """Seconds per cell of a forward call over grids."""
    runtime.allow(precision, device)
    print(f"\n{precision}: forward, one image\n{'model':8} {'grid':>7} {'seconds':>8} {'us/cell':>8}", flush=True)
    rows = []
    for name in args.models:
        ours = variants(name, "forward")[-1]
        for side in (8, 16, 32, 64):
            case = Case(name, side, 1, device, precision)
            taken = seconds(case, "forward", [ours], args.rounds)[ours]
            rows.append({"model": name, "side": side, "seconds": taken})
            print(f"{name:8} {side:3}x{side:<3} {taken:8.4f} {1e6 * taken / side**2:8.1f}", flush=True)
    return rows


def main():
    if sys.argv[1:2] == ["--memory-of"]:
        print(peak_rise(*sys.argv[2:]))
        return
    args = parser().parse_args()
    if args.json and not args.json.parent.is_dir():
        raise UserError(f"--json {args.json}: no such folder as {args.json.parent}; make it first")
    device = str(runtime.start().device)
    check(args, device)
    report = {"versions": runtime.versions(), "threads": torch.get_num_threads(), "device": device, "results": {}}
    print(" ".join(f"{key} {value}" for key, value in report["versions"].items()))
    for precision in args.precision:
        report["results"][precision] = (scaling if args.scaling else measure)(args, device, precision)
    if args.json:
        write_text(args.json, json.dumps(report, indent=1) + "\n")


def check(args, device):
    """Raise UserError for what cannot be measured, before anything is."""
    for precision in args.precision:
        runtime.allow(precision, device)
    with torch.device("meta"):
        for name in args.models:
            try:
                MODELS[name](input_size=args.cells)
            except ValueError as error:
                raise UserError(f"--cells {args.cells}: {name}: {error}") from None


def parser():
    p = Parser(__doc__)
    p.add_argument("--models", nargs="+", choices=MODELS, metavar="NAME", help="which",
                   default=["GeCA-XS", "GeCA-S", "DiT-S", "LDM-B"])
    p.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, metavar="TASK", help="forward, guided, train")
    p.add_argument("--cells", type=integer(1), default=32, help="cells per side of the grid")
    p.add_argument("--batch", type=integer(1), default=1, help="images of forward and guided")
    p.add_argument("--train-batch", type=integer(1), default=4, help="images of train")
    p.add_argument("--precision", nargs="+", choices=runtime.PRECISIONS, default=["fp32"], metavar="NAME",
                   help=", ".join(runtime.PRECISIONS))
    p.add_argument("--rounds", type=integer(1), default=3, help="rounds, of which the fastest counts")
    p.add_argument("--no-memory", dest="memory", action="store_false", help="leave memory out: faster")
    p.add_argument("--scaling", action="store_true", help="grids of 8 to 64 instead of the tasks")
    p.add_argument("--json", type=Path, metavar="FILE", help="write all numbers")
    return p


if __name__ == "__main__":
    run(main, runtime.stop)
