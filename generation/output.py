"""Sample folders: their names, what they say of themselves, and the images and CSV files in them.

FOLDER/settings.json holds what the pixels depend on beyond the folder's name and, under `about`, where the images come
from: for tables, and for classify.py, which must not learn from what it is tested on. CSV_NAME.npy holds the labels
that were asked for and is written first; CSV_NAME.csv lists the images and is written last.
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from core import claims, runs
from core.errors import UserError
from core.files import read_array, write_array, write_atomically, write_csv, write_text
from core.progress import progress_bar
from core.tensors import weights_hash
from dataset.images import load_images
from dataset.pictures import caption, grid
from dataset.samples import GRID, SEEN
from generation.guidance import RENAMED
from generation.sampling import sample_images

OLDER = {"heredity": "published", "shared_fire": False}  # of folders that were made before these were settings
ROWS, COLUMNS = 6, 8  # images in grid.png
# Flags of train.py that its result depends on, beside the data, the model and the seed.
TRAINING = ("load_from", "vae", "image_space", "multi_scale", "position_code", "epochs", "max_minutes",
            "global_batch_size", "optimizer", "lr", "lr_schedule", "warmup", "adam_betas", "clip_norm", "grad_norm",
            "min_snr", "train_heredity", "ema_decay", "ema_warmup", "frozen_latents")


def folder_name(checkpoint, stem, fold, options):
    """The published name of a sample folder; another sampler or heredity adds its own."""
    trained = checkpoint.args
    more = {"ddpm": "", "ddim": f"-ddim-eta-{options.eta:g}", "dpmpp": "-dpmpp"}[options.sampler]
    if options.heredity not in ("published", "whole"):
        more += f"-heredity-{options.heredity.replace(':', '-')}"
    if options.shared_fire:
        more += "-shared-fire"
    return (f"{trained['model'].replace('/', '-')}-GS-fold-{fold}-nstep-{options.steps}-{stem}"
            f"-size-{trained['image_size']}-vae-{Path(trained['vae']).name}"
            f"-cfg-{options.cfg_scale}-seed-{options.seed}{more}")


def settings_of(checkpoint, kind, model, codec, options):
    """What the pixels of a sample folder depend on, beyond its name and the labels."""
    return {"weights": kind, "precision": options.precision, "step": checkpoint.step, "vae": codec.identity,
            "run": checkpoint.run, "label_names": checkpoint.label_names, "heredity": options.heredity,
            "shared_fire": options.shared_fire, "cfg_interval": options.cfg_interval and list(options.cfg_interval),
            "weights_hash": weights_hash(model)}  # two results folders may hold runs of one name and step


def about(checkpoint, file, folder, kind, model, options):
    """Where the images come from; `file` is that of the checkpoint, and noted as it is seen from their `folder`."""
    trained = checkpoint.args
    training = {name: trained[name] for name in TRAINING if name in trained}
    return {"model": trained["model"], "parameters": sum(p.numel() for p in model.parameters()),
            "trained_on_fold": trained.get("fold"), "training_images": checkpoint.training_images,
            "run": checkpoint.run, "step": checkpoint.step, "image_size": trained["image_size"], "weights": kind,
            "sampler": options.sampler, "steps": options.steps, "cfg_scale": options.cfg_scale,
            "heredity": options.heredity, "eta": options.eta, "shared_fire": options.shared_fire,
            "cfg_interval": options.cfg_interval and list(options.cfg_interval), "precision": options.precision,
            "seed": options.seed, "training": training or None, "training_seed": trained.get("global_seed"),
            "checkpoint": os.path.relpath(Path(file).resolve(), Path(folder).resolve())}


def claim(folder, settings, label_file, labels, seen):
    """Make or take the folder: write settings and labels (n, K) beside the images, or refuse those of other images.

    No other job may then work in it. `seen`: what the generator was trained on (Checkpoint.seen).

    Labels may become more or fewer (--expand-ratio), but image k keeps those it was made with.
    """
    before = read_array(label_file, f"remove {folder}", 2) if label_file.is_file() else labels[:0]
    stored = claims.read_settings(folder)
    if stored is not None:
        different = claims.differences(*({k: v for k, v in s.items() if k != "about"} for s in (stored, settings)),
                                       OLDER, RENAMED)
        if different:
            raise UserError(f"{folder}: its images were made with other settings ({claims.described(different)}); "
                            "remove it or give another --sample-dir")
    both = min(len(before), len(labels))
    if not np.array_equal(before[:both], labels[:both]):
        raise UserError(f"{folder}: its images were made with other labels ({label_file.name}) than those asked for "
                        "now; remove it or give another --sample-dir")
    runs.hold(folder)
    seen = None if seen is None else "\n".join([*seen, ""])
    if seen is not None:
        settings["about"]["seen_sha256"] = hashlib.sha256(seen.encode()).hexdigest()
    claims.write_settings(folder, settings)
    write_array(label_file, labels)
    if seen is not None:
        write_text(folder / SEEN, seen)


def write_missing(model, codec, labels, cells, images, process, options, interruption, draws=None):
    """Sample this process's share of the images that are not there yet: {images}/%06d.png, each written whole.

    `draws`: for each image the number of the one whose draws it is made with; None: its own.
    Returns whether it stopped before its end, after a batch, as `interruption` asked.
    """
    images.mkdir(parents=True, exist_ok=True)
    mine = range(process.process_index, len(labels), process.num_processes)
    ids = [i for i in mine if not (images / f"{i:06d}.png").is_file()]
    if not ids:
        return False
    drawn, written = ids if draws is None else [draws[i] for i in ids], []
    with (progress_bar(total=len(ids) * options.steps, unit="image-steps", title="sampling",
                       active=process.is_main_process) as bar, ThreadPoolExecutor(2) as pool):
        for _, pictures in sample_images(model, codec, labels[ids], drawn, cells, options, process.device, bar):
            numbers = ids[len(written):len(written) + len(pictures)]
            written += [pool.submit(write_image, images / f"{i:06d}.png", picture)
                        for i, picture in zip(numbers, pictures, strict=True)]
            if interruption.asked:
                break
        for image in written:
            image.result()  # raises what went wrong
    return len(written) < len(ids)


def write_image(path, picture):
    """A uint8 (H, W, 3) array as a PNG file, written whole."""
    write_atomically(path, lambda temporary: Image.fromarray(picture).save(temporary, format="PNG"))


def describe(folder, image_folder, csv_name, labels, label_names):
    """Write CSV_NAME.csv (the columns of a data root): labels (n, K) of the images in FOLDER/IMAGE_FOLDER.

    `multi_class_label` numbers the label combinations that occur, in lexicographic order.
    """
    combination = np.unique(labels, axis=0, return_inverse=True)[1].reshape(-1)
    rows = [[i, f"syn_{i}", f"{image_folder}/{i:06d}.png", *map(_plain, y), f"syn_{i}", c]
            for i, (y, c) in enumerate(zip(labels.tolist(), combination.tolist(), strict=True))]
    header = ["", "client_id", "filename", *label_names, "patient_name", "multi_class_label"]
    write_csv(folder / f"{csv_name}.csv", header, rows)


def _plain(value):
    """A label as a CSV has it: 0 and 1 are integers, soft labels have four digits."""
    return int(value) if value == int(value) else round(value, 4)


def show(folder, image_folder, labels, label_names):
    """Write FOLDER/grid.png: images with their labels (n, K) below them, as `shown` chooses and lays them out."""
    numbers, columns = shown(labels)
    made = iter(load_images([folder / image_folder / f"{i:06d}.png" for i in numbers if i is not None], None))
    images = [None if i is None else next(made) for i in numbers]
    captions = ["" if i is None else caption(labels[i], label_names) for i in numbers]
    write_atomically(folder / GRID, lambda path: grid(images, captions, columns).save(path, format="PNG"))


def shown(labels):
    """What a grid shows of images with these labels (n, K) -> (their numbers, None for an empty place; its columns).

    Where there are fewer combinations of labels than images, and no more than rows, each has rows of its own, in the
    order in which they first occur, that show its first images; else the first images of all.
    """
    _, first, which = np.unique(labels, axis=0, return_index=True, return_inverse=True)
    if len(first) > ROWS or len(first) in (1, len(labels)):
        return [*range(min(ROWS * COLUMNS, len(labels)))], COLUMNS
    most = ROWS // len(first) * COLUMNS
    groups = [np.flatnonzero(which.reshape(-1) == k)[:most].tolist() for k in np.argsort(first)]
    columns = min(COLUMNS, max(map(len, groups)))
    return [i for group in groups for i in [*group, *[None] * (-len(group) % columns)]], columns
