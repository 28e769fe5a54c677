"""Sample images with the labels of the training images of one fold, times --expand-ratio, or with labels you name.

    python sample_ddp.py --ckpt RUN/checkpoints/best_ckpt.pt --data-path store/oct --fold 0 --expand-ratio 5
    torchrun --nproc_per_node=4 sample_ddp.py --ckpt RUN/checkpoints/best_ckpt.pt --data-path store/oct --fold 0
    python sample_ddp.py --ckpt RUN/checkpoints/best_ckpt.pt --labels PDR,DME --labels NODR --count 16

`--data-path` is a latent cache (as published) or a data root; `--labels` needs none. Writes SAMPLE_DIR/{name}/ with
gen_samples/%06d.png, train_syn_{fold}.csv, train_syn_{fold}.npy and a picture of the first images, grid.png; with
`--labels` asked/, asked.csv, asked.npy. Stopped, the same command continues: images that are there are kept.
"""

import argparse
import re
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch

from core import runtime
from core.cli import Parser, integer, number, run
from core.errors import UserError
from dataset import latents
from dataset.root import read_split
from dataset.vae import cells_per_side, open_codec, same_weights
from diffusion.samplers import SAMPLERS
from generation import checkpoint as checkpoints
from generation import output
from generation.guidance import parse_heredity
from generation.sampling import SamplingOptions
from models import MODELS
from presets import PAPER_SAMPLING, PAPER_SPACE, presets_of

RELEASED = {"heredity": "whole"}  # --as-released
UNSAID = {**PAPER_SPACE, "image_space": False, "multi_scale": False}  # for files that do not say


def main():
    p = parser(__doc__, "latent cache or data root with the labels of the fold", "expand")
    p.add_argument("--labels", action="append", metavar="NAMES", help="ask for images with these labels, joined by "
                   "commas, or null for none; may be repeated; in place of --data-path")
    p.add_argument("--count", type=integer(1), nargs="+", default=[16], metavar="N",
                   help="images of each --labels: one number, or one for each")
    args = p.parse_args()
    if (args.labels is None) == (args.data_path is None):
        raise UserError("expected either --data-path (its labels) or --labels (yours)")
    if args.labels:
        args.expand_ratio = 1  # --count says how many, whatever a preset expands by
        sample(args, asked_labels, "asked", "asked", "labels-" + "_".join(map(slug, args.labels)))
    else:
        sample(args, training_labels, "gen_samples", f"train_syn_{args.fold}")


def slug(names):
    """Label names as a part of a folder name."""
    return re.sub(r"[^\w]+", "+", names.strip())[:60]


def asked_labels(args, label_names):
    """--labels and --count -> labels (n, K) and their names."""
    if label_names is None:
        raise UserError(f"--labels: {args.ckpt} does not name its labels; give --data-path")
    counts = args.count * len(args.labels) if len(args.count) == 1 else args.count
    if len(counts) != len(args.labels):
        raise UserError(f"--count: found {len(counts)} numbers for {len(args.labels)} --labels, expected one or as "
                        "many")
    rows = []
    for asked, count in zip(args.labels, counts, strict=True):
        names = set() if asked.strip() == "null" else {name.strip() for name in asked.split(",")}
        unknown = sorted(names - {*label_names})
        if unknown:
            raise UserError(f"--labels {asked}: {args.ckpt} knows no {unknown[0]!r}, it knows {' '.join(label_names)} "
                            "(or null)")
        rows += [[float(name in names) for name in label_names]] * count
    return np.array(rows, np.float32), label_names


def training_labels(args, label_names):
    """Labels (n, K) of the training images and their names; those of the checkpoint where the data has none."""
    if (args.data_path / f"train_{args.fold}.csv").is_file():
        split = read_split(args.data_path, f"train_{args.fold}")
        return split.labels, split.label_names
    cache = latents.load(args.data_path, args.fold)
    count = cache.labels.shape[1]
    names = cache.manifest.get("label_names") or label_names  # the published layouts name none
    if names is None or len(names) != count:
        names = [f"label_{k}" for k in range(count)]
    return cache.labels.numpy(), names


def sample(args, labels_of, image_folder, csv_name, name_more=""):
    """Sample one image per row of labels × expand_ratio into the sample folder, and describe them in a CSV.

    `labels_of(args, label names of the checkpoint)` -> labels (n, K) and their names; `name_more` ends the name of the
    sample folder.
    """
    check_flags(args)
    checkpoint, assumed = load_matching(args)
    labels, label_names = labels_of(args, checkpoint.label_names)
    checkpoint = check_labels(args, checkpoint, list(label_names))
    labels = torch.as_tensor(np.tile(labels, (args.expand_ratio, 1)))
    process = runtime.start(args.precision)
    codec = open_trained_codec(args, checkpoint, process.device)
    cells = check_fit(args, checkpoint, codec)
    options = options_of(args, checkpoint)
    model = checkpoints.build(checkpoint, args.weights).to(process.device)
    if args.compile:
        model.compile_parts()

    name = output.folder_name(checkpoint, args.ckpt.stem, args.fold, options)
    folder = args.sample_dir / "-".join(filter(None, [name, name_more]))
    settings = output.settings_of(checkpoint, args.weights, model, codec, options)
    settings["about"] = output.about(checkpoint, args.weights, model, options)
    label_array = labels.numpy().astype(int)
    output.claim(folder, settings, folder / f"{csv_name}.npy", label_array, process)
    if process.is_main_process:
        if assumed:
            print(f"{args.ckpt} does not say all; taken: " +
                  ", ".join(f"{name} {checkpoint.args[name]}" for name in assumed))
        print(f"{checkpoint.args['model']}, {args.weights} weights of step {checkpoint.step or 'unknown'}: "
              f"{len(labels)} images, {options.steps} steps, guidance {options.cfg_scale}, heredity "
              f"{options.heredity}, {process.num_processes} process(es)")
    output.write_missing(model, codec, labels, cells, folder / image_folder, process, options)
    process.wait_for_everyone()
    if process.is_main_process:
        output.describe(folder, image_folder, csv_name, label_array, label_names)
        output.show(folder, image_folder, label_array, label_names)
        print(f"{folder}: {len(labels)} images")
    process.wait_for_everyone()


