"""Sample images with labels that you name, or with those of the training images of a fold.

    python sample_ddp.py --ckpt RUN --labels PDR,DME --count 16 --labels NODR=0.5 --count 8
    python sample_ddp.py --ckpt RUN --walk NODR PDR,DME --count 8
    python sample_ddp.py --ckpt RUN --data-path store/oct --expand-ratio 5
    python sample_ddp.py --ckpt RUN --data-path data/oct --balance 100
    torchrun --nproc_per_node=4 sample_ddp.py --ckpt RUN/checkpoints/best_ckpt.pt --data-path store/oct --fold 0

`--labels` and `--walk` (from one label set to another, everything random the same) need no data. `--data-path` is a
latent cache (as published) or a data root, whose training labels are repeated --expand-ratio times, or, with --balance,
topped up: only what rare labels lack. Writes SAMPLE_DIR/{name}/ with gen_samples/%06d.png, train_syn_{fold}.csv,
train_syn_{fold}.npy, and a picture of some of the images, grid.png; with `--labels` asked/, asked.csv, asked.npy, with
`--walk` walk/, walk.csv, walk.npy. Stopped, the same command continues: images that are there are kept.
"""

import argparse
import re
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from core import runtime
from core.cli import Parser, integer, number, run
from core.errors import UserError
from core.runs import checkpoint_file
from core.runtime import Interruption, by_first
from core.text import aligned
from dataset import latents, outside
from dataset.root import read_split
from diffusion.samplers import SAMPLERS
from generation import labels as asking
from generation import output
from generation.guidance import parse_heredity
from generation.sampling import SamplingOptions
from generation.trained import KNOWN, names_of, open_trained, options_for, read
from presets import PAPER_SAMPLING, presets_of

RELEASED = {"heredity": "whole"}  # --as-released
COUNT = 16  # images of each --labels, and of --walk


class Request(NamedTuple):
    """What a sample folder shall hold."""

    labels: np.ndarray  # (n, K)
    label_names: list
    images: str  # the folder of the images in the sample folder
    csv: str  # the name of their table
    name: str = ""  # how the name of the sample folder ends
    draws: list | None = None  # the number of the image whose draws each is made with; None: its own
    remark: str = ""  # printed before


def main():
    args = parse_args()
    sample(args, asked if args.labels else walked if args.walk else balanced if args.balance else expanded)


def parse_args():
    p = parser(__doc__, "latent cache or data root with the labels of the fold", "expand")
    add_label_flags(p, " and of --walk")
    p.add_argument("--walk", nargs=2, metavar="NAMES", help="ask for --count images on the way from these labels to "
                   "those, with one seed")
    p.add_argument("--balance", type=integer(1), metavar="N", help="ask for what the labels that fewer than N training "
                   "images of --data-path have lack to N, in the combinations in which they occur")
    args = p.parse_args()
    sources = [f"--{name}" for name in ("labels", "walk", "data-path") if getattr(args, name.replace("-", "_"))]
    if len(sources) != 1:
        raise UserError(f"found {' and '.join(sources) or 'nothing to ask for'}, expected either --data-path (its "
                        "labels) or --labels or --walk (yours)")
    if args.balance and sources != ["--data-path"]:
        raise UserError(f"--balance {args.balance}: needs the training labels of a --data-path, found {sources[0]}")
    if args.balance and args.expand_ratio > 1:
        raise UserError(f"--expand-ratio {args.expand_ratio}: not with --balance, which says itself how many images; "
                        "give --expand-ratio 1")
    return args


def add_label_flags(p, more=""):
    """Labels that are asked for by name; `asked_labels` reads them."""
    p.add_argument("--labels", action="append", metavar="NAMES", help="ask for images with these labels, joined by "
                   "commas, NAME=0.5 for a soft one, or null for none; may be repeated")
    p.add_argument("--count", type=integer(1), nargs="+", action="extend", metavar="N",
                   help=f"images of each --labels{more}: one number, or one for each (default: {COUNT})")


def asked_labels(args, label_names):
    """--labels and --count -> labels (n, K)."""
    counts = args.count or [COUNT]
    counts = counts * len(args.labels) if len(counts) == 1 else counts
    if len(counts) != len(args.labels):
        raise UserError(f"--count: found {len(counts)} numbers for {len(args.labels)} --labels, expected one or as "
                        "many")
    rows = [asking.values_of(names, label_names, f"--labels {names}") for names in args.labels]
    return np.repeat(rows, counts, axis=0)


def asked(args, checkpoint):
    """The Request for images with --labels."""
    names = names_of(checkpoint)
    return Request(asked_labels(args, names), names, "asked", "asked", "labels-" + "_".join(map(slug, args.labels)))


def walked(args, checkpoint):
    """The Request for images on the way of --walk."""
    names, (count, *more) = names_of(checkpoint), args.count or [COUNT]
    if more or count < 2:
        raise UserError(f"--count {' '.join(map(str, args.count))}: expected one number of at least 2, the images of "
                        "--walk with both its ends")
    ends = [asking.values_of(end, names, f"--walk {end}") for end in args.walk]
    name = "-".join(["walk", *map(slug, args.walk), str(count)])
    return Request(asking.between(*ends, count), names, "walk", "walk", name, draws=[0] * count)


