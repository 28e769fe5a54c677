"""One training run: the net, its averages, the optimiser, and where they stand. generation/loop.py has the loop.

Everything random about a step is a function of (seed, step, place in the batch), so that a stopped run goes on as if it
had not been stopped, on any number of processes.
"""

import copy
import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from core.errors import UserError
from core.random import generator, on_device
from diffusion import create_diffusion, multiscale
from generation.guidance import next_state
from generation.optimiser import make_optimiser
from models import LABEL_TABLE, MODELS

LABEL_DROP = 0.1  # each label *entry* is dropped by itself, as published (geca.py:94-99)
BINS = 5  # of diffusion steps in which the loss is logged: equal losses can hide different layouts
SCHEDULES = ("constant", "linear", "cosine")  # of the learning rate


@dataclass(frozen=True)
class TrainingOptions:
    """How to train; the paper's numbers are in presets.py."""

    batch: int  # images per step over all processes
    epochs: int
    optimizer: str  # one of OPTIMISERS, without weight decay
    lr: float
    lr_schedule: str  # one of SCHEDULES
    warmup: int  # steps over which the learning rate grows from 0
    adam_betas: tuple  # decay of AdamW's two moments
    clip_norm: float  # largest norm of the gradient; 0: as it is
    min_snr: float  # γ of the loss weight min(SNR, γ) / SNR (Hang et al. 2023); 0: none
    train_heredity: float  # probability that a sample starts from an inherited state
    ema_decay: float
    more_ema_decays: tuple = ()  # further averages that are kept, to choose from after training
    ema_warmup: bool = True
    grad_norm: bool = False  # divide each parameter's gradient by its norm, as published
    frozen_latents: bool = False  # one draw of mirror and posterior per image, as published
    multi_scale: bool = False
    position_code: str = "published"  # of GeCA: one of automaton/rule.py
    checkpoint_steps: bool | None = None  # compute steps or blocks again in backward; None: as the model prefers
    compile: bool = False  # fuse kernels with torch.compile
    seed: int = 0


def learning_rate(options, step, progress):
    """The learning rate at a step; `progress` in [0, 1] is the share of the training that is done."""
    decay = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    warm = min(1.0, (step + 1) / options.warmup) if options.warmup else 1.0
    return options.lr * warm * decay[options.lr_schedule]


def ema_decay(limit, step, warmup=True):
    """The decay of an average at a step: min(limit, (1 + step) / (10 + step)) with warm-up, else `limit`.

    Early averages must forget what the run started from, be it random weights or another run's (--load-from): without
    warm-up half of it is left after 7,000 steps at 0.9999.
    """
    return min(limit, (1 + step) / (10 + step)) if warmup else limit


@lru_cache(maxsize=1)  # drawing it at every step would take longer the more images there are
def order_of_epoch(seed, epoch, n):
    """The n images of an epoch in the order in which it shows them: (n,)."""
    return torch.randperm(n, generator=generator(seed, "epoch", epoch))


@torch.no_grad()
def update_ema(ema, net, decay):
    """ema ← decay · ema + (1 − decay) · net."""
    torch._foreach_lerp_(list(ema.parameters()), [p.float() for p in net.parameters()], 1 - decay)


def min_snr_weight(alphas_cumprod, gamma):
    """Weight of the squared error of ε at noise level ᾱ: min(SNR, γ) / SNR, SNR = ᾱ / (1 − ᾱ) (Hang et al. 2023)."""
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return snr.clip(max=gamma) / snr


