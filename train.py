r"""Train a denoiser on the latent cache of one fold.

    python train.py --preset small-geca-xs --data-path data/oct --feature-path store/oct --fold 0
    accelerate launch --multi_gpu --num_processes 4 --mixed_precision fp16 train.py --model GeCA-S ...

Writes RESULTS/{index:03d}-{model}-{fold}/: log.txt, metrics.jsonl, TensorBoard events, samples/ (a grid per
validation), checkpoints/last_ckpt.pt and best_ckpt.pt (lowest validation KID). The same command continues a
stopped run. Validation samples as the final sampling does: EMA weights, the labels of the fold's validation
images, guidance; the KID is computed afresh each time.
"""

import math
import os
import sys
import time
from argparse import BooleanOptionalAction
from dataclasses import fields
from pathlib import Path

import torch
from accelerate import Accelerator

from automaton.rule import POSITION_CODES
from core import claims, runs, trackers
from core.cli import Parser, integer, number, run
from core.errors import UserError
from core.files import refused
from core.runtime import Interruption, by_first, start, stop
from core.text import aligned
from dataset import latents, leaks, outside
from dataset.root import fingerprint, read_split
from dataset.vae import cells_per_side, open_codec, same_latents
from diffusion.samplers import SAMPLERS
from evaluation.features import NAMES, open_features
from generation import checkpoint as checkpoints
from generation.cost import cost
from generation.loop import Loop, LoopOptions, time_for_validation
from generation.optimiser import OPTIMISERS
from generation.sampling import SamplingOptions
from generation.training import SCHEDULES, Training, TrainingOptions, model_args, weights_to_start_from
from generation.validation import Validation, ValidationOptions
from models import MODELS
from presets import PAPER_SPACE, PAPER_TRAINING, VALIDATION_SAMPLING, presets_of
from sample_ddp import add_heredity_flags

VALIDATION = ("validate_every", "val_samples", "num_sampling_steps", "sampler", "cfg_scale", "heredity", "shared_fire",
              "validation_weights", "both_weights", "validation_labels", "validation_kid", "features")
LOGS = ("log_every", "ckpt_every", "tracker", "num_workers", "cache", "results_dir", "checkpoint_steps",
        "compile")
# Of these a continued run may have others; `unguided_state` is what older runs call their heredity.
NOT_SETTINGS = (*VALIDATION, *LOGS, "epochs", "max_minutes", "as_released", "resume", "dry_run", "unguided_state")
# What --resume may change beside them.
RESUMABLE = ("data_path", "feature_path", "epochs", "max_minutes", "lr", "lr_schedule", "warmup", "adam_betas",
             "clip_norm", "grad_norm", "min_snr", "train_heredity", "ema_decay", "ema_warmup", "frozen_latents")
HISTORY = (*VALIDATION, *RESUMABLE)  # what is noted where a run goes on with another value
KEPT_BEST = ("validate_every", "both_weights")  # of validation: best_ckpt.pt stays the best
RELEASED = {"frozen_latents": True, "ema_warmup": False, "validation_weights": "model", "both_weights": False,
            "validation_labels": "null", "validation_kid": "accumulated", "val_samples": 24,
            "num_sampling_steps": 1000, "sampler": "ddpm", "cfg_scale": 1.0, "heredity": "whole"}  # --as-released


