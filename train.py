r"""Train a denoiser on the latent cache of one fold.

    python train.py --model GeCA-XS --data-path data/oct --feature-path store/oct --fold 0 --vae retina \
        --image-size 64 --global-batch-size 32 --epochs 200 --validate-every 50
    accelerate launch --multi_gpu --num_processes 4 --mixed_precision fp16 train.py --model GeCA-S ...

Writes RESULTS/{index:03d}-{model}-{fold}/: log.txt, metrics.jsonl, TensorBoard events, samples/ (a grid per
validation), checkpoints/last_ckpt.pt and best_ckpt.pt (lowest validation KID). The same command continues a
stopped run. Validation samples as the final sampling does: EMA weights, the labels of the fold's validation
images, guidance; the KID is computed afresh each time.
"""

import copy
import math
import sys
import time
from argparse import BooleanOptionalAction
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from tqdm import tqdm

from core import runs
from core.cli import Parser, integer, number, run
from core.errors import UserError
from core.files import make_folder
from core.random import generator, on_device
from core.runtime import Interruption, start, stop
from dataset import latents
from dataset.root import fingerprint, read_split
from dataset.vae import cells_per_side, open_codec, same_weights
from diffusion import create_diffusion, multiscale
from generation import checkpoint as checkpoints
from generation.sampling import add_state_flag
from generation.validation import Validation
from models import LABEL_TABLE, MODELS

LABEL_DROP = 0.1  # each label *entry* is dropped by itself, as published (geca.py:94-99)
NOT_SETTINGS = ("epochs", "max_minutes", "validate_every", "log_every", "ckpt_every", "num_workers", "cache",
                "results_dir", "as_released", "checkpoint_steps")  # of these, a continued run may have others
AGREE_EVERY = 5  # steps after which the processes ask each other whether to stop
SAVE_MINUTES = 5  # last_ckpt.pt is written at least so often
RELEASED = {"frozen_latents": True, "ema_warmup": False, "validation_weights": "model", "validation_labels": "null",
            "validation_kid": "accumulated", "val_samples": 24, "num_sampling_steps": 1000, "cfg_scale": 1.0,
            "unguided_state": "whole"}  # --as-released