def check_flags(args):
    """Flags that contradict each other."""
    if args.eta and args.sampler != "ddim":
        raise UserError(f"--eta {args.eta}: belongs to --sampler ddim, found {args.sampler}; leave it out")
    if args.cfg_interval and (args.cfg_scale == 1 or args.cfg_interval[0] > args.cfg_interval[1]):
        given = f"--cfg-interval {args.cfg_interval[0]} {args.cfg_interval[1]}"
        why = "needs --cfg-scale other than 1" if args.cfg_scale == 1 else "expected LOW not above HIGH"
        raise UserError(f"{given}: {why}")


def load_matching(args):
    """The checkpoint, after checking every flag that it already answers; what it leaves open, the flags answer.

    Second value: the names of what neither it nor a flag says, so that a default was taken.
    """
    checkpoint = checkpoints.load(args.ckpt)
    trained = {**dict.fromkeys(UNSAID), **checkpoint.args}
    for name in ("model", "image_size", "num_classes", "in_channels", "image_space", "vae", "multi_scale"):
        checkpoints.check_flag(args.ckpt, name, getattr(args, name), trained[name])
    unsaid = [name for name in UNSAID if trained[name] is None]
    for name in unsaid:
        asked = getattr(args, name)
        trained[name] = UNSAID[name] if asked is None else asked
    if args.weights not in checkpoint.kinds:
        raise UserError(f"--weights {args.weights}: {args.ckpt} holds {', '.join(checkpoint.kinds)}; give one of them")
    return replace(checkpoint, args=trained), unsaid


def check_labels(args, checkpoint, label_names):
    """Refuse other labels than the checkpoint's -> the checkpoint with its labels named."""
    wanted = checkpoint.model_args["num_classes"]
    own = label_names if checkpoint.label_names is None else checkpoint.label_names  # published files name none
    if label_names != own or len(label_names) != wanted:
        raise UserError(f"{args.data_path}: {len(label_names)} labels ({' '.join(label_names)}), but {args.ckpt} was "
                        f"trained on {wanted} ({' '.join(own)})")
    return replace(checkpoint, label_names=own)


def open_trained_codec(args, checkpoint, device):
    """The very autoencoder that the checkpoint was trained with."""
    trained = checkpoint.args
    codec = open_codec(trained["vae"], trained["image_space"], device)
    if checkpoint.codec is not None and not same_weights(codec.identity, checkpoint.codec):
        raise UserError(f"--vae {trained['vae']}: is {codec.identity}, but {args.ckpt} was trained with "
                        f"{checkpoint.codec}; restore that VAE")
    return codec


def check_fit(args, checkpoint, codec):
    """Refuse an image size or autoencoder that a checkpoint cannot be run with -> cells per side of the grid.

    Foreign files do not say theirs.
    """
    trained, sizes = checkpoint.args, checkpoint.model_args
    cells = cells_per_side(trained["image_size"], codec)
    if sizes["in_channels"] != codec.channels:
        raise UserError(f"--vae {trained['vae']}: has {codec.channels} channels, {args.ckpt} was trained on "
                        f"{sizes['in_channels']}; give the VAE it was trained with")
    if not MODELS[sizes["model"]].any_grid and cells != sizes.get("input_size", cells):
        raise UserError(f"--image-size {trained['image_size']}: {cells} cells per side, {args.ckpt} works on "
                        f"{sizes['input_size']}; give --image-size {sizes['input_size'] * codec.factor}")
    return cells


def options_of(args, checkpoint):
    """The SamplingOptions that the flags and the checkpoint ask for."""
    names = {f.name for f in fields(SamplingOptions)} & vars(args).keys()
    return SamplingOptions(**{name: getattr(args, name) for name in names} | {
        "steps": args.num_sampling_steps, "seed": args.global_seed, "batch_size": args.per_proc_batch_size,
        "multi_scale": checkpoint.args["multi_scale"],
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
    p.add_argument("--ckpt", type=Path, required=True, metavar="FILE", help="checkpoint, ours or published, or weights")
    p.add_argument("--data-path", type=Path, metavar="DIR", help=data_help)
    p.add_argument("--sample-dir", type=Path, default="samples", metavar="DIR", help="where the sample folder goes")
    p.add_argument("--fold", type=integer(0), default=0, help="fold whose labels are asked for")
    p.add_argument("--expand-ratio", type=integer(1), default=1, help="images per row of labels")
    p.add_argument("--model", help="model name (default: the checkpoint's; another is an error)")
    p.add_argument("--image-size", type=integer(8, 2048), help="pixels (default: the checkpoint's)")
    p.add_argument("--num-classes", type=integer(1), help="number of labels (default: the checkpoint's)")
    p.add_argument("--in-channels", type=integer(1), help="latent channels (default: the checkpoint's)")
    p.add_argument("--image-space", action="store_true", default=None,
                   help="the model diffuses pixels (default: as the checkpoint says)")
    p.add_argument("--vae", help="ema, mse, retina or a folder (default: the checkpoint's)")
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
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False,
                   help="compile the denoiser first (torch.compile: a minute at the start, fewer kernels after)")
    p.set_defaults(**PAPER_SAMPLING)
    return p


if __name__ == "__main__":
    run(main, runtime.stop)
