"""From a checkpoint and labels to images: what both samplers and the validation of train.py share.

Image number k is a function of (checkpoint, seed, labels, k): every draw comes from generators keyed by its
number, so it is the same on any number of processes and at any batch size.
"""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from core import runtime
from core.cli import Parser, integer, number
from core.errors import UserError
from core.files import write_atomically, write_csv, write_text
from core.random import generator, per_image
from dataset.vae import cells_per_side, open_codec, same_weights, weights_hash
from diffusion import create_diffusion, multiscale, samplers
from generation import checkpoint as checkpoints
from generation import guidance
from models import MODELS


@torch.no_grad()
def sample_latents(model, diffusion, labels, ids, *, cells, cfg_scale, seed, device, multi_scale=False,
                   unguided_state="hidden", cfg_interval=None, sampler="ddpm", eta=0.0, on_step=None):
    """Guided sampling: labels (N, K), ids = the N image numbers -> latents (N, C, cells, cells)."""
    noise = [generator(seed, "noise", i) for i in ids]
    cells_of_half = [[generator(seed, half, i) for i in ids] for half in ("cells", "null cells")]
    denoise = guidance.GuidedDenoiser(model, labels.to(device), cfg_scale, cells_of_half, unguided_state,
                                      cfg_interval)
    regrid = partial(multiscale.enlarge, side=cells) if multi_scale else None
    side = cells // multiscale.reduction(int(diffusion.timestep_map[-1])) if multi_scale else cells
    x = per_image(torch.randn, (model.in_channels, side, side), noise).to(device)
    return samplers.SAMPLERS[sampler](diffusion, denoise, x, guidance.ImageNoise(noise, device), eta, on_step, regrid)


def sample_images(model, codec, labels, ids, *, steps, batch_size, precision="fp32", progress=None, **options):
    """Yield (ids, uint8 images (n, H, W, 3)) batch by batch. `options` as in `sample_latents`.

    `precision` is that of the denoiser; the diffusion and the decoder compute in float32.
    """
    diffusion = create_diffusion(str(steps))
    for start in range(0, len(ids), batch_size):
        part = slice(start, start + batch_size)
        on_step = (lambda i, p: progress.update(len(i))) if progress is not None else None
        with runtime.autocast(precision, options["device"]):
            latents = sample_latents(model, diffusion, labels[part], ids[part], on_step=on_step, **options)
        yield ids[part], codec.decode(latents).cpu().numpy()


RELEASED = {"unguided_state": "whole"}  # --as-released
UNSAID = {"image_size": 256, "vae": "ema", "image_space": False, "multi_scale": False}  # for files that do not say


def add_state_flag(p):
    p.add_argument("--unguided-state", choices=("hidden", "whole"), default="hidden", help="which of GeCA's channels "
                   "the next denoising step inherits where there is no guidance (published: whole)")


def add_flags(p, default_data_path):
    """The flags that both sampling scripts have."""
    p.add_argument("--ckpt", type=Path, required=True, metavar="FILE", help="checkpoint, ours or published, or weights")
    p.add_argument("--data-path", type=Path, required=True, metavar="DIR", help=default_data_path)
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
    p.add_argument("--weights", choices=("ema", "model"), default="ema", help="averaged or raw weights")
    p.add_argument("--num-sampling-steps", type=integer(1, 1000), default=250, help="denoising steps")
    p.add_argument("--sampler", choices=samplers.SAMPLERS, default="ddpm", help="ancestral, DDIM or DPM-Solver++(2M)")
    p.add_argument("--eta", type=number(0, 1), default=0.0, help="noise of DDIM: none at 0, that of ddpm at 1")
    p.add_argument("--cfg-scale", type=number(0), default=1.5, help="guidance; 1 is none")
    p.add_argument("--cfg-interval", type=integer(0, 999), nargs=2, metavar=("LOW", "HIGH"),
                   help="diffusion steps between which there is guidance (default: all)")
    p.add_argument("--per-proc-batch-size", type=integer(1), default=32, help="images per process and batch")
    add_state_flag(p)
    p.add_argument("--global-seed", type=integer(0), default=0, help="seed; image k depends on it and on k")
    p.add_argument("--precision", choices=runtime.PRECISIONS, default="fp32",
                   help="of the denoiser's matrix products; fp16 needs a GPU")
    p.add_argument("--tf32", dest="precision", action="store_const", const="tf32", default=argparse.SUPPRESS,
                   help="published spelling of --precision tf32")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False,
                   help="compile the denoiser first (torch.compile: a minute at the start, fewer kernels after)")


def parser(description, data_help):
    p = Parser(description, RELEASED)
    add_flags(p, data_help)
    return p


