"""A training run from where it stands to its end: the steps, and what happens between them."""

import copy
import math
import time
from dataclasses import dataclass

import torch

from core.errors import UserError
from core.progress import progress_bar
from core.runtime import AGREE_EVERY, peak_memory
from core.tensors import all_finite
from generation import checkpoint as checkpoints

SAVE_MINUTES = 5  # last_ckpt.pt is written at least so often
WEIGHTS = {"ema": "averaged", "model": "raw"}


@dataclass(frozen=True)
class LoopOptions:
    """When a training ends, and what happens on the way."""

    max_minutes: float  # 0: never
    validate_every: int  # epochs
    log_every: int  # steps
    ckpt_every: int  # steps
    validation_weights: str = "ema"  # one of WEIGHTS: those that decide what is best
    both_weights: bool = True  # score the others too

    @property
    def limit(self):
        """Seconds until the end."""
        return 60 * self.max_minutes or math.inf

    @property
    def scored(self):
        """The kinds of weights that a validation samples from; the first decides."""
        first = self.validation_weights
        return [first, *[kind for kind in WEIGHTS if kind != first and self.both_weights]]


def time_for_validation(options, validation, net, started):
    """Seconds of --max-minutes to keep for the last validation, from a trial; 0 without a limit.

    `started`: time.monotonic() when the program was. Raises UserError where no time would be left to train.
    """
    if math.isinf(options.limit):
        return 0.0
    seconds, gone = len(options.scored) * validation.seconds(net), time.monotonic() - started
    if gone + seconds >= options.limit:
        raise UserError(f"--max-minutes {options.max_minutes:g}: {gone:.0f} s are gone and a validation takes about "
                        f"{seconds:.0f} s, so no time is left to train; give more, or fewer --val-samples or "
                        "--num-sampling-steps")
    return seconds