def main():
    started, flags = time.monotonic(), parser()
    args = flags.parse_args()
    if args.dry_run and os.environ.get("RANK", "0") == "0":
        print(flags.shown(args))
    trackers.check(args.tracker)
    args.validate_every = args.validate_every or args.epochs
    training_split, validation_split = read_splits(args)
    cache = latents.load(args.feature_path, args.fold)
    latents.remember(cache.manifest, training_split)
    start()
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    codec = open_codec(args.vae, args.image_space, accelerator.device)
    cells = check(args, accelerator, cache, codec, training_split)
    label_names = list(training_split.label_names)
    args.num_classes, args.in_channels = len(label_names), codec.channels
    settings = settings_of(args, codec, training_split, validation_split)
    weights, seen, remarks = None, [], []
    if args.load_from and not args.resume:
        weights, seen, remarks = start_from(args, cache, label_names, codec, validation_split)
    training = Training(args.model, cache, label_names, training_options(args), accelerator, weights)
    features = open_features(args.features, accelerator.device)
    validation = Validation(validation_split, training_split, features, codec, args.image_size, cells,
                            validation_options(args), accelerator, args.num_workers)
    if args.dry_run:
        found = by_first(accelerator, lambda: run_of(args, settings))
        estimate(loop_options(args), training, validation, accelerator, found)
        return
    reserve = time_for_validation(loop_options(args), validation, training.ema, started)
    folder, exists, note = by_first(accelerator, lambda: claim_run(args, settings))
    if exists and last_checkpoint(folder).is_file():
        checkpoint = checkpoints.load(last_checkpoint(folder), flag="last checkpoint")
        with refused(last_checkpoint(folder), f"remove it to train anew in {folder}"):
            training.restore(checkpoint)
        seen = checkpoint.seen if args.resume else seen
        remarks += go_on(args, training, checkpoint, features)
    log = runs.RunLog(folder, accelerator.is_main_process, training.step, args.tracker, plain(args))
    for line in [*introduction(args, training, accelerator, folder, exists), *filter(None, [note]), *remarks,
                 *warnings(cache, training_split, validation_split)]:
        log.text(line)
    about = {"args": plain(args), "label_names": label_names, "codec": codec.identity, "run": folder.name,
             "training_images": settings["training_images"], "features": features.identity,
             "seen": None if seen is None else sorted({*seen, *leaks.identities(training_split)})}
    with Interruption() as interruption:
        stopped = Loop(loop_options(args), training, validation, log, about, interruption, started, reserve).run()
    log.close()
    if stopped:
        stop()
        sys.exit(interruption.exit_code)


def plain(args):
    """The flags as a checkpoint holds them."""
    return {k: v if v is None or isinstance(v, (int, float, str, bool)) else str(v) for k, v in vars(args).items()}


def last_checkpoint(folder):
    return Path(folder) / "checkpoints" / "last_ckpt.pt"


def remembered(folder):
    """--resume: the flags of a run, dest -> value. Raises UserError where the folder is none that can be continued."""
    stored = claims.read_settings(folder, "give another run")
    if stored is None or not last_checkpoint(folder).is_file():
        raise UserError(f"--resume {folder}: expected a run folder of train.py with settings.json and checkpoints/"
                        "last_ckpt.pt; a run without a checkpoint is started again by its own command")
    return checkpoints.load(last_checkpoint(folder), flag="--resume").args | stored


def run_of(args, settings, find=runs.find):
    """The run folder of these flags: what `core.runs.find` or `claim` returns, or RUN of --resume.

    Raises UserError for what --resume cannot change.
    """
    defaults = {name: value for name, value in parser().defaults().items() if name not in NOT_SETTINGS}
    if not args.resume:
        name = f"{args.model.replace('/', '-')}-{args.fold}"
        return find(args.results_dir, name, settings, defaults, NOT_SETTINGS)
    different = claims.differences(claims.read_settings(args.resume), settings, defaults)
    fixed = {name: values for name, values in different.items() if name not in (*RESUMABLE, *NOT_SETTINGS)}
    if fixed:
        raise UserError(f"--resume {args.resume}: cannot change {claims.described(fixed)}; leave it as it is, or start "
                        "a new run (--load-from takes the weights of this one)")
    return args.resume, True, None


def claim_run(args, settings):
    """The same; the folder is no other job's from now on and belongs to these settings."""
    found = run_of(args, settings, runs.claim)
    runs.hold(found[0])
    if args.resume:
        claims.write_settings(args.resume, settings)
    return found