def slug(names):
    """Label names as a part of a folder name."""
    return re.sub(r"[^\w.=]+", "+", names.strip())[:60]


def expanded(args, checkpoint):
    """The Request for images with the labels of the training images, times --expand-ratio."""
    labels, names = training_labels(args, checkpoint)
    return Request(np.tile(labels, (args.expand_ratio, 1)), names, "gen_samples", f"train_syn_{args.fold}")


def balanced(args, checkpoint):
    """The Request for what rare labels of the training images lack to --balance."""
    labels, names = training_labels(args, checkpoint)
    added = asking.top_up(labels, args.balance)
    before, more = labels.sum(0).astype(int), added.sum(0).astype(int)
    if not len(added):
        rarest = min((count, name) for count, name in zip(before, names, strict=True) if count)
        raise UserError(f"--balance {args.balance}: every label that occurs has as many training images ({rarest[1]} "
                        f"the fewest, {rarest[0]}); give a larger number")
    rows = [(name, *counts) for name, *counts in zip(names, before, more, before + more, strict=True)]
    remark = aligned([("label", "training images", "to be sampled", "together"), *rows])
    if never := [name for name, count in zip(names, before, strict=True) if not count]:
        remark += f"\n{' '.join(never)}: no training image has it, so that there is nothing to top up"
    return Request(added, names, "gen_samples", f"train_syn_{args.fold}", f"balance-{args.balance}", remark=remark)


def training_labels(args, checkpoint):
    """Labels (n, K) of the training images and their names; those of the checkpoint where the data has none."""
    if (args.data_path / f"train_{args.fold}.csv").is_file():
        split = read_split(args.data_path, f"train_{args.fold}")
        return split.labels, split.label_names
    cache = latents.load(args.data_path, args.fold)
    names = cache.manifest.get("label_names") or names_of(checkpoint)  # the published layouts name none
    if len(names) != cache.labels.shape[1]:
        names = [f"label_{k}" for k in range(cache.labels.shape[1])]
    return cache.labels.numpy(), names


def sample(args, request_of):
    """Sample one image per row of labels into the sample folder, and describe them in a CSV.

    `request_of(args, checkpoint)` -> Request. A --fold that was not given is that of the checkpoint.
    """
    checkpoint, assumed = read_checkpoint(args)
    options = options_of(args, checkpoint)
    request = request_of(args, checkpoint)
    checkpoint = check_labels(args, checkpoint, list(request.label_names))
    process = runtime.start(args.precision)
    trained = open_trained(args.ckpt, checkpoint, args.weights, process.device)
    if args.compile:
        trained.net.compile_parts()

    name = output.folder_name(checkpoint, args.ckpt.stem, args.fold, options)
    folder = args.sample_dir / "-".join(filter(None, [name, request.name]))
    settings = output.settings_of(checkpoint, args.weights, trained.net, trained.codec, options)
    settings["about"] = output.about(checkpoint, args.ckpt, folder, args.weights, trained.net, options)
    labels = request.labels if (request.labels % 1).any() else request.labels.astype(int)  # soft ones as they are
    by_first(process, lambda: output.claim(folder, settings, folder / f"{request.csv}.npy", labels, checkpoint.seen))
    if process.is_main_process:
        introduce(args, checkpoint, assumed, request, process.num_processes, options)
    with Interruption() as interruption:
        stopped = output.write_missing(trained.net, trained.codec, torch.as_tensor(request.labels), trained.cells,
                                       folder / request.images, process, options, interruption, request.draws)
    if stopped:
        print(f"stopped after a batch; the same command continues {folder}")
        runtime.stop()
        sys.exit(interruption.exit_code)
    process.wait_for_everyone()
    if process.is_main_process:
        output.describe(folder, request.images, request.csv, labels, request.label_names)
        if args.grid:
            output.show(folder, request.images, labels, request.label_names)
        print(f"{folder}: {len(labels)} images" + ", grid.png" * args.grid)
    process.wait_for_everyone()


def introduce(args, checkpoint, assumed, request, processes, options):
    """What is about to be sampled, for people."""
    if assumed:
        print(f"{args.ckpt} does not say all; taken: " +
              ", ".join(f"{name} {checkpoint.args[name]}" for name in assumed))
    if request.remark:
        print(request.remark)
    print(f"{args.ckpt.name}: {checkpoint.args['model']}, {args.weights} weights of step "
          f"{checkpoint.step or 'unknown'}: {len(request.labels)} images, {options.steps} steps, guidance "
          f"{options.cfg_scale}, heredity {options.heredity}, {processes} process(es)")


def read_checkpoint(args):
    """What `generation.trained.read` returns for --ckpt and the flags; args then name the file and the fold."""
    args.ckpt = checkpoint_file(args.ckpt, "--ckpt")
    checkpoint, assumed = read(args.ckpt, {name: getattr(args, name, None) for name in KNOWN}, args.weights)
    args.fold = checkpoint.args["fold"] or getattr(args, "fold", None) or 0
    return checkpoint, assumed