class Loop:
    """Training until --epochs, --max-minutes or an interruption.

    `options`: LoopOptions; `log`: a core.runs.RunLog; `about`: what a checkpoint says beside the state of the
    training; `interruption`: a core.runtime.Interruption; `started`: time.monotonic() when the program was started;
    `reserve`: what `time_for_validation` returns.
    """

    def __init__(self, options, training, validation, log, about, interruption, started, reserve):
        self.options, self.training, self.validation, self.log = options, training, validation, log
        self.about, self.interruption, self.accelerator = about, interruption, training.accelerator
        self.started, self.limit = started - 60 * training.minutes, options.limit
        self.reserve = reserve  # seconds that the last validation will take
        self.pace = Pace()
        self.window, self.steps = time.monotonic(), 0  # since the last log line
        self.saved = time.monotonic()
        self.timed_out = self.stopped = self.save_is_due = False

    def run(self):
        """Train -> whether it was interrupted."""
        options, training = self.options, self.training
        self.timed_out = self.longest(time.monotonic() - self.started) + self.reserve >= self.limit
        self.pace.start()
        total = training.total_steps if math.isinf(self.limit) else None  # else `agree` finds it out
        bar = progress_bar(initial=training.step, total=total, unit="steps", title="training", active=self.log.active)
        with bar:
            while training.step < training.total_steps and not self.timed_out and not self.stopped:
                logged = (training.step + 1) % options.log_every == 0
                training.train_step(measure=logged)  # draw, loss, gradient, update, averages
                self.steps += 1
                self.pace.steps += 1
                if training.step % AGREE_EVERY == 0:
                    self.agree(bar)
                bar.update()
                last = training.step == training.total_steps or self.timed_out
                if logged or last:
                    self.write_log()
                end_of_epoch = training.step % training.steps_per_epoch == 0
                if last or (end_of_epoch and training.epoch % options.validate_every == 0 and self.has_room()):
                    self.validate()
                if last or self.stopped or self.save_is_due or training.step % options.ckpt_every == 0:
                    self.save("last_ckpt.pt")
        return self.end()

    def end(self):
        """Say how it ended -> whether it was interrupted."""
        training = self.training
        if self.stopped:
            self.log.text(f"stopped at step {training.step}; the same command continues")
            return True
        reason = f"after --max-minutes {self.options.max_minutes:g}" if self.timed_out else "complete"
        self.log.text(f"{reason}: epoch {training.epoch}, step {training.step}, best KID "
                      f"{1e3 * training.best_kid:.2f}e-3")
        return False

    def longest(self, seconds):
        """The largest of what the processes have measured: they must agree on what is due."""
        mine = torch.tensor([seconds], dtype=torch.float32, device=self.accelerator.device)
        return self.accelerator.gather(mine).max().item()

    def has_room(self):
        """Whether a validation now leaves time for the last one."""
        return self.longest(time.monotonic() - self.started) + 2 * self.reserve < self.limit

    def agree(self, bar):
        """What holds on one process holds on all: time is up, somebody asked to stop, a checkpoint is due."""
        budget, spent = self.limit - self.reserve, time.monotonic() - self.started
        left = (budget - spent) / self.pace.seconds_per_step  # steps, until the last validation must begin
        mine = [self.interruption.asked is not None, time.monotonic() - self.saved > 60 * SAVE_MINUTES,
                left < AGREE_EVERY, spent / budget]
        loss = self.training.statistics.loss.double()
        everywhere = torch.cat([torch.tensor(mine, dtype=torch.float64, device=loss.device), loss])
        stopped, due, late, shares, total, count = self.accelerator.reduce(everywhere, "sum").tolist()
        self.stopped, self.save_is_due, self.timed_out = stopped > 0, due > 0, late > 0
        self.training.time_share = shares / self.accelerator.num_processes
        if math.isfinite(left):
            bar.total = min(self.training.total_steps, self.training.step + max(0, int(left)))
        bar.set_postfix(loss=f"{total / max(count, 1):.4f}", refresh=False)

    def write_log(self):
        """Means since the last log line, to the screen, log.txt, metrics.jsonl and the tracker."""
        training = self.training
        means = training.statistics.means(self.accelerator)
        if not math.isfinite(means["loss"]):
            raise UserError(f"the loss is {means['loss']} at step {training.step}; lower --lr or use bf16 for fp16")
        speed = self.steps / (time.monotonic() - self.window)
        self.log.text(f"epoch {training.epoch}, step {training.step}: loss {means['loss']:.4f}, {speed:.2f} steps/s, "
                      f"{speed * training.batch:.1f} images/s")
        if training.gradient_norm is not None:
            means["gradient_norm"] = float(training.gradient_norm)
        self.log.metrics(training.step, **means, lr=training.optimiser.param_groups[0]["lr"], steps_per_second=speed,
                         images_per_second=speed * training.batch, memory_mib=peak_memory(self.accelerator.device))
        training.restart_statistics()
        self.steps, self.window = 0, time.monotonic()

    def validate(self):
        """Sample, score; keep the checkpoint if it is the best so far. What --max-minutes cuts short is left out."""
        paused, training, options = time.monotonic(), self.training, self.options
        decides, scores = options.validation_weights, {}
        for kind in options.scored:
            before = training.validated if kind == decides else []
            result = self.validation(self.net_of(kind), before, self.started + self.limit)
            if result is None:
                self.log.text(f"epoch {training.epoch}, step {training.step}: --max-minutes {options.max_minutes:g} "
                              f"are over, validation of the {WEIGHTS[kind]} weights left out")
                break
            scores[kind], images = result
            if kind == decides:
                self.show(images)
        if scores:
            self.write_scores(scores)
        if scores and scores[decides] < training.best_kid:
            training.best_kid = scores[decides]
            self.save("best_ckpt.pt")
        took = self.longest(time.monotonic() - paused)
        self.window += took  # the speed is that of training
        self.pace.pauses += took
        self.reserve = max(self.reserve, took)

    def net_of(self, kind):
        """The net with averaged or raw weights."""
        if kind == "ema":
            return self.training.ema
        net = copy.deepcopy(self.training.ema)  # a copy: the net itself would compute in --mixed_precision
        net.load_state_dict(self.training.bare_net.state_dict())
        return net

    def show(self, images):
        """The grid of real and generated images: RUN/samples/epoch-00001.png, and the tracker."""
        if self.log.active:
            file = self.log.folder / "samples" / f"epoch-{self.training.epoch:05d}.png"
            picture = self.validation.write_grid(images, file)
            self.log.picture(self.training.step, "samples", picture)

    def write_scores(self, scores):
        """KIDs (weights -> number) and the noise floor, to the screen and the logs."""
        training, options = self.training, self.options
        said = ", ".join(f"{1e3 * score:.2f}e-3 ({WEIGHTS[kind]} weights)" for kind, score in scores.items())
        logged = {"kid": scores[options.validation_weights]}
        logged |= {f"kid_{WEIGHTS[kind]}": score for kind, score in scores.items()}
        floor = self.validation.floor if self.log.active else None
        if floor:
            logged |= {"kid_floor": floor[0], "kid_floor_std": floor[1]}
            said += f", noise floor {1e3 * floor[0]:.2f}e-3 ± {1e3 * floor[1]:.2f}e-3"
        self.log.text(f"epoch {training.epoch}, step {training.step}: validation KID[{self.validation.features.name}] "
                      f"{said} ({len(self.validation.chosen)} images, {self.validation.options.sampling.steps} steps)")
        self.log.metrics(training.step, **logged)

    def save(self, name):
        """Write a checkpoint; the first process does, the others wait. One that is not finite replaces no other."""
        if not all_finite(self.training.bare_net.parameters()):
            raise UserError(f"the weights are not finite at step {self.training.step}; the last checkpoint stays; "
                            "lower --lr or use bf16 for fp16")
        self.saved, self.save_is_due = time.monotonic(), False
        self.training.minutes = (self.saved - self.started) / 60
        if self.timed_out:  # nothing is left of the time, even if the last validation was quicker than expected
            self.training.minutes = max(self.training.minutes, self.options.max_minutes)
        if self.accelerator.is_main_process:
            checkpoints.save(self.log.folder / "checkpoints" / name, self.training.state() | self.about)
        self.accelerator.wait_for_everyone()


class Pace:
    """How long a step takes, without validations."""

    def __init__(self):
        self.steps, self.pauses = 0, 0.0

    def start(self):
        self.started = time.monotonic()

    @property
    def seconds_per_step(self):
        return (time.monotonic() - self.started - self.pauses) / self.steps