def go_on(args, training, checkpoint, features):
    """Note in the history of a run what changes where it goes on -> lines for the log."""
    now, before = plain(args), checkpoint.args
    changed = {name: (before[name], now[name]) for name in HISTORY if name in before and before[name] != now[name]}
    if checkpoint.features != features.identity or set(changed) & {*VALIDATION} - {*KEPT_BEST}:
        training.best_kid, training.validated = math.inf, []
        yield "validation is not what it was: the best KID starts anew"
    if changed:
        training.history.append({"step": training.step, "changed": {k: list(v) for k, v in changed.items()}})
        yield f"from step {training.step} on: {claims.described(changed)}"


def estimate(options, training, validation, accelerator, found):
    """--dry-run: what the settings come to, and what they cost, from a few timed steps; nothing is written."""
    folder, exists, note = found
    rows = [("run", f"{folder} ({'continued' if exists else 'new'})"), *cost(options, training, validation)]
    if accelerator.is_main_process:
        print("", aligned(rows, left=2), *filter(None, [note]), sep="\n")


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
    if args.position_code != "published" and not MODELS[args.model].any_grid:
        raise UserError(f"--position-code {args.position_code}: {args.model} has a code of its own; leave the flag out "
                        "or take a GeCA")
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


def start_from(args, cache, label_names, codec, validation_split):
    """--load-from: the weights to start from, identities of the images they have seen, remarks for the log."""
    checkpoint = checkpoints.load(args.load_from, flag="--load-from")
    flag, remarks = f"--load-from {args.load_from}", []
    if checkpoint.codec is None:  # the published layout names its autoencoder but cannot prove it
        remarks.append(f"{flag}: does not say whose latents it was trained on; --vae must be right")
    elif not same_latents(checkpoint.codec, codec.identity):
        raise UserError(f"{flag}: was trained on latents of {checkpoint.codec}, but --vae is {codec.identity}; give "
                        "that VAE")
    weights, others = weights_to_start_from(checkpoint, model_args(args.model, cache, label_names, args.position_code),
                                             label_names, flag)
    if others:
        remarks.append(f"{flag}: its labels are {' '.join(checkpoint.label_names or ['others'])}; the label table "
                       "starts anew")
    if checkpoint.seen is None:
        remarks.append(f"warning: {flag}: does not say which images it has seen; if validation or test images were "
                       "among them, scores will flatter")
    elif count := leaks.seen(checkpoint.seen, validation_split):
        remarks.append(f"warning: {flag}: was trained on {count} of the {len(validation_split)} validation images: "
                       "scores will flatter")
    return weights, checkpoint.seen, remarks


def training_options(args):
    """The flags as TrainingOptions."""
    return TrainingOptions(**{f.name: vars(args)[f.name] for f in fields(TrainingOptions) if f.name in args},
                           batch=args.global_batch_size, seed=args.global_seed)


def loop_options(args):
    """The flags as LoopOptions."""
    return LoopOptions(**{f.name: vars(args)[f.name] for f in fields(LoopOptions)})


def validation_options(args):
    """Validation samples as the final sampling will, unless its flags say otherwise."""
    sampling = SamplingOptions(steps=args.num_sampling_steps, sampler=args.sampler, cfg_scale=args.cfg_scale,
                               heredity=args.heredity, shared_fire=args.shared_fire, multi_scale=args.multi_scale,
                               seed=args.global_seed)
    return ValidationOptions(sampling, args.val_samples, args.validation_labels, args.validation_kid)


def introduction(args, training, accelerator, folder, exists):
    """What a run says of itself at its start."""
    yield (f"run {folder}: {args.model}, {training.parameters:,} parameters, {len(training.cache)} images, "
           f"{training.steps_per_epoch} steps of {training.batch} per epoch, {accelerator.num_processes} process(es) "
           f"on {accelerator.device}, mixed precision {accelerator.mixed_precision}")
    if exists:
        yield f"continuing from step {training.step}" if training.step else "no checkpoint yet: starting again"


def warnings(cache, training_split, validation_split):
    """What a reader of the scores should doubt."""
    if not cache.manifest:
        yield f"{cache.path}: does not say which VAE made it; --vae must be right"
    for line in leaks.shared(training_split, validation_split):
        yield f"warning: LEAK: {line}: scores will flatter"
    for line in leaks.unknown_patients(training_split):
        yield f"warning: {line}"


