"""What this project needs of a GPU, in minutes: one json. benchmarks/gpu.sh runs it after the tests of the GPU paths.

    python benchmarks/gpu.py --json gpu.json                        everything
    python benchmarks/gpu.py --json gpu.json --only sampling train  two sections

machine    operations per second of matrix products in each precision, bytes per second of copies
calls      a call of a denoiser without gradients for 2 x 32 images of 256 px: plainly, by a CUDA graph, with parts
           fused by torch.compile, and with both
sampling   from noise to decoded images of 256 px by 250 guided steps of DDPM: images per second
train      a training step at batch 128 for 256 px, with what backward needs computed again or kept: seconds, memory
small      training steps per second at batch 32 for 64 px
Variants of a task take turns, the fastest round counts. A section that fails is said in the json and ends nothing.
"""

import sys
import time
import traceback
from functools import partial
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from diffusers import AutoencoderKL

from automaton.graphs import recorded
from benchmarks import bench
from core import runtime
from core.cli import Parser, integer, run
from core.errors import UserError
from core.files import json_text, write_text
from generation.sampling import SamplingOptions, sample_latents

DEVICE, NAMES = "cuda", ("GeCA-S", "DiT-S", "LDM-B")


def fastest(tasks, rounds):
    """name -> seconds of its fastest round; the tasks, name -> function, take turns, after a round that warms up."""
    best = {}
    for i in range(rounds + 1):
        for name, task in tasks.items():
            torch.cuda.synchronize()
            started = time.perf_counter()
            task()
            torch.cuda.synchronize()
            if i:
                best[name] = min(time.perf_counter() - started, best.get(name, float("inf")))
    return best


def peak(task):
    """MiB that a task takes beyond what is there before it."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    task()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def machine(args):
    products = {}
    for precision in runtime.PRECISIONS:
        runtime.allow(precision, DEVICE)
        products[precision] = bench.product_speed(DEVICE, precision)
    return {"products": products, "copy": bench.copy_speed(DEVICE, 2**28)}


def calls(args):
    rows = []
    for name in NAMES:
        for precision in args.precision:
            runtime.allow(precision, DEVICE)
            case = case_of(name, precision)
            flops = bench.operations(case, "forward", "asynchronous")
            tasks = {"plain": partial(case.task, "forward", "asynchronous")}
            if case.living:
                tasks["graph"] = partial(in_graph, case)
            if case.living and precision == "bf16":  # compiling takes half a minute
                compiled = case_of(name, precision)
                compiled.model.compile_parts()
                tasks |= {"compiled": partial(compiled.task, "forward", "asynchronous"),
                          "compiled, graph": partial(in_graph, compiled)}
            rows += [{"model": name, "precision": precision, "variant": kind, "images": 64, "seconds": seconds,
                      "flops": flops} for kind, seconds in fastest(tasks, args.rounds).items()]
    return rows


def case_of(name, precision):
    return bench.Case(name, 32, 64, DEVICE, precision)


def in_graph(case):
    with recorded(DEVICE):
        case.task("forward", "asynchronous")


def sampling(args):
    """With a decoder of the size of Stable Diffusion's, its weights random, computing in float32."""
    torch.manual_seed(0)
    decoder = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4).to(DEVICE).eval()
    rows = []
    for name in NAMES:
        model = bench.Case(name, 32, 1, DEVICE).model
        for compiled in (False, True) if hasattr(model, "inherit") else (False,):
            if compiled:
                model = bench.Case(name, 32, 1, DEVICE).model
                model.compile_parts()
            for precision, batch in product(["bf16"] if compiled else args.precision, args.batches):
                runtime.allow(precision, DEVICE)
                make(model, decoder, batch, precision, 10)  # compiles and records
                steps = 250 if precision == "bf16" else 25
                torch.cuda.synchronize()
                started = time.perf_counter()
                make(model, decoder, batch, precision, steps)
                seconds = time.perf_counter() - started
                rows.append({"model": name, "compiled": compiled, "precision": precision, "batch": batch,
                             "steps": steps, "seconds": seconds, "images_per_second": batch / seconds})
    return rows


@torch.no_grad()
def make(model, decoder, batch, precision, steps):
    """One batch of images, (batch, 3, 256, 256), that are looked at by the host."""
    options = SamplingOptions(steps=steps, sampler="ddpm", precision=precision)
    with runtime.autocast(precision, DEVICE), recorded(DEVICE):
        latents = sample_latents(model, torch.zeros(batch, 11), list(range(batch)), 32, options, DEVICE)
    images = torch.cat([decoder.decode(part).sample for part in latents.float().split(8)])
    if not images.isfinite().all():
        raise RuntimeError("the samples are not finite")
    return images.cpu()


def train(args):
    rows = []
    for name, precision in product(NAMES, args.precision):
        runtime.allow(precision, DEVICE)
        case = bench.Case(name, 32, 128, DEVICE, precision)
        tasks = {kind: partial(case.task, "train", kind)
                 for kind in (("asynchronous", "kept") if case.living else ("model",))}
        for kind, seconds in fastest(tasks, 2).items():
            rows.append({"model": name, "precision": precision, "variant": kind, "images": 128, "seconds": seconds,
                         "images_per_second": 128 / seconds, "peak_MiB": peak(tasks[kind]),
                         "flops": bench.operations(case, "train", kind)})
    return rows


def small(args):
    rows = []
    for name in ("GeCA-XS", *NAMES):
        runtime.allow("bf16", DEVICE)
        case = bench.Case(name, 8, 32, DEVICE, "bf16")
        tasks = {kind: partial(case.task, "train", kind)
                 for kind in (("asynchronous", "kept") if case.living else ("model",))}
        rows += [{"model": name, "precision": "bf16", "variant": kind, "steps_per_second": 1 / seconds}
                 for kind, seconds in fastest(tasks, args.rounds).items()]
    return rows


SECTIONS = {f.__name__: f for f in (machine, calls, train, sampling, small)}


def main():
    args = parser().parse_args()
    if not torch.cuda.is_available():
        raise UserError("benchmarks/gpu.py: found no CUDA device, expected one; there is benchmarks/bench.py for CPUs")
    runtime.start()
    report = {"versions": runtime.versions(), "seconds": {}}
    for name in args.only:
        started = time.perf_counter()
        try:
            report[name] = SECTIONS[name](args)
        except Exception as error:
            traceback.print_exc()
            report[name] = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        report["seconds"][name] = time.perf_counter() - started
        print(f"{name}: {report['seconds'][name]:.0f} s", json_text(report[name]), flush=True)
        torch.cuda.empty_cache()
        write_text(args.json, json_text(report))


def parser():
    p = Parser(__doc__)
    p.add_argument("--json", type=Path, required=True, metavar="FILE", help="where to write the numbers")
    p.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="NAME",
                   help=", ".join(SECTIONS))
    p.add_argument("--precision", nargs="+", choices=runtime.PRECISIONS, default=["bf16", "tf32"], metavar="NAME",
                   help=", ".join(runtime.PRECISIONS))
    p.add_argument("--batches", nargs="+", type=integer(1), default=[32, 64], metavar="N", help="images of a batch")
    p.add_argument("--rounds", type=integer(1), default=5, help="rounds, of which the fastest counts")
    return p


if __name__ == "__main__":
    run(main, runtime.stop)
