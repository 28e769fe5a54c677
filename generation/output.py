"""Sample folders: their names, what they say of themselves, and the images and CSV files in them.

FOLDER/settings.json holds what the pixels depend on beyond the folder's name and, under `about`, where the images come
from: for tables, and for classify.py, which must not learn from what it is tested on. CSV_NAME.npy holds the labels
that were asked for and is written first; CSV_NAME.csv lists the images and is written last.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from core import claims
from core.assets import weights_hash
from core.errors import UserError
from core.files import write_atomically, write_csv
from dataset.images import load_images
from dataset.pictures import caption, grid
from generation.guidance import RENAMED
from generation.sampling import sample_images

OLDER = {"heredity": "published", "shared_fire": False}  # of folders that were made before these were settings
SHOWN = 48  # images in grid.png


def folder_name(checkpoint, stem, fold, options):
    """The published name of a sample folder; another sampler or heredity adds its own."""
    trained = checkpoint.args
    more = {"ddpm": "", "ddim": f"-ddim-eta-{options.eta:g}", "dpmpp": "-dpmpp"}[options.sampler]
    if options.heredity not in ("published", "whole"):
        more += f"-heredity-{options.heredity.replace(':', '-')}"
    if options.shared_fire:
        more += "-shared-fire"
    return (f"{trained['model'].replace('/', '-')}-GS-fold-{fold}-nstep-{options.steps}-{stem}-size-"
            f"{trained['image_size']}-vae-{Path(trained['vae']).name}-cfg-{options.cfg_scale}-seed-{options.seed}{more}")


def settings_of(checkpoint, kind, model, codec, options):
    """What the pixels of a sample folder depend on, beyond its name and the labels."""
    return {"weights": kind, "precision": options.precision, "step": checkpoint.step, "vae": codec.identity,
            "run": checkpoint.run, "label_names": checkpoint.label_names, "heredity": options.heredity,
            "shared_fire": options.shared_fire, "cfg_interval": options.cfg_interval and list(options.cfg_interval),
            "weights_hash": weights_hash(model)}  # two results folders may hold runs of one name and step


def about(checkpoint, kind, model, options):
    """Where the images come from."""
    trained = checkpoint.args
    return {"model": trained["model"], "parameters": sum(p.numel() for p in model.parameters()),
            "trained_on_fold": trained.get("fold"), "training_images": checkpoint.training_images,
            "run": checkpoint.run, "step": checkpoint.step, "weights": kind, "sampler": options.sampler,
            "steps": options.steps, "cfg_scale": options.cfg_scale, "heredity": options.heredity,
            "eta": options.eta, "cfg_interval": options.cfg_interval and list(options.cfg_interval),
            "shared_fire": options.shared_fire, "precision": options.precision, "seed": options.seed}


def claim(folder, settings, label_file, labels, process):
    """Write settings and labels (n, K) beside the images, or refuse a folder that was made with others.

    Labels may become more or fewer (--expand-ratio), but image k keeps those it was made with.
    """
    try:
        before = np.load(label_file) if label_file.is_file() else labels[:0]
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{label_file}: damaged ({error}); remove {folder}") from None
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
    process.wait_for_everyone()  # every process has looked before one writes
    if process.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        claims.write_settings(folder, settings)
        write_atomically(label_file, lambda path: np.save(open(path, "wb"), labels))  # noqa: SIM115


def write_missing(model, codec, labels, cells, images, process, options):
    """Sample this process's share of the images that are not there yet: {images}/%06d.png, each written whole."""
    images.mkdir(parents=True, exist_ok=True)
    mine = range(process.process_index, len(labels), process.num_processes)
    ids = [i for i in mine if not (images / f"{i:06d}.png").is_file()]
    if not ids:
        return
    with (tqdm(total=len(ids) * options.steps, unit="image-step", mininterval=2,
               disable=not process.is_main_process) as bar, ThreadPoolExecutor(2) as pool):
        written = []
        for numbers, pictures in sample_images(model, codec, labels[ids], ids, cells, options, process.device, bar):
            written += [pool.submit(write_image, images / f"{i:06d}.png", picture)
                        for i, picture in zip(numbers, pictures, strict=True)]
        for image in written:
            image.result()  # raises what went wrong


def write_image(path, picture):
    """A uint8 (H, W, 3) array as a PNG file, written whole."""
    write_atomically(path, lambda temporary: Image.fromarray(picture).save(temporary, format="PNG"))


def describe(folder, image_folder, csv_name, labels, label_names):
    """Write CSV_NAME.csv (the columns of a data root): labels (n, K) of the images in FOLDER/IMAGE_FOLDER.

    `multi_class_label` numbers the label combinations that occur, in lexicographic order.
    """
    combination = np.unique(labels, axis=0, return_inverse=True)[1].reshape(-1)
    rows = [[i, f"syn_{i}", f"{image_folder}/{i:06d}.png", *y, f"syn_{i}", c]
            for i, (y, c) in enumerate(zip(labels.tolist(), combination.tolist(), strict=True))]
    header = ["", "client_id", "filename", *label_names, "patient_name", "multi_class_label"]
    write_csv(folder / f"{csv_name}.csv", header, rows)


def show(folder, image_folder, labels, label_names):
    """Write FOLDER/grid.png: the first images in the order of their numbers, with their labels (n, K) below them."""
    images = load_images([folder / image_folder / f"{i:06d}.png" for i in range(min(SHOWN, len(labels)))], None)
    captions = [caption(row, label_names) for row in labels[:SHOWN]]
    write_atomically(folder / "grid.png", lambda path: grid(images, captions).save(path, format="PNG"))