def run(args, labels_of, folder_name, csv_name):
    """Sample one image per row of labels × expand_ratio into the sample folder, and describe them in a CSV.

    `labels_of(args, checkpoint)` -> labels (n, K) and their names. Stopped, the same command continues: images
    that are there are kept, since each is a function of its number and of the settings written beside it.
    """
    check_flags(args)
    checkpoint = load_matching(args)
    trained = checkpoint["args"]
    labels, label_names = labels_of(args, checkpoint)
    if checkpoint["label_names"] is None:  # the published layout counts its labels but does not name them
        checkpoint["label_names"] = list(label_names)
    wanted = checkpoint["model_args"]["num_classes"]
    if list(label_names) != checkpoint["label_names"] or len(label_names) != wanted:
        raise UserError(f"{args.data_path}: {len(label_names)} labels ({' '.join(label_names)}), but {args.ckpt} was "
                        f"trained on {wanted} ({' '.join(checkpoint['label_names'])})")
    labels = torch.as_tensor(np.tile(labels, (args.expand_ratio, 1)))
    process = runtime.start(args.precision)
    codec = open_trained_codec(args, checkpoint, process.device)
    check_fit(args, checkpoint, codec)
    folder = args.sample_dir / sample_folder(args, trained)
    model = checkpoints.build(checkpoint, args.weights).to(process.device)
    if args.compile:
        model.compile_parts()
    label_file = folder / f"{csv_name}_{args.fold}.npy"
    wanted = settings(args, checkpoint, model, codec) | {"about": about(args, checkpoint, model)}
    claim(folder, wanted, label_file, labels.numpy().astype(int), process)
    if process.is_main_process:
        if checkpoint["assumed"]:
            print(f"{args.ckpt} does not say all; taken: " +
                  ", ".join(f"{name} {trained[name]}" for name in checkpoint["assumed"]))
        print(f"{trained['model']}, {args.weights} weights of step {checkpoint['step'] or 'unknown'}: "
              f"{len(labels)} images, {args.num_sampling_steps} steps, guidance {args.cfg_scale}, "
              f"{process.num_processes} process(es)")
    options = {"steps": args.num_sampling_steps, "batch_size": args.per_proc_batch_size,
               "cells": cells_per_side(trained["image_size"], codec), "cfg_scale": args.cfg_scale,
               "seed": args.global_seed, "device": process.device, "multi_scale": trained["multi_scale"],
               "unguided_state": args.unguided_state, "precision": args.precision, "sampler": args.sampler,
               "eta": args.eta, "cfg_interval": args.cfg_interval}
    write_missing(model, codec, labels, folder / folder_name, process, options)
    process.wait_for_everyone()
    if process.is_main_process:
        describe(folder, folder_name, f"{csv_name}_{args.fold}", labels.numpy().astype(int), label_names)
        print(f"{folder}: {len(labels)} images")
    process.wait_for_everyone()


def check_flags(args):
    """Flags that contradict each other."""
    if args.eta and args.sampler != "ddim":
        raise UserError(f"--eta {args.eta}: belongs to --sampler ddim, found {args.sampler}; leave it out")
    if args.cfg_interval and (args.cfg_scale == 1 or args.cfg_interval[0] > args.cfg_interval[1]):
        found = f"--cfg-interval {args.cfg_interval[0]} {args.cfg_interval[1]}"
        why = "needs --cfg-scale other than 1" if args.cfg_scale == 1 else "expected LOW not above HIGH"
        raise UserError(f"{found}: {why}")


def load_matching(args):
    """The checkpoint, after checking every flag that it already answers; what it leaves open, the flags answer."""
    checkpoint = checkpoints.load(args.ckpt)
    trained = checkpoint["args"]
    for name in ("model", "image_size", "num_classes", "in_channels", "image_space", "vae", "multi_scale"):
        checkpoints.check_flag(args.ckpt, name, getattr(args, name), trained[name])
    checkpoint["assumed"] = [name for name in UNSAID if trained[name] is None]
    for name in checkpoint["assumed"]:
        asked = getattr(args, name)
        trained[name] = UNSAID[name] if asked is None else asked
    if not checkpoint.get(args.weights):
        raise UserError(f"--weights {args.weights}: {args.ckpt} holds none; give the other")
    return checkpoint


def open_trained_codec(args, checkpoint, device):
    """The very autoencoder that the checkpoint was trained with."""
    trained = checkpoint["args"]
    codec = open_codec(trained["vae"], trained["image_space"], device)
    if checkpoint["codec"] is not None and not same_weights(codec.identity, checkpoint["codec"]):
        raise UserError(f"--vae {trained['vae']}: is {codec.identity}, but {args.ckpt} was trained with "
                        f"{checkpoint['codec']}; restore that VAE")
    return codec


def check_fit(args, checkpoint, codec):
    """Refuse an image size or autoencoder that a checkpoint cannot be run with; foreign files do not say theirs."""
    trained, sizes = checkpoint["args"], checkpoint["model_args"]
    cells = cells_per_side(trained["image_size"], codec)
    if sizes["in_channels"] != codec.channels:
        raise UserError(f"--vae {trained['vae']}: has {codec.channels} channels, {args.ckpt} was trained on "
                        f"{sizes['in_channels']}; give the VAE it was trained with")
    if not MODELS[sizes["model"]].func.any_grid and cells != sizes.get("input_size", cells):
        raise UserError(f"--image-size {trained['image_size']}: {cells} cells per side, {args.ckpt} works on "
                        f"{sizes['input_size']}; give --image-size {sizes['input_size'] * codec.factor}")


