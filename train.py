r"""Train a denoiser on the latent cache of one fold.

    python train.py --preset small-geca-xs --data-path data/oct --feature-path store/oct --fold 0
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
from dataclasses import fields
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from core import runs
from core.cli import Parser, integer, number, run
from core.errors import UserError
from core.files import make_folder
from core.runtime import AGREE_EVERY, Interruption, start, stop
from dataset import latents
from dataset.root import fingerprint, read_split
from dataset.vae import cells_per_side, open_codec, same_weights
from diffusion.samplers import SAMPLERS
from evaluation.features import open_features
from generation import checkpoint as checkpoints
from generation.guidance import RENAMED
from generation.optimiser import OPTIMISERS
from generation.sampling import SamplingOptions
from generation.training import SCHEDULES, Training, TrainingOptions, model_args, weights_to_start_from
from generation.validation import Validation, ValidationOptions
from models import MODELS
from presets import PAPER_SAMPLING, PAPER_SPACE, PAPER_TRAINING, presets_of
from sample_ddp import add_heredity_flags

NOT_SETTINGS = ("epochs", "max_minutes", "validate_every", "log_every", "ckpt_every", "num_workers", "cache",
                "results_dir", "as_released", "checkpoint_steps")  # of these, a continued run may have others
SAVE_MINUTES = 5  # last_ckpt.pt is written at least so often
RELEASED = {"frozen_latents": True, "ema_warmup": False, "validation_weights": "model", "validation_labels": "null",
            "validation_kid": "accumulated", "val_samples": 24, "num_sampling_steps": 1000, "cfg_scale": 1.0,
            "heredity": "whole"}  # --as-released


def main():
    args = parser().parse_args()
    args.validate_every = args.validate_every or args.epochs
    training_split, validation_split = read_splits(args)
    cache = latents.load(args.feature_path, args.fold)
    start()
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    codec = open_codec(args.vae, args.image_space, accelerator.device)
    cells = check(args, accelerator, cache, codec, training_split)
    label_names = list(training_split.label_names)
    args.num_classes, args.in_channels = len(label_names), codec.channels
    settings = settings_of(args, codec, training_split, validation_split)
    folder, exists, note = runs.find_or_number(args.results_dir, f"{args.model.replace('/', '-')}-{args.fold}",
                                               settings, parser().defaults(), RENAMED)
    remarks, weights = [note] if note else [], None
    if args.load_from:
        weights, more = start_from(args, cache, label_names, codec)
        remarks += more
    training = Training(args.model, cache, label_names, training_options(args), accelerator, weights)
    make_folder(args.results_dir, "--results-dir")  # if it cannot be, better now than later
    features = open_features(args.features, accelerator.device)
    validation = Validation(validation_split, features, codec, args.image_size, cells, validation_options(args),
                            accelerator, args.num_workers)
    last = folder / "checkpoints" / "last_ckpt.pt"
    if exists and last.is_file():
        checkpoint = checkpoints.load(last, flag="last checkpoint")
        training.restore(checkpoint)
        if checkpoint.features != features.identity:  # the best KID was measured in another feature space
            training.best_kid, training.validated = math.inf, []
    accelerator.wait_for_everyone()  # every process has looked for the run before the first one makes it

    log = runs.RunLog(folder, settings, accelerator.is_main_process, training.step)
    for line in [*introduction(args, training, accelerator, folder, exists), *remarks,
                 *warnings(cache, training_split, validation_split)]:
        log.text(line)
    about = {"args": {k: v if v is None or isinstance(v, (int, float, str, bool)) else str(v)
                      for k, v in vars(args).items()},
             "label_names": label_names, "codec": codec.identity, "run": folder.name,
             "training_images": settings["training_images"], "features": features.identity}
    with Interruption() as interruption:
        stopped = Loop(args, training, validation, log, about, interruption).run()
    log.close()
    if stopped:
        stop()
        sys.exit(130)


class Loop:
    """Training from where it stands to its end: the steps, and what happens between them."""

    def __init__(self, args, training, validation, log, about, interruption):
        self.args, self.training, self.validation, self.log = args, training, validation, log
        self.about, self.interruption, self.accelerator = about, interruption, training.accelerator
        self.started = time.time() - 60 * training.minutes
        self.window, self.steps, self.saved = time.time(), 0, time.time()  # since the last log line; the last save
        self.timed_out = self.stopped = self.save_is_due = False

    def run(self):
        """Train until --epochs, --max-minutes or an interruption -> True if it was interrupted."""
        args, training = self.args, self.training
        self.timed_out = 0 < args.max_minutes <= training.minutes
        # With a time limit the number of steps to come is unknown, and so is the time they take.
        bar = tqdm(initial=training.step, total=None if args.max_minutes else training.total_steps, unit="step",
                   mininterval=5, disable=not self.log.active)
        while training.step < training.total_steps and not self.timed_out and not self.stopped:
            logged = (training.step + 1) % args.log_every == 0
            training.train_step(measure=logged)  # draw, loss, gradient, update, averages
            self.steps += 1
            bar.update()
            if training.step % AGREE_EVERY == 0:
                self.agree()
            last = training.step == training.total_steps or self.timed_out
            if logged or last:
                self.write_log()
            end_of_epoch = training.step % training.steps_per_epoch == 0
            if last or (end_of_epoch and training.epoch % args.validate_every == 0):
                self.validate()
            if last or self.stopped or self.save_is_due or training.step % args.ckpt_every == 0:
                self.save("last_ckpt.pt")
        bar.close()
        if self.stopped:
            self.log.text(f"stopped at step {training.step}; the same command continues")
            return True
        reason = f"after --max-minutes {args.max_minutes}" if self.timed_out else "complete"
        self.log.text(f"{reason}: epoch {training.epoch}, step {training.step}, best KID "
                      f"{1e3 * training.best_kid:.2f}e-3")
        return False

    def agree(self):
        """What holds on one process holds on all: time is up, somebody asked to stop, a checkpoint is due."""
        now, limit = time.time(), self.args.max_minutes
        share = (now - self.started) / 60 / limit if limit else 0.0
        mine = torch.tensor([self.interruption.asked, now - self.saved > 60 * SAVE_MINUTES, share > 1, share],
                            dtype=torch.float64, device=self.accelerator.device)
        stopped, due, timed_out, shares = self.accelerator.reduce(mine, "sum").tolist()
        self.stopped, self.save_is_due, self.timed_out = stopped > 0, due > 0, timed_out > 0
        self.training.time_share = shares / self.accelerator.num_processes

    def write_log(self):
        """Means since the last log line, to the screen, log.txt, metrics.jsonl and TensorBoard."""
        training = self.training
        means = training.statistics.means(self.accelerator)
        if not math.isfinite(means["loss"]):
            raise UserError(f"the loss is {means['loss']} at step {training.step}; lower --lr or use bf16 for fp16")
        speed = self.steps / (time.time() - self.window)
        self.log.text(f"epoch {training.epoch}, step {training.step}: loss {means['loss']:.4f}, {speed:.2f} steps/s, "
                      f"{speed * training.batch:.1f} images/s")
        if training.gradient_norm is not None:
            means["gradient_norm"] = float(training.gradient_norm)
        self.log.metrics(training.step, **means, lr=training.optimiser.param_groups[0]["lr"], steps_per_second=speed,
                         images_per_second=speed * training.batch)
        training.restart_statistics()
        self.steps, self.window = 0, time.time()

    def validate(self):
        """Sample, score; keep the checkpoint if it is the best so far."""
        paused, training, args = time.time(), self.training, self.args
        net = training.ema
        if args.validation_weights == "model":  # in a copy: the net itself would compute in --mixed_precision
            net = copy.deepcopy(net)
            net.load_state_dict(training.bare_net.state_dict())
        picture = self.log.folder / "samples" / f"epoch-{training.epoch:05d}.png"
        score = self.validation(net, picture, training.validated)
        weights = "averaged" if args.validation_weights == "ema" else "raw"
        self.log.text(f"epoch {training.epoch}, step {training.step}: validation KID[{self.validation.features.name}] "
                      f"{1e3 * score:.2f}e-3 ({len(self.validation.chosen)} images, {args.num_sampling_steps} steps, "
                      f"{weights} weights)")
        self.log.metrics(training.step, kid=score)
        if score < training.best_kid:
            training.best_kid = score
            self.save("best_ckpt.pt")
        self.window += time.time() - paused  # the speed is that of training

    def save(self, name):
        """Write a checkpoint; the first process does, the others wait."""
        self.saved, self.save_is_due = time.time(), False
        self.training.minutes = (self.saved - self.started) / 60
        if self.accelerator.is_main_process:
            checkpoints.save(self.log.folder / "checkpoints" / name, self.training.state() | self.about)
        self.accelerator.wait_for_everyone()


def read_splits(args):
    """Training and validation images of the fold. Raises UserError where their labels differ."""
    validation = read_split(args.data_path, f"val_{args.fold}", args.num_classes)
    training = read_split(args.data_path, f"train_{args.fold}", args.num_classes)
    if training.label_names != validation.label_names:
        raise UserError(f"{validation.csv}: labels {' '.join(validation.label_names)}, expected those of "
                        f"{training.csv.name}: {' '.join(training.label_names)}")
    return training, validation


def check(args, accelerator, cache, codec, split):
    """Raise UserError for flags that do not go together, or with the data -> cells per side of the grid."""
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("--mixed_precision fp16 needs a GPU (there is no loss scaling on a CPU); give bf16 or no")
    cells = cells_per_side(args.image_size, codec)
    latents.check(cache, latents.manifest_of(split, codec, args.image_size), split.labels, codec, cells)
    if args.in_channels is not None and args.in_channels != codec.channels:
        raise UserError(f"--in-channels {args.in_channels}: the VAE has {codec.channels}; leave the flag out")
    if args.multi_scale and not MODELS[args.model].any_grid:
        raise UserError(f"--multi-scale: {args.model} works on one grid only; leave the flag out or take a GeCA")
    if args.multi_scale and cache.mean.shape[-1] % 4:
        raise UserError(f"--multi-scale: found {cache.mean.shape[-1]} cells per side, expected a multiple of 4")
    if min(args.global_batch_size, len(cache)) < accelerator.num_processes:
        raise UserError(f"--global-batch-size {args.global_batch_size}: {len(cache)} images, expected at least one "
                        f"for each of the {accelerator.num_processes} processes")
    if args.ema_decay in args.more_ema_decays:
        raise UserError(f"--more-ema-decays {args.ema_decay}: is --ema-decay already; leave it out")
    return cells


def settings_of(args, codec, training_split, validation_split):
    """What tells this run from others: its flags, the data and the VAE."""
    settings = {key: str(value) if isinstance(value, Path) else value
                for key, value in sorted(vars(args).items()) if key not in NOT_SETTINGS}
    if args.lr_schedule != "constant":  # the learning rate then depends on where the training ends
        settings |= {"epochs": args.epochs, "max_minutes": args.max_minutes}
    return settings | {"codec": codec.identity, "training_images": fingerprint(training_split),
                       "validation_images": fingerprint(validation_split)}


def start_from(args, cache, label_names, codec):
    """--load-from: the weights to start from, and remarks for the log."""
    checkpoint = checkpoints.load(args.load_from, flag="--load-from")
    flag, remarks = f"--load-from {args.load_from}", []
    if checkpoint.codec is None:  # the published layout names its autoencoder but cannot prove it
        remarks.append(f"{flag}: does not say whose latents it was trained on; --vae must be right")
    elif not same_weights(checkpoint.codec, codec.identity):
        raise UserError(f"{flag}: was trained on latents of {checkpoint.codec}, but --vae is {codec.identity}; give "
                        "that VAE")
    weights, others = weights_to_start_from(checkpoint, model_args(args.model, cache, label_names), label_names, flag)
    if others:
        remarks.append(f"{flag}: its labels are {' '.join(checkpoint.label_names or ['others'])}; the label table "
                       "starts anew")
    return weights, remarks


def training_options(args):
    """The flags as TrainingOptions."""
    return TrainingOptions(**{f.name: vars(args)[f.name] for f in fields(TrainingOptions) if f.name in args},
                           batch=args.global_batch_size, seed=args.global_seed)


def validation_options(args):
    """Validation samples as the final sampling will, unless its flags say otherwise."""
    sampling = SamplingOptions(steps=args.num_sampling_steps, sampler=args.sampler, cfg_scale=args.cfg_scale,
                               heredity=args.heredity, shared_fire=args.shared_fire, multi_scale=args.multi_scale,
                               seed=args.global_seed)
    return ValidationOptions(sampling, args.val_samples, args.validation_labels, args.validation_kid)


def introduction(args, training, accelerator, folder, exists):
    """What a run says of itself at its start."""
    parameters = sum(p.numel() for p in training.ema.parameters())
    yield (f"run {folder}: {args.model}, {parameters:,} parameters, {len(training.cache)} images, "
           f"{training.steps_per_epoch} steps of {training.batch} per epoch, {accelerator.num_processes} process(es) "
           f"on {accelerator.device}, mixed precision {accelerator.mixed_precision}")
    if exists:
        yield f"continuing from step {training.step}" if training.step else "no checkpoint yet: starting again"


def warnings(cache, training_split, validation_split):
    """What a reader of the scores should doubt."""
    if not cache.manifest:
        yield f"{cache.path}: does not say which VAE made it; --vae must be right"
    shared = {*training_split.patients} & {*validation_split.patients}
    if shared:
        yield f"warning: {len(shared)} patient(s) train and validate, {min(shared)} the first: scores will flatter"


def parser():
    p = Parser(__doc__, RELEASED, presets=presets_of("train"))
    p.add_argument("--model", choices=MODELS, default="GeCA-S", help="which denoiser")
    p.add_argument("--data-path", type=Path, required=True, metavar="ROOT", help="data root (labels, validation)")
    p.add_argument("--feature-path", type=Path, required=True, metavar="DIR", help="latent cache")
    p.add_argument("--results-dir", default="results", metavar="DIR", help="where the run folder goes")
    p.add_argument("--load-from", metavar="FILE", help="start from the averaged weights of this checkpoint")
    g = p.add_argument_group("data and space")
    g.add_argument("--fold", type=integer(0), default=0, help="train on train_{fold}, validate on val_{fold}")
    g.add_argument("--num-classes", type=integer(1), help="labels expected in the CSV (default: what it has)")
    g.add_argument("--image-size", type=integer(8, 2048), help="side of the square crop, in pixels")
    g.add_argument("--vae", help="ema, mse (stabilityai/sd-vae-ft-*), retina (bundled) or a folder")
    g.add_argument("--image-space", action="store_true", help="diffuse pixels, without a VAE")
    g.add_argument("--in-channels", type=integer(1), help="latent channels (default: the VAE's)")
    g.add_argument("--multi-scale", action="store_true", help="noisy steps on coarser grids (needs a multiple of 4)")
    g = p.add_argument_group("optimisation")
    g.add_argument("--epochs", type=integer(1), help="epochs: each shows every training image once")
    g.add_argument("--max-minutes", type=number(0), default=0, help="stop after so many minutes of "
                   "training, those before a resumption included; 0 is never")
    g.add_argument("--global-batch-size", type=integer(1), help="images per step over all processes")
    g.add_argument("--optimizer", choices=OPTIMISERS, help="AdamW, or Muon for the weight matrices inside")
    g.add_argument("--lr", type=number(0), help="largest learning rate")
    g.add_argument("--lr-schedule", choices=SCHEDULES, help="constant, or falling to 0 at the end "
                   "of --epochs or --max-minutes")
    g.add_argument("--warmup", type=integer(0), metavar="STEPS", help="steps over which it grows from 0")
    g.add_argument("--adam-betas", type=number(0, 0.99999), nargs=2, metavar=("B1", "B2"),
                   help="decay of AdamW's two moments")
    g.add_argument("--clip-norm", type=number(0), help="largest norm of the gradient; 0: as it is")
    g.add_argument("--grad-norm", action="store_true", help="divide each parameter's gradient by its norm")
    g.add_argument("--min-snr", type=number(0), metavar="GAMMA", help="weigh the squared error by "
                   "min(SNR, GAMMA) / SNR (Hang et al. 2023; 5 there); 0: equally")
    g.add_argument("--train-heredity", type=number(0, 1), metavar="P", help="share of samples that start "
                   "from an inherited state, as in sampling (published: none)")
    g.add_argument("--ema-decay", type=number(0, 1), help="of the averaged weights, after warm-up")
    g.add_argument("--more-ema-decays", type=number(0, 1), nargs="+", default=[], metavar="DECAY",
                   help="keep further averages, to choose from when sampling (--weights ema:DECAY)")
    g.add_argument("--ema-warmup", action=BooleanOptionalAction, default=True,
                   help="let early averages forget the start (published: no)")
    g.add_argument("--checkpoint-steps", action=BooleanOptionalAction, help="save memory: compute each step of the "
                   "automaton, or block of a baseline, again in backward (default: GeCA yes, baselines no)")
    g.add_argument("--frozen-latents", action=BooleanOptionalAction, default=False,
                   help="draw mirror and posterior sample once for each image, not at each step (published: once)")
    g.add_argument("--global-seed", type=integer(0), default=0, help="seed of every draw")
    g = p.add_argument_group("validation and logs")
    g.add_argument("--validate-every", type=integer(1), metavar="EPOCHS", help="epochs between validations "
                   "(default: only at the end)")
    g.add_argument("--val-samples", type=integer(2), default=24, help="images sampled per validation")
    g.add_argument("--num-sampling-steps", type=integer(1, 1000), help="steps of those samples")
    g.add_argument("--sampler", choices=SAMPLERS, help="sampler of those samples")
    g.add_argument("--cfg-scale", type=number(0), help="guidance of those samples; 1 is none")
    g.add_argument("--validation-weights", choices=("ema", "model"), default="ema",
                   help="averaged or raw weights make those samples (published: raw)")
    g.add_argument("--validation-labels", choices=("own", "null"), default="own",
                   help="labels of the validation images, or none at all (published: null)")
    g.add_argument("--validation-kid", choices=("fresh", "accumulated"), default="fresh", help="score against all "
                   "validation images, or add to a metric that is never reset (published: accumulated)")
    add_heredity_flags(g)
    g.add_argument("--features", default="retina", help="feature space of the KID (retina, or a VAE folder)")
    g.add_argument("--log-every", type=integer(1), default=100, metavar="STEPS", help="steps between log lines")
    g.add_argument("--ckpt-every", type=integer(1), default=1000, metavar="STEPS",
                   help="steps between writes of last_ckpt.pt")
    g.add_argument("--num-workers", type=integer(1), default=4, help="threads that read validation images")
    g.add_argument("--cache", action="store_true", help="accepted as published; latents are mapped into memory anyway")
    p.set_defaults(**PAPER_SPACE, **PAPER_TRAINING, **PAPER_SAMPLING)
    return p


if __name__ == "__main__":
    run(main, stop)