def parser():
    p = Parser(__doc__, RELEASED, presets=presets_of("train"), own_dry_run=True, memory=("resume", remembered))
    p.add_argument("--model", choices=MODELS, default="GeCA-S", help="which denoiser")
    p.add_argument("--data-path", type=Path, required=True, metavar="ROOT", help="data root (labels, validation)")
    outside.add_flag(p)
    p.add_argument("--feature-path", type=Path, required=True, metavar="DIR", help="latent cache")
    p.add_argument("--results-dir", default="results", metavar="DIR", help="where the run folder goes")
    p.add_argument("--load-from", metavar="FILE", help="start from the averaged weights of this checkpoint")
    p.add_argument("--resume", type=Path, metavar="RUN", help="continue this run folder; flags that are not given are "
                   "its own, those of optimisation, validation and logs may be others and are noted in its history")
    p.add_argument("--dry-run", action="store_true", help="show what every flag comes to, parameters, memory and time "
                   "from a few timed steps, and write nothing")
    g = p.add_argument_group("data and space")
    g.add_argument("--fold", type=integer(0), default=0, help="train on train_{fold}, validate on val_{fold}")
    g.add_argument("--num-classes", type=integer(1), help="labels expected in the CSV (default: what it has)")
    g.add_argument("--image-size", type=integer(8, 2048), help="side of the square crop, in pixels")
    g.add_argument("--vae", help="ema, mse (stabilityai/sd-vae-ft-*), retina or retina-2 (bundled) or a folder")
    g.add_argument("--image-space", action="store_true", help="diffuse pixels, without a VAE")
    g.add_argument("--in-channels", type=integer(1), help="latent channels (default: the VAE's)")
    g.add_argument("--multi-scale", action="store_true", help="noisy steps on coarser grids (needs a multiple of 4)")
    g.add_argument("--position-code", choices=POSITION_CODES, default="published", help="what a cell of GeCA is told "
                   "of its place: its number in reading order, as published, or row and column")
    g = p.add_argument_group("optimisation")
    g.add_argument("--epochs", type=integer(1), help="epochs: each shows every training image once")
    g.add_argument("--max-minutes", type=number(0), default=0, help="stop after so many minutes, the last "
                   "validation and the time before a resumption included; 0 is never")
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
    g.add_argument("--compile", action=BooleanOptionalAction, default=False, help="compile parts of the denoiser first "
                   "(torch.compile, half a minute; of a GeCA only the attention, on a CPU)")
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
                   help="averaged or raw weights decide what is best (published: raw)")
    g.add_argument("--both-weights", action=BooleanOptionalAction, default=True,
                   help="score the others too, for the log (published: no)")
    g.add_argument("--validation-labels", choices=("own", "null"), default="own",
                   help="labels of the validation images, or none at all (published: null)")
    g.add_argument("--validation-kid", choices=("fresh", "accumulated"), default="fresh", help="score against all "
                   "validation images, or add to a metric that is never reset (published: accumulated)")
    add_heredity_flags(g)
    g.add_argument("--features", default="retina", help=f"feature space of the KID: {NAMES}")
    g.add_argument("--tracker", choices=trackers.TRACKERS, default="tensorboard",
                   help="where curves and sample grids are shown, beside RUN/metrics.jsonl (wandb: pip install wandb)")
    g.add_argument("--log-every", type=integer(1), default=100, metavar="STEPS", help="steps between log lines")
    g.add_argument("--ckpt-every", type=integer(1), default=1000, metavar="STEPS",
                   help="steps between writes of last_ckpt.pt")
    g.add_argument("--num-workers", type=integer(1), default=4, help="threads that read validation images")
    g.add_argument("--cache", action="store_true", help="accepted as published; latents are mapped into memory anyway")
    p.set_defaults(**PAPER_SPACE, **PAPER_TRAINING, **VALIDATION_SAMPLING)
    return p


if __name__ == "__main__":
    run(main, stop)