class Statistics:
    """What is logged of the steps since the last log line: sums over this process's samples, kept on the device."""

    def __init__(self, device):
        self.loss = torch.zeros(2, device=device)  # sum of losses, their number
        self.mse = torch.zeros(BINS, 2, device=device)  # by bins of t: sum of squared errors of ε, their number
        self.state = torch.zeros(2, 2, device=device)  # sums of mean squares of the automaton's state, their number

    def add(self, loss, mse, t, state=None, hidden=None):
        """Loss and MSE (n,) of n samples at the steps t (n,) of 1000 on the CPU.

        state (n, S, h, w): what the automaton leaves, whose last `hidden` channels live on; None without one.
        """
        bins = on_device(t * BINS // 1000, mse.device)
        one = torch.ones_like(mse)
        self.loss += torch.stack([loss.sum(), one.sum()])
        self.mse.index_add_(0, bins, torch.stack([mse, one], 1))
        if state is not None:
            parts = torch.stack([part.float().square().mean((1, 2, 3)) for part in (state, state[:, -hidden:])])
            self.state += torch.stack([parts.sum(1), one.sum().expand(2)], 1)

    def means(self, accelerator):
        """Over all processes -> dict: loss, loss_t0 … loss_t4 (of the bins that had samples) and, of GeCA, state_rms.

        That is the root mean square of the whole state, hidden_rms that of its hidden channels.
        """
        sums = accelerator.reduce(torch.cat([self.loss[None], self.mse, self.state]), "sum")
        loss, *bins, state, hidden = [total / count if count else None for total, count in sums.tolist()]
        rows = {"loss": loss} | {f"loss_t{i}": value for i, value in enumerate(bins) if value is not None}
        return rows if state is None else rows | {"state_rms": math.sqrt(state), "hidden_rms": math.sqrt(hidden)}


class Training:
    """The net, its averages and its optimiser, and what one step does with them."""

    def __init__(self, model, cache, label_names, options, accelerator, load_from=None):
        """`load_from`: state dict to start from (`weights_to_start_from`), else the model's own initialisation."""
        torch.manual_seed(options.seed)  # the initialisation is the only draw from the global stream
        self.options, self.accelerator, self.cache = options, accelerator, cache
        self.diffusion = create_diffusion()
        self.model_args = model_args(model, cache, label_names, options.position_code)
        net = build(**self.model_args)
        if options.train_heredity and not hasattr(net, "inherit"):
            raise UserError(f"--train-heredity {options.train_heredity}: {model} keeps no state; leave the flag out or "
                            "take a GeCA")
        if options.checkpoint_steps is not None:
            net.checkpoint_steps = options.checkpoint_steps
        if load_from:
            net.load_state_dict({**net.state_dict(), **load_from})
        self.ema = copy.deepcopy(net).eval().requires_grad_(False).to(accelerator.device)
        self.averages = {decay: copy.deepcopy(self.ema) for decay in options.more_ema_decays}
        if options.compile:  # after the averages were copied: a copy would go on computing with these weights
            net.compile_parts()
        optimiser = make_optimiser(net, options.optimizer, options.lr, tuple(options.adam_betas), net.edges)
        self.net, self.optimiser = accelerator.prepare(net, optimiser)
        self.step, self.best_kid, self.minutes, self.time_share = 0, math.inf, 0.0, 0.0
        self.history = []  # what changed when the run was continued: {"step": …, "changed": flag -> [before, after]}
        self.validated = []  # features (n, D) of the images of each validation, for --validation-kid accumulated
        self.batch = min(options.batch, len(cache))
        self.steps_per_epoch = len(cache) // self.batch
        self.restart_statistics()
        self.loss_weight = None
        if options.min_snr:
            self.loss_weight = min_snr_weight(self.diffusion.alphas_cumprod, options.min_snr)

    @property
    def parameters(self):
        """How many numbers the net has."""
        return sum(p.numel() for p in self.ema.parameters())

    @property
    def epoch(self):
        return self.step // self.steps_per_epoch

    @property
    def total_steps(self):
        return self.options.epochs * self.steps_per_epoch

    @property
    def progress(self):
        """The share of the training that is done, in steps or, with a time limit, in time: whichever is more."""
        return min(1.0, max(self.step / self.total_steps, self.time_share))

    @property
    def bare_net(self):
        """The net itself, without DistributedDataParallel or accelerate's torch.compile around it."""
        return self.accelerator.unwrap_model(self.net, keep_torch_compile=False)

    def train_step(self, measure=False):
        """One step: draw, loss, gradient, update, averages; `measure` the norm of the gradient for the log."""
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.options, self.step, self.progress)
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        mine = list(enumerate(self.images_of_step()))[rank::processes]
        share = sum(self.losses(samples).sum() for samples in self.draw(mine)) / self.batch
        self.accelerator.backward(share * processes)  # DDP averages the gradients of the processes
        self.change_gradients(measure)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        for limit, average in [(self.options.ema_decay, self.ema), *self.averages.items()]:
            update_ema(average, self.bare_net, ema_decay(limit, self.step, self.options.ema_warmup))
        self.step += 1

    def restart_statistics(self):
        """Forget what has been logged."""
        self.statistics, self.gradient_norm = Statistics(self.accelerator.device), None

    def images_of_step(self):
        """Indices of the images of the global batch: each epoch is one seeded shuffle, its remainder dropped."""
        start = self.step % self.steps_per_epoch * self.batch
        return order_of_epoch(self.options.seed, self.epoch, len(self.cache))[start:start + self.batch].tolist()

    def draw(self, mine):
        """Everything random about some samples, (place in the batch, image) each.

        Returns lists of (x_0, t, labels, noise, generator), one list for each grid: with --multi-scale up to three.
        """
        grids = {}
        for place, image in mine:
            g = generator(self.options.seed, "train", self.step, place)
            x = self.cache.draw(image, self.latent_generator(image, place))
            if not x.isfinite().all():
                raise UserError(f"{self.cache.path}: the latents of image {image} are not finite; remove it and "
                                "extract again")
            t = torch.randint(self.diffusion.num_timesteps, (), generator=g)
            if self.options.multi_scale:
                x = multiscale.shrink(x, int(t))
            label = self.cache.labels[image]
            kept = torch.rand(label.shape, generator=g) >= LABEL_DROP
            sample = (x, t, label * kept, torch.randn(x.shape, generator=g), g)
            grids.setdefault(x.shape, []).append(sample)
        return list(grids.values())

    def latent_generator(self, image, place):
        """Decides mirror and posterior sample: anew at each step, or with --frozen-latents once for each image.

        The published extraction stored one draw (extract_features.py:193) and, for OCT, one coin-flip mirror (:145).
        """
        if self.options.frozen_latents:
            return generator(self.options.seed, "frozen latent", image)
        return generator(self.options.seed, "latent", self.step, place)

    def losses(self, samples):
        """The loss (n,) of n samples on one grid; notes it in `statistics`."""
        *columns, generators = zip(*samples, strict=True)
        t = torch.stack(columns.pop(1))  # stays on the CPU, where the tables of the diffusion are
        x, y, noise = (on_device(torch.stack(column), self.accelerator.device) for column in columns)
        after = None

        def denoise(x, t):
            nonlocal after
            out, after = self.net(x, t, y, self.first_state(x, t, y, generators), generator=generators)
            return out

        terms = self.diffusion.training_losses(denoise, x, t, noise)
        loss = terms["loss"]
        if self.loss_weight is not None:
            loss = self.diffusion.at(self.loss_weight, t, x).flatten() * terms["mse"] + terms["vb"]
        state = () if after is None else (after.detach(), self.bare_net.hidden)
        self.statistics.add(loss.detach(), terms["mse"].detach(), t, *state)
        return loss

    @torch.no_grad()
    def first_state(self, x, t, y, generators):
        """--train-heredity: the state (n, S, h, w) that a training step starts from; None is a single living cell.

        With probability P a sample inherits from a first pass *on the same x_t and t*, without gradients, by the very
        function that sampling uses (cf. RIN, Jabri et al. 2023). Another noise level of the same draw would not do:
        x_t and x_t' of one x_0 and one ε give x_0 away.
        """
        if not self.options.train_heredity:
            return None
        net, grid = self.bare_net, x.shape[2:]
        coins = torch.stack([torch.rand((), generator=g) for g in generators]) < self.options.train_heredity
        chosen = coins.nonzero().flatten()
        seeds = on_device(net.draw_seed(len(x), generators), x.device)
        state = next_state(net, None, seeds, grid)
        if len(chosen):
            on = on_device(chosen, x.device)
            _, first = net(x[on], t[on], y[on], None, generator=[generators[i] for i in chosen.tolist()])
            state[on] = next_state(net, first.to(state.dtype), seeds[on], grid)
        return state

    def change_gradients(self, measure):
        """--grad-norm and --clip-norm; with `measure`, notes the norm of all gradients together before clipping."""
        parameters = [p for p in self.net.parameters() if p.grad is not None]  # a fixed position table has none
        if self.options.grad_norm or self.options.clip_norm or measure:
            self.accelerator.unscale_gradients()  # under fp16 they are multiplied by the scale of the loss
        if self.options.grad_norm:
            # The published code normalises before unscaling: Adam then sees values near its epsilon.
            for p in parameters:
                p.grad /= p.grad.norm() + 1e-8
        if self.options.clip_norm or measure:
            largest = self.options.clip_norm or math.inf
            self.gradient_norm = torch.nn.utils.clip_grad_norm_(parameters, largest)

    def state(self):
        """What a checkpoint holds of the training (generation/checkpoint.py)."""
        scaler = self.accelerator.scaler
        return {"model": self.bare_net.state_dict(), "ema": self.ema.state_dict(),
                "averages": {str(decay): net.state_dict() for decay, net in self.averages.items()},
                "opt": self.optimiser.state_dict(), "scaler": scaler.state_dict() if scaler else {}, "step": self.step,
                "epoch": self.epoch, "best_kid": self.best_kid, "minutes": self.minutes, "validated": self.validated,
                "history": self.history, "model_args": self.model_args}

    def restore(self, checkpoint):
        """Go on from the last Checkpoint of this run, with the options of now.

        One of something else raises what torch raises, or ValueError.
        """
        lacks = [name for name in ("opt", "step", "minutes", "best_kid") if getattr(checkpoint, name) in (None, {})]
        if lacks:
            raise ValueError(f"has no `{lacks[0]}`")
        self.bare_net.load_state_dict(checkpoint.model)
        self.ema.load_state_dict(checkpoint.ema)
        for decay, net in self.averages.items():
            net.load_state_dict(checkpoint.averages[str(decay)])
        self.optimiser.load_state_dict(checkpoint.opt)
        for group in self.optimiser.param_groups:  # they come with its state
            group["betas"] = tuple(self.options.adam_betas)
        if self.accelerator.scaler and checkpoint.scaler:
            self.accelerator.scaler.load_state_dict(checkpoint.scaler)
        self.step, self.minutes, self.best_kid = checkpoint.step, checkpoint.minutes, checkpoint.best_kid
        self.validated, self.history = list(checkpoint.validated), list(checkpoint.history)