class Training:
    """One run: the net, its average, the optimiser, and where they stand."""

    def __init__(self, args, accelerator, cache, label_names, codec):
        torch.manual_seed(args.global_seed)  # start values are the only draw from the global stream
        self.args, self.accelerator, self.cache = args, accelerator, cache
        self.diffusion = create_diffusion()
        self.model_args = {"model": args.model, "input_size": cache.mean.shape[-1],
                           "num_classes": len(label_names), "in_channels": cache.mean.shape[2]}
        net = self.build(**self.model_args)
        if args.checkpoint_steps is not None:
            net.checkpoint_steps = args.checkpoint_steps
        if args.load_from:
            start_from(net, args.load_from, label_names, codec)
        self.ema = copy.deepcopy(net).eval().requires_grad_(False).to(accelerator.device)
        optimiser = torch.optim.AdamW(net.parameters(), lr=args.lr, weight_decay=0)
        self.net, self.optimiser = accelerator.prepare(net, optimiser)
        self.step, self.best_kid, self.minutes = 0, math.inf, 0.0
        self.validated = []  # features (n, D) of the images of each validation, for --validation-kid accumulated
        self.batch = min(args.global_batch_size, len(cache))
        self.steps_per_epoch = len(cache) // self.batch

    @staticmethod
    def build(model, **sizes):
        try:
            return MODELS[model](**sizes)
        except ValueError as error:  # a grid that the model cannot tile
            raise UserError(f"--model {model}: {error}; change --image-size or the model") from None

    @property
    def epoch(self):
        return self.step // self.steps_per_epoch

    def images_of_step(self):
        """Numbers of the images of the global batch: each epoch is one seeded shuffle, its remainder dropped."""
        order = torch.randperm(len(self.cache), generator=generator(self.args.global_seed, "epoch", self.epoch))
        start = self.step % self.steps_per_epoch * self.batch
        return order[start:start + self.batch].tolist()

    def train_step(self):
        """One optimiser step; returns this process's share of the mean loss, so that the sum is the mean."""
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        mine = list(enumerate(self.images_of_step()))[rank::processes]
        share = sum(self.losses(samples).sum() for samples in self.draw(mine)) / self.batch
        self.accelerator.backward(share * processes)  # DDP averages the gradients of the processes
        if self.args.grad_norm:
            # The published code normalises before unscaling: under fp16 Adam then sees values near its epsilon.
            self.accelerator.unscale_gradients()
            for p in self.net.parameters():
                if p.grad is not None:  # a fixed position table has none
                    p.grad /= p.grad.norm() + 1e-8
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        update_ema(self.ema, self.accelerator.unwrap_model(self.net), self.ema_decay())
        self.step += 1
        return share.detach()

    def losses(self, samples):
        """The loss (n,) of n samples on one grid."""
        *columns, generators = zip(*samples, strict=True)
        t = torch.stack(columns.pop(1))  # stays on the CPU, where the tables of the diffusion are
        x, y, noise = (on_device(torch.stack(column), self.accelerator.device) for column in columns)
        return self.diffusion.training_losses(
            lambda x, t: self.net(x, t, y, generator=generators)[0], x, t, noise)["loss"]

    def draw(self, mine):
        """Everything random about some samples of this step, each a function of (seed, step, place in the batch).

        Returns lists of (x_0, t, labels, noise, generator), one list for each grid: with --multi-scale up to three.
        """
        grids = {}
        for place, image in mine:
            g = generator(self.args.global_seed, "train", self.step, place)
            x = self.cache.draw(image, self.latent_generator(image, place))
            t = torch.randint(self.diffusion.num_timesteps, (), generator=g)
            if self.args.multi_scale:
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
        if self.args.frozen_latents:
            return generator(self.args.global_seed, "frozen latent", image)
        return generator(self.args.global_seed, "latent", self.step, place)

    def ema_decay(self):
        """Warm-up: early averages must forget random weights, or they hold half of them after 7,000 steps."""
        if not self.args.ema_warmup or self.args.load_from:  # as published; or the start is worth keeping
            return self.args.ema_decay
        return min(self.args.ema_decay, (1 + self.step) / (10 + self.step))

    def state(self, **more):
        net = self.accelerator.unwrap_model(self.net)
        scaler = self.accelerator.scaler
        return {"model": net.state_dict(), "ema": self.ema.state_dict(), "opt": self.optimiser.state_dict(),
                "scaler": scaler.state_dict() if scaler else {}, "step": self.step, "epoch": self.epoch,
                "best_kid": self.best_kid, "minutes": self.minutes, "validated": self.validated,
                "model_args": self.model_args, **more}

    def restore(self, path):
        """Go on from a checkpoint of this run -> the identity of the feature space its KID was measured in."""
        state = checkpoints.load(path, flag="last checkpoint")
        self.accelerator.unwrap_model(self.net).load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimiser.load_state_dict(state["opt"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.minutes, self.best_kid = state["step"], state["minutes"], state["best_kid"]
        self.validated = state.get("validated", [])
        return state["features"]


def start_from(net, path, label_names, codec):
    """Load the averaged weights of another run (--load-from); for other labels, all but the label table."""
    checkpoint = checkpoints.load(path, flag="--load-from")
    if checkpoint["codec"] is None:  # the published layout names its autoencoder but cannot prove it
        PartialState().print(f"--load-from {path}: does not say whose latents it was trained on; --vae must be right")
    elif not same_weights(checkpoint["codec"], codec.identity):
        raise UserError(f"--load-from {path}: was trained on latents of {checkpoint['codec']}, but --vae is "
                        f"{codec.identity}; give that VAE")
    kind = "ema" if checkpoint["ema"] else "model"
    weights = {key: value.float() for key, value in checkpoint[kind].items()}
    own, sizes = net.state_dict(), checkpoint["model_args"]
    odd = sorted(set(weights) ^ set(own)) or [k for k in own if k != LABEL_TABLE and own[k].shape != weights[k].shape]
    if odd:
        raise UserError(f"--load-from {path}: holds a {sizes['model']}, whose {odd[0]} does "
                        "not fit; give the same --model and sizes")
    theirs = checkpoint["label_names"]  # None: not named, so that only their number can be compared
    if theirs != (theirs and list(label_names)) or sizes["num_classes"] != len(label_names):
        weights[LABEL_TABLE] = own[LABEL_TABLE]
        PartialState().print(f"--load-from {path}: its labels are {' '.join(theirs or ['others'])}; the label "
                             "table starts anew")
    net.load_state_dict(weights)


@torch.no_grad()
def update_ema(ema, net, decay):
    """ema ← decay · ema + (1 − decay) · net."""
    torch._foreach_lerp_(list(ema.parameters()), [p.float() for p in net.parameters()], 1 - decay)


def train(args, training, validation, log, about, interruption):
    """Run until --epochs, --max-minutes or an interruption; validate, save, log on the way. Was it interrupted?"""
    accelerator, total = training.accelerator, args.epochs * training.steps_per_epoch
    started, window, losses = time.time() - 60 * training.minutes, time.time(), []
    saved = time.time()

    def save(name):
        nonlocal saved
        saved = time.time()
        training.minutes = (saved - started) / 60
        if accelerator.is_main_process:
            checkpoints.save(log.folder / "checkpoints" / name, training.state(**about))
        accelerator.wait_for_everyone()

    def validate():
        found = validation(training, log.folder)
        weights = "averaged" if args.validation_weights == "ema" else "raw"
        log.text(f"epoch {training.epoch}, step {training.step}: validation KID[{validation.features.name}] "
                 f"{1e3 * found:.2f}e-3 ({len(validation.chosen)} images, {args.num_sampling_steps} steps, {weights} "
                 "weights)")
        log.metrics(training.step, kid=found)
        if found < training.best_kid:
            training.best_kid = found
            save("best_ckpt.pt")

    def agree(*flags):
        """Which of these hold on any process: all must do the same."""
        flags = torch.tensor(flags, dtype=torch.float32, device=accelerator.device)
        return (accelerator.reduce(flags, "sum") > 0).tolist()

    # With a time limit the number of steps to come is unknown, and so is the time they take.
    bar = tqdm(initial=training.step, total=None if args.max_minutes else total, unit="step", mininterval=5,
               disable=not log.active)
    timed_out, stopped, due = 0 < args.max_minutes <= training.minutes, False, False
    while training.step < total and not timed_out and not stopped:
        losses.append(training.train_step())
        bar.update()
        if training.step % AGREE_EVERY == 0:
            now = time.time()
            timed_out, stopped, due = agree(0 < args.max_minutes < (now - started) / 60, interruption.asked,
                                            now - saved > 60 * SAVE_MINUTES)
        last = training.step == total or timed_out
        if training.step % args.log_every == 0 or last:
            loss = accelerator.reduce(torch.stack(losses).mean(), "sum").item()
            if not math.isfinite(loss):
                raise UserError(f"the loss is {loss} at step {training.step}; lower --lr or use bf16 for fp16")
            rate = len(losses) / (time.time() - window)
            log.text(f"epoch {training.epoch}, step {training.step}: loss {loss:.4f}, {rate:.2f} steps/s, "
                     f"{rate * training.batch:.1f} images/s")
            log.metrics(training.step, loss=loss, steps_per_second=rate, images_per_second=rate * training.batch)
            losses, window = [], time.time()
        end_of_epoch = training.step % training.steps_per_epoch == 0
        if last or (end_of_epoch and training.epoch % args.validate_every == 0):
            paused = time.time()
            validate()
            window += time.time() - paused  # the rate is that of training
        if last or stopped or due or training.step % args.ckpt_every == 0:
            save("last_ckpt.pt")
            due = False
    bar.close()
    if stopped:
        log.text(f"stopped at step {training.step}; the same command continues")
        return True
    reason = f"after --max-minutes {args.max_minutes}" if timed_out else "complete"
    log.text(f"{reason}: epoch {training.epoch}, step {training.step}, best KID {1e3 * training.best_kid:.2f}e-3")
    return False


def main():
    args = parser().parse_args()
    args.validate_every = args.validate_every or args.epochs
    validation_split = read_split(args.data_path, f"val_{args.fold}", args.num_classes)
    training_split = read_split(args.data_path, f"train_{args.fold}", args.num_classes)
    if training_split.label_names != validation_split.label_names:
        raise UserError(f"{validation_split.path}: labels {' '.join(validation_split.label_names)}, expected those of "
                        f"{training_split.path.name}: {' '.join(training_split.label_names)}")
    cache = latents.load(args.feature_path, args.fold)
    start()
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("--mixed_precision fp16 needs a GPU (there is no loss scaling on a CPU); give bf16 or no")
    codec = open_codec(args.vae, args.image_space, accelerator.device)
    latents.check(cache, latents.manifest_of(training_split, codec, args.image_size), training_split.labels, codec,
                  cells_per_side(args.image_size, codec))
    if args.in_channels is not None and args.in_channels != codec.channels:
        raise UserError(f"--in-channels {args.in_channels}: the VAE has {codec.channels}; leave the flag out")
    if args.multi_scale and not MODELS[args.model].func.any_grid:
        raise UserError(f"--multi-scale: {args.model} works on one grid only; leave the flag out or take a GeCA")
    if args.multi_scale and cache.mean.shape[-1] % 4:
        raise UserError(f"--multi-scale: found {cache.mean.shape[-1]} cells per side, expected a multiple of 4")
    if min(args.global_batch_size, len(cache)) < accelerator.num_processes:
        raise UserError(f"--global-batch-size {args.global_batch_size}: {len(cache)} images, expected at least one "
                        f"for each of the {accelerator.num_processes} processes")
    label_names = list(training_split.label_names)
    args.num_classes, args.in_channels = len(label_names), codec.channels
    args.data_path, args.feature_path = str(args.data_path), str(args.feature_path)
    settings = {key: value for key, value in sorted(vars(args).items()) if key not in NOT_SETTINGS}
    settings |= {"codec": codec.identity, "training_images": fingerprint(training_split),
                 "validation_images": fingerprint(validation_split)}  # other data or VAE: another run
    folder, exists, note = runs.find_or_number(args.results_dir, f"{args.model.replace('/', '-')}-{args.fold}",
                                               settings, parser().defaults())
    training = Training(args, accelerator, cache, label_names, codec)
    make_folder(args.results_dir, "--results-dir")  # if it cannot be, better now than later
    last = folder / "checkpoints" / "last_ckpt.pt"
    validation = Validation(args, accelerator, codec, validation_split)
    if exists and last.is_file() and training.restore(last) != validation.features.identity:
        training.best_kid, training.validated = math.inf, []  # measured in another feature space
    accelerator.wait_for_everyone()  # every process has looked for the run before the first one makes it
    log = runs.RunLog(folder, settings, accelerator.is_main_process, training.step)
    log.text(f"run {folder}: {args.model}, {sum(p.numel() for p in training.ema.parameters()):,} parameters, "
             f"{len(cache)} images, {training.steps_per_epoch} steps of {training.batch} per epoch, "
             f"{accelerator.num_processes} process(es) on {accelerator.device}, mixed precision "
             f"{accelerator.mixed_precision}")
    if note:
        log.text(note)
    if exists:
        log.text(f"continuing from step {training.step}" if training.step else "no checkpoint yet: starting again")
    if not cache.manifest:
        log.text(f"{cache.path}: does not say which VAE made it; --vae must be right")
    shared = {*training_split.patients} & {*validation_split.patients}
    if shared:
        log.text(f"warning: {len(shared)} patient(s) train and validate, {min(shared)} the first: scores will flatter")
    about = {"args": {k: v if v is None or isinstance(v, (int, float, str, bool)) else str(v)
                      for k, v in vars(args).items()},
             "label_names": label_names, "codec": codec.identity, "run": folder.name,
             "training_images": settings["training_images"],
             "features": validation.features.identity}
    with Interruption() as interruption:
        stopped = train(args, training, validation, log, about, interruption)
    log.close()
    if stopped:
        stop()
        sys.exit(130)


def parser():
    p = Parser(__doc__, RELEASED)
    p.add_argument("--model", choices=MODELS, default="GeCA-S", help="which denoiser")
    p.add_argument("--data-path", type=Path, required=True, metavar="ROOT", help="data root (labels, validation)")
    p.add_argument("--feature-path", type=Path, required=True, metavar="DIR", help="latent cache")
    p.add_argument("--results-dir", default="results", metavar="DIR", help="where the run folder goes")
    p.add_argument("--load-from", metavar="FILE", help="start from the averaged weights of this checkpoint")
    g = p.add_argument_group("data and space")
    g.add_argument("--fold", type=integer(0), default=0, help="train on train_{fold}, validate on val_{fold}")
    g.add_argument("--num-classes", type=integer(1), help="labels expected in the CSV (default: what it has)")
    g.add_argument("--image-size", type=integer(8, 2048), default=256, help="side of the square crop, in pixels")
    g.add_argument("--vae", default="ema", help="ema, mse (stabilityai/sd-vae-ft-*), retina (bundled) or a folder")
    g.add_argument("--image-space", action="store_true", help="diffuse pixels, without a VAE")
    g.add_argument("--in-channels", type=integer(1), help="latent channels (default: the VAE's)")
    g.add_argument("--multi-scale", action="store_true", help="noisy steps on coarser grids (needs a multiple of 4)")
    g = p.add_argument_group("optimisation")
    g.add_argument("--epochs", type=integer(1), default=14000, help="passes over the training images")
    g.add_argument("--max-minutes", type=number(0), default=0, help="stop after so many minutes of "
                   "training, those before a resumption included; 0 is never")
    g.add_argument("--global-batch-size", type=integer(1), default=128, help="images per step over all processes")
    g.add_argument("--lr", type=number(0), default=1e-4, help="learning rate of AdamW, constant")
    g.add_argument("--grad-norm", action="store_true", help="divide each parameter's gradient by its norm")
    g.add_argument("--ema-decay", type=number(0, 1), default=0.9999, help="of the averaged weights, after warm-up")
    g.add_argument("--checkpoint-steps", action=BooleanOptionalAction, help="save memory: compute each step of the "
                   "automaton, or block of a baseline, again in backward (default: GeCA yes, baselines no)")
    g.add_argument("--ema-warmup", action=BooleanOptionalAction, default=True,
                   help="let early averages forget the start (published: no)")
    g.add_argument("--frozen-latents", action=BooleanOptionalAction, default=False,
                   help="draw mirror and posterior sample once for each image, not at each step (published: once)")
    g.add_argument("--global-seed", type=integer(0), default=0, help="seed of every draw")
    g = p.add_argument_group("validation and logs")
    g.add_argument("--validate-every", type=integer(1), metavar="EPOCHS", help="epochs between validations "
                   "(default: only at the end)")
    g.add_argument("--val-samples", type=integer(2), default=24, help="images sampled per validation")
    g.add_argument("--num-sampling-steps", type=integer(1, 1000), default=250, help="steps of those samples")
    g.add_argument("--cfg-scale", type=number(0), default=1.5, help="guidance of those samples; 1 is none")
    g.add_argument("--validation-weights", choices=("ema", "model"), default="ema",
                   help="averaged or raw weights make those samples (published: raw)")
    g.add_argument("--validation-labels", choices=("own", "null"), default="own",
                   help="labels of the validation images, or none at all (published: null)")
    g.add_argument("--validation-kid", choices=("fresh", "accumulated"), default="fresh", help="score against all "
                   "validation images, or add to a metric that is never reset (published: accumulated)")
    add_state_flag(g)
    g.add_argument("--features", default="retina", help="feature space of the KID (retina, or a VAE folder)")
    g.add_argument("--log-every", type=integer(1), default=100, metavar="STEPS", help="steps between log lines")
    g.add_argument("--ckpt-every", type=integer(1), default=1000, metavar="STEPS",
                   help="steps between writes of last_ckpt.pt")
    g.add_argument("--num-workers", type=integer(1), default=4, help="threads that read validation images")
    g.add_argument("--cache", action="store_true", help="accepted as published; latents are always in memory")
    return p


if __name__ == "__main__":
    run(main, stop)