def check_labels(args, checkpoint, label_names):
    """Refuse other labels than the checkpoint's -> the checkpoint with its labels named."""
    wanted = checkpoint.model_args["num_classes"]
    own = label_names if checkpoint.label_names is None else checkpoint.label_names  # published files name none
    if label_names != own or len(label_names) != wanted:
        raise UserError(f"{args.data_path}: {len(label_names)} labels ({' '.join(label_names)}), but {args.ckpt} was "
                        f"trained on {wanted} ({' '.join(own)})")
    return replace(checkpoint, label_names=own)


def options_of(args, checkpoint):
    """The SamplingOptions that the flags and the checkpoint ask for."""
    names = {f.name for f in fields(SamplingOptions)} & vars(args).keys() - {"multi_scale"}
    return options_for(checkpoint, **{name: getattr(args, name) for name in names} | {
        "steps": args.num_sampling_steps, "seed": args.global_seed, "batch_size": args.per_proc_batch_size,
        "cfg_interval": args.cfg_interval and tuple(args.cfg_interval)})


def add_heredity_flags(p):
    """How the automaton's state is inherited, for the samplers and the validation of train.py alike."""
    p.add_argument("--heredity", type=parse_heredity, metavar="RULE", help="which state of GeCA a denoising step "
                   "starts from: published (hidden channels inherited), none (for a model that has learned little), "
                   "below:T (inherited at steps below T) or whole (all channels, where there is no guidance)")
    p.add_argument("--shared-fire", action="store_true",
                   help="the same cells fire in the conditional and the unconditional copy")


def parser(description, data_help, *sections):
    """The flags that both sampling scripts have; `sections` of presets.py beside the common one."""
    p = Parser(description, RELEASED, presets=presets_of("sample", *sections))
    p.add_argument("--ckpt", type=Path, required=True, metavar="RUN", help="run folder (its best checkpoint, or the "
                   "last where none was validated), or a file: checkpoint, ours or published, or weights")
    p.add_argument("--data-path", type=Path, metavar="DIR", help=data_help)
    outside.add_flag(p)
    p.add_argument("--sample-dir", type=Path, default="samples", metavar="DIR", help="where the sample folder goes")
    p.add_argument("--fold", type=integer(0), help="fold whose labels are asked for (default: the checkpoint's, which "
                   "another must not be)")
    p.add_argument("--expand-ratio", type=integer(1), default=1, help="images per row of labels")
    p.add_argument("--grid", action=argparse.BooleanOptionalAction, default=True,
                   help="write grid.png, a picture of the first images of each combination of labels")
    add_sampling_flags(p)
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False,
                   help="compile the denoiser first (torch.compile: a minute at the start, fewer kernels after)")
    return p


def add_sampling_flags(p):
    """How to sample from a checkpoint; `load_matching` and `options_of` read them. For grow.py too."""
    p.add_argument("--model", help="model name (default: the checkpoint's; another is an error)")
    p.add_argument("--image-size", type=integer(8, 2048), help="pixels (default: the checkpoint's)")
    p.add_argument("--num-classes", type=integer(1), help="number of labels (default: the checkpoint's)")
    p.add_argument("--in-channels", type=integer(1), help="latent channels (default: the checkpoint's)")
    p.add_argument("--image-space", action="store_true", default=None,
                   help="the model diffuses pixels (default: as the checkpoint says)")
    p.add_argument("--vae", help="ema, mse, retina, retina-2 or a folder (default: the checkpoint's)")
    p.add_argument("--multi-scale", action="store_true", default=None,
                   help="the model was trained so (default: as the checkpoint says)")
    p.add_argument("--weights", default="ema", metavar="KIND", help="ema (averaged), model (raw) or ema:DECAY, one of "
                   "the --more-ema-decays of training")
    p.add_argument("--num-sampling-steps", type=integer(1, 1000), help="denoising steps")
    p.add_argument("--sampler", choices=SAMPLERS, help="ancestral, DDIM or DPM-Solver++(2M)")
    p.add_argument("--eta", type=number(0, 1), default=0.0, help="noise of DDIM: none at 0, that of ddpm at 1")
    p.add_argument("--cfg-scale", type=number(0), help="guidance; 1 is none")
    p.add_argument("--cfg-interval", type=integer(0, 999), nargs=2, metavar=("LOW", "HIGH"),
                   help="diffusion steps between which there is guidance (default: all)")
    p.add_argument("--per-proc-batch-size", type=integer(1), default=32, help="images per process and batch")
    add_heredity_flags(p)
    p.add_argument("--global-seed", type=integer(0), default=0, help="seed; image k depends on it and on k")
    p.add_argument("--precision", choices=runtime.PRECISIONS, default="fp32",
                   help="of the denoiser's matrix products; fp16 needs a GPU")
    p.add_argument("--tf32", dest="precision", action="store_const", const="tf32", default=argparse.SUPPRESS,
                   help="published spelling of --precision tf32")
    p.set_defaults(**PAPER_SAMPLING)


if __name__ == "__main__":
    run(main, runtime.stop)