def model_args(model, cache, label_names, position_code="published"):
    """Name and sizes of the net that a latent cache and its labels ask for, and the position code if it is ours."""
    sizes = {"model": model, "input_size": cache.mean.shape[-1], "num_classes": len(label_names),
             "in_channels": cache.mean.shape[2]}
    return sizes if position_code == "published" else sizes | {"position_code": position_code}


def build(model, **sizes):
    """The net. Raises UserError for a grid that the model cannot tile."""
    try:
        return MODELS[model](**sizes)
    except ValueError as error:
        raise UserError(f"--model {model}: {error}; change --image-size or the model") from None


def weights_to_start_from(checkpoint, sizes, label_names, flag):
    """The averaged weights of another run (--load-from) that fit a net of these `model_args`.

    Returns (state dict, whether the label table is left out because the labels are others). Raises UserError where
    other weights than the label table do not fit; `flag` names the file in the error.
    """
    with torch.device("meta"):
        own = build(**sizes).state_dict()
    weights = {key: value.float() for key, value in checkpoint.weights(checkpoint.default_kind).items()}
    odd = sorted(set(weights) ^ set(own)) or [k for k in own if k != LABEL_TABLE and own[k].shape != weights[k].shape]
    if odd:
        raise UserError(f"{flag}: holds a {checkpoint.model_args['model']}, whose {odd[0]} does not fit; give the same "
                        "--model and sizes")
    codes = [args.get("position_code", "published") for args in (checkpoint.model_args, sizes)]
    if codes[0] != codes[1]:  # it has no weights that could be odd
        raise UserError(f"{flag}: was trained with --position-code {codes[0]}; give the same")
    theirs = checkpoint.label_names  # None: not named, so that only their number can be compared
    others = (theirs is not None and theirs != list(label_names)) or (
        checkpoint.model_args["num_classes"] != len(label_names))
    if others:
        del weights[LABEL_TABLE]
    return weights, others