def write_missing(model, codec, labels, images, process, options):
    """Sample this process's share of the images that are not there yet: {images}/%06d.png, each written whole."""
    images.mkdir(parents=True, exist_ok=True)
    wanted = range(process.process_index, len(labels), process.num_processes)
    ids = [i for i in wanted if not (images / f"{i:06d}.png").is_file()]
    if not ids:
        return
    with (tqdm(total=len(ids) * options["steps"], unit="image-step", mininterval=2,
               disable=not process.is_main_process) as bar, ThreadPoolExecutor(2) as pool):
        written = []
        for numbers, pictures in sample_images(model, codec, labels[ids], ids, progress=bar, **options):
            written += [pool.submit(write_image, images / f"{i:06d}.png", picture)
                        for i, picture in zip(numbers, pictures, strict=True)]
        for image in written:
            image.result()  # raises what went wrong


def write_image(path, picture):
    """A uint8 (H, W, 3) array as a PNG file, written whole."""
    write_atomically(path, lambda temporary: Image.fromarray(picture).save(temporary, format="PNG"))


def sample_folder(args, trained):
    """The published name of a sample folder; other samplers than the published one add theirs."""
    sampler = {"ddpm": "", "ddim": f"-ddim-eta-{args.eta:g}", "dpmpp": "-dpmpp"}[args.sampler]
    return (f"{trained['model'].replace('/', '-')}-GS-fold-{args.fold}-nstep-{args.num_sampling_steps}-"
            f"{args.ckpt.stem}-size-{trained['image_size']}-vae-{Path(trained['vae']).name}-"
            f"cfg-{args.cfg_scale}-seed-{args.global_seed}{sampler}")


def settings(args, checkpoint, model, codec):
    """What the pixels of a sample folder depend on, beyond its name and the labels."""
    return {"weights": args.weights, "precision": args.precision, "step": checkpoint["step"],
            "vae": codec.identity, "run": checkpoint["run"], "label_names": checkpoint["label_names"],
            "unguided_state": args.unguided_state if args.cfg_scale == 1 else "hidden",
            "cfg_interval": args.cfg_interval,
            "weights_hash": weights_hash(model)}  # two results folders may hold runs of one name and step


def about(args, checkpoint, model):
    """Where the images come from: for tables, and for classify.py, which must not learn from what it is tested on."""
    trained = checkpoint["args"]
    return {"model": trained["model"], "parameters": sum(p.numel() for p in model.parameters()),
            "trained_on_fold": trained.get("fold"), "training_images": checkpoint["training_images"],
            "run": checkpoint["run"], "step": checkpoint["step"], "sampler": args.sampler,
            "steps": args.num_sampling_steps, "cfg_scale": args.cfg_scale, "seed": args.global_seed}


def claim(folder, wanted, label_file, labels, process):
    """Write settings and labels (n, K) beside the images, or refuse a folder that was made with others.

    Labels may become more or fewer (--expand-ratio), but image k keeps those it was made with.
    """
    file = folder / "settings.json"
    try:
        found = json.loads(file.read_text()) if file.is_file() else None
        before = np.load(label_file) if label_file.is_file() else labels[:0]
    except (ValueError, EOFError, OSError) as error:  # of json or numpy
        raise UserError(f"{folder}: settings.json or {label_file.name} is damaged ({error}); remove it all") from None
    odd = [key for key in wanted if found is not None and found.get(key) != wanted[key] and key != "about"]
    if odd:
        key = odd[0]
        raise UserError(f"{folder}: its images were made with other settings ({key} {found.get(key)}, now "
                        f"{wanted[key]}); remove it or give another --sample-dir")
    both = min(len(before), len(labels))
    if not np.array_equal(before[:both], labels[:both]):
        raise UserError(f"{folder}: its images were made with other labels ({label_file.name}) than --data-path "
                        "has now; remove it or give another --sample-dir")
    process.wait_for_everyone()  # every process has looked before one writes
    if process.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(wanted, indent=1) + "\n")
        write_atomically(label_file, lambda path: np.save(open(path, "wb"), labels))  # noqa: SIM115


def describe(folder, folder_name, csv_name, labels, label_names):
    """Write CSV_NAME.csv (the columns of a data root).

    `multi_class_label` numbers the label combinations that occur, in lexicographic order.
    """
    combination = np.unique(labels, axis=0, return_inverse=True)[1].reshape(-1)
    rows = [[i, f"syn_{i}", f"{folder_name}/{i:06d}.png", *y, f"syn_{i}", c]
            for i, (y, c) in enumerate(zip(labels.tolist(), combination.tolist(), strict=True))]
    header = ["", "client_id", "filename", *label_names, "patient_name", "multi_class_label"]
    write_csv(folder / f"{csv_name}.csv", header, rows)
