"""What a training run will cost, from a few timed steps: `train.py --dry-run`."""

import math
import statistics
import time

from core.runtime import peak_memory

STEPS, ENOUGH = 4, 60  # steps that are timed, and the seconds after which no further one is
MOMENTS = {"adamw": 2, "muon": 1}  # numbers that an optimiser keeps for a parameter (for most of them)


def cost(options, training, validation):
    """What the settings of a run come to: (name, text) for each line. Takes a few steps, which are lost.

    `options`: LoopOptions. All processes of a group must call it.
    """
    accelerator, size = training.accelerator, 4 * training.parameters / 2**20  # MiB in float32
    epochs, sampling = training.options.epochs, validation.options.sampling
    step, one = step_time(training), len(options.scored) * validation.seconds(training.ema)
    validations = math.ceil(epochs / options.validate_every)
    whole, limit = training.total_steps * step + validations * one, options.limit
    channels, *grid = training.cache.mean.shape[2:]
    copies = 2 + len(training.averages) + MOMENTS[training.options.optimizer]
    yield "model", f"{training.model_args['model']}, {training.parameters:,} parameters"
    yield "data", (f"{len(training.cache):,} training and {len(validation.split):,} validation images, labels "
                   f"{' '.join(validation.split.label_names)}")
    yield "grid", f"{grid[0]} × {grid[1]} cells with {channels} channels, from images of {validation.real.shape[1]} px"
    yield "processes", (f"{accelerator.num_processes} on {accelerator.device}, mixed precision "
                        f"{accelerator.mixed_precision}")
    yield "steps", (f"{training.total_steps:,}: {epochs:,} epochs of {training.steps_per_epoch:,}, "
                    f"{training.batch} images each")
    yield "a step", f"{step:.3g} s, {training.batch / step:.1f} images/s"
    yield "a validation", (f"{duration(one)}: {len(validation.chosen)} images, {sampling.steps} steps of "
                           f"{sampling.sampler}, {len(options.scored)} kind(s) of weights; {validations:,} of them")
    yield "time", duration(whole) if whole <= limit else (
        f"{duration(limit)} (--max-minutes), about {max(0, int((limit - one) / step)):,} steps; all of them would take "
        f"{duration(whole)}")
    yield "memory", f"{peak_memory(accelerator.device):,.0f} MiB at most so far, in each process"
    yield "disk", f"about {copies * size:,.0f} MiB for each of last_ckpt.pt and best_ckpt.pt"


def step_time(training):
    """Seconds of a training step: the median of a few, without the first where there is time for more."""
    times = []
    while len(times) < STEPS and sum(times) < ENOUGH:
        started = time.monotonic()
        training.train_step(measure=True)
        training.statistics.means(training.accelerator)  # waits for the device, and is the same on all processes
        times.append(training.accelerator.gather(training.statistics.loss.new_tensor([time.monotonic() - started]))
                     .max().item())
    return statistics.median(times[1:] or times)


def duration(seconds):
    """A time for people: "42 s", "5 min", "3.2 h", "12 days"."""
    for unit, length in (("s", 1), ("min", 60), ("h", 3600)):
        if seconds < 100 * length:
            return f"{seconds / length:.2g} {unit}"
    return f"{seconds / 86400:.2g} days"
