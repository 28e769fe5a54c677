"""Images that a sampler left in its folder, and the real images of a data root that they are compared with."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from core.claims import read_settings
from core.errors import UserError
from core.files import file_hash, read_array, refused
from dataset import outside
from dataset.images import load_image
from dataset.root import read_split
from dataset.sets import LabelledImages

ABOUT = {"model?": str, "parameters?": int, "trained_on_fold?": (int, None), "training_images?": (str, None),
         "run?": (str, None), "step?": (int, None), "image_size?": int, "weights?": str, "sampler?": str,
         "steps?": int, "cfg_scale?": float, "heredity?": str, "eta?": float, "cfg_interval?": ([int], None),
         "shared_fire?": bool, "precision?": str, "seed?": int, "training?": ({}, None),
         "training_seed?": (int, None), "checkpoint?": str, "weights_hash?": str,
         "seen_sha256?": str}  # schema of what a sampler says of its images
SETTINGS = {"about?": ABOUT, "weights?": str, "weights_hash?": str}
SEEN = "seen.txt"  # in a sample folder: what its generator was trained on, one image in each line
PICTURE, GRID = "real_vs_generated", "grid.png"  # what evaluate.py and the samplers leave beside the images


def open_real(root, name):
    """The images of ROOT/{name}.csv, and their label names."""
    images = read_split(root, name)
    return replace(images, name=f"real: {name}"), images.label_names


def sample_folders(directory, csv):
    """The sample folders that a path means: itself where it holds this CSV, else those in it that do, sorted."""
    directory = Path(directory)
    return [directory] if (directory / csv).is_file() else sorted(path.parent for path in directory.glob(f"*/{csv}"))


def open_generated(folder, fold, label_names):
    """The images of a sample folder that answer the validation labels of this fold.

    FOLDER/val_syn_{fold}.csv or, where there is none, the PNG files of FOLDER/gen_samples_val or of FOLDER itself,
    unlabelled; never gen_samples, the expansion of the training set. Second value: a remark, or None.
    """
    name = folder.resolve().name
    if list(folder.glob("val_syn_*.csv")):  # the CSV of another fold is an error, no reason to take any PNG
        images = read_samples(folder, f"val_syn_{fold}")
        if images.label_names != label_names:
            raise UserError(f"{images.csv}: labels {' '.join(images.label_names)}, expected those of --real: "
                            f"{' '.join(label_names)}")
        return replace(images, name=name, about=about_samples(folder)), None
    if (folder / f"val_syn_{fold}.npy").is_file():  # the sampler writes it first and the CSV last
        raise UserError(f"--gen {folder}: its sampling is unfinished (no val_syn_{fold}.csv); run the sampler again")
    for place in (folder / "gen_samples_val", folder):
        paths = sorted(p for p in place.glob("*.png") if not p.name.startswith(PICTURE) and p.name != GRID)
        if paths:
            outside.refuse(folder, [path.relative_to(folder) for path in paths], f"--gen {folder}")
            remark = f"{folder}: no val_syn_{fold}.csv; taking {len(paths)} PNG files of {place}, unlabelled"
            return LabelledImages(tuple(paths), folder=folder, name=name, about=about_samples(folder)), remark
    raise UserError(f"--gen {folder}: no such folder, or no image in it (expected val_syn_{fold}.csv, "
                    "gen_samples_val/*.png or *.png); make them with sample_ddp_val.py")


def about_samples(folder):
    """What the sampler wrote of itself; {} for a folder of other origin. Raises UserError."""
    settings = read_settings(folder, "remove it or sample again", SETTINGS) or {}
    about = settings.get("about", {})
    beside = {name: settings[name] for name in ("weights", "weights_hash") if about and name in settings}
    return beside | about


def seen_by(folder):
    """Identities (dataset/leaks.py) of the images that the generator of these samples has seen; None: not said.

    Raises UserError where they are not as the sampler wrote them.
    """
    file, expected = Path(folder) / SEEN, about_samples(folder).get("seen_sha256")
    if expected is None and not file.is_file():
        return None
    with refused(file, "sample again"):
        if expected not in (None, file_hash(file)):
            raise ValueError("it does not have its checksum")
        return file.read_text(encoding="ascii").split()


def read_samples(folder, name):
    """The images that FOLDER/{name}.csv of a sampler lists. Raises UserError where their labels are not {name}.npy's.

    The sampler writes both; a table that people made has no such file beside it.
    """
    images, file = read_split(folder, name), Path(folder) / f"{name}.npy"
    if file.is_file() and not np.array_equal(read_array(file, "sample again", 2), images.labels):
        raise UserError(f"{images.csv}: its labels are not those of {file.name}, one of them is damaged; sample again")
    return images


def check_size(paths, size):
    """Raise UserError unless every file is a readable image of size × size pixels, and not black."""
    def check(path):
        pixels = load_image(path)
        height, width = pixels.shape[:2]
        if (height, width) != (size, size):
            raise UserError(f"{path}: {width} × {height} pixels, expected {size} × {size}; give --image-size as it was "
                            "in sampling")
        if not pixels.any():
            raise UserError(f"{path}: is black, as samples of a model that diverged are; sample again or remove it")

    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(check, paths):
            pass
