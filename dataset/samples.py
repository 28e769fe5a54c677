"""Images that a sampler left in its folder, and the real images of a data root that they are compared with."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from core.claims import read_settings
from core.errors import UserError
from dataset.images import load_image
from dataset.root import read_split
from dataset.sets import LabelledImages

PICTURE = "real_vs_generated"  # what evaluate.py leaves beside the images is no sample


def open_real(root, name):
    """The images of ROOT/{name}.csv, and their label names."""
    images = read_split(root, name)
    return replace(images, name=f"real: {name}"), images.label_names


def open_generated(folder, fold, label_names):
    """The images of a sample folder that answer the validation labels of this fold.

    FOLDER/val_syn_{fold}.csv or, where there is none, the PNG files of FOLDER/gen_samples_val or of FOLDER itself,
    unlabelled; never gen_samples, the expansion of the training set. Second value: a remark, or None.
    """
    name = folder.resolve().name
    if list(folder.glob("val_syn_*.csv")):  # the CSV of another fold is an error, no reason to take any PNG
        images = read_split(folder, f"val_syn_{fold}")
        if images.label_names != label_names:
            raise UserError(f"{images.csv}: labels {' '.join(images.label_names)}, expected those of --real: "
                            f"{' '.join(label_names)}")
        return replace(images, name=name, about=about_samples(folder)), None
    if (folder / f"val_syn_{fold}.npy").is_file():  # the sampler writes it first and the CSV last
        raise UserError(f"--gen {folder}: its sampling is unfinished (no val_syn_{fold}.csv); run the sampler again")
    for place in (folder / "gen_samples_val", folder):
        paths = sorted(p for p in place.glob("*.png") if not p.name.startswith(PICTURE))
        if paths:
            remark = f"{folder}: no val_syn_{fold}.csv; taking {len(paths)} PNG files of {place}, unlabelled"
            return LabelledImages(tuple(paths), folder=folder, name=name, about=about_samples(folder)), remark
    raise UserError(f"--gen {folder}: no such folder, or no image in it (expected val_syn_{fold}.csv, "
                    "gen_samples_val/*.png or *.png); make them with sample_ddp_val.py")


def about_samples(folder):
    """What the sampler wrote of itself; {} for a folder of other origin. Raises UserError."""
    settings = read_settings(folder, "remove it or sample again") or {}
    about = settings.get("about", {})
    if not isinstance(about, dict):
        raise UserError(f"{folder / 'settings.json'}: damaged (about is {about!r:.40}); remove it or sample again")
    older = {"weights": settings["weights"]} if about and "weights" in settings else {}  # it stood only there once
    return older | about


def check_size(paths, size):
    """Raise UserError unless every file is a readable image of size × size pixels."""
    with ThreadPoolExecutor(4) as pool:
        for path, (height, width) in zip(paths, pool.map(lambda p: load_image(p).shape[:2], paths), strict=True):
            if (height, width) != (size, size):
                raise UserError(f"{path}: {width} × {height} pixels, expected {size} × {size}; "
                                "give --image-size as it was in sampling")
