r"""Do the scores of evaluate.py move as they promise? Real images, made worse in known ways, are scored as generated.

    python scripts/check_metrics.py --real data/oct --other data/fundus --image-size 64 --features retina --lpips none \
        --output check

Five sets of equally many images: real images that nothing else saw (ROOT/test.csv), the same blurred, the same with
noise, copies of training images, and images of another data root (--other, left out without it). With --vae a sixth,
of which nothing is promised: the first, encoded and decoded, to show what the autoencoder alone costs. Writes them to
OUTPUT/sets, calls evaluate.py on all of them, and says of each promise whether it was kept; exit code 1 if one was not.
"""

import subprocess
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image, ImageFilter

from core.cli import Parser, integer, run
from core.errors import UserError
from core.files import make_folder
from core.random import generator
from dataset import outside
from dataset.images import load_image
from dataset.root import read_split, write_split
from dataset.vae import cells_per_side, open_codec
from evaluation.results import read

BLUR = 1 / 64  # radius as a share of the side
NOISE = 20  # standard deviation in grey values


def main():
    args = parser().parse_args()
    make_folder(args.output, "--output")
    folders = make_sets(args.real, args.other, args.fold, args.image_size, args.global_seed, args.output / "sets",
                        args.vae)
    command = [sys.executable, str(Path(__file__).resolve().parent.parent / "evaluate.py"), "--real", str(args.real),
               "--fold", str(args.fold), "--image-size", str(args.image_size), "--features", args.features,
               "--lpips", args.lpips, "--global-seed", str(args.global_seed), "--output", str(args.output),
               *outside.flags(), "--gen", *map(str, folders)]
    if subprocess.run(command, check=False).returncode:
        raise UserError("evaluate.py failed, see above")
    rows = {Path(row["folder"]).name: row for row in read([args.output / "results.json"])[0]["rows"]
            if row["kind"] == "generated"}
    outcomes = promises(rows)
    for name, kept in outcomes.items():
        print(f"{'kept  ' if kept else 'BROKEN'}  {name}")
    sys.exit(0 if all(outcomes.values()) else 1)


def make_sets(real, other, fold, image_size, seed, output, vae=None):
    """Write the sets of images below `output` -> their folders. real, other: data roots; other and vae may be None."""
    test, train, validation = (read_split(real, name) for name in ("test", f"train_{fold}", f"val_{fold}"))
    count = min(len(test), len(validation), len(train))
    sources = {"independent": (test, unchanged), "blurred": (test, blur), "noisy": (test, noise),
               "copies": (train, unchanged)}
    if other is not None:
        other_test = read_split(other, "test")
        if len(other_test) < count:
            raise UserError(f"--other {other}: has {len(other_test)} test images, expected at least {count}")
        sources["other"] = (other_test, unchanged)
    if vae is not None:
        codec = open_codec(vae)
        cells_per_side(image_size, codec)  # refuses what the autoencoder cannot halve
        sources["reconstructed"] = test, partial(reconstruct, codec)
    for name, (split, change) in sources.items():
        chosen = torch.randperm(len(split), generator=generator(seed, "check", split.csv.name))[:count].numpy()
        images = [change(Image.fromarray(load_image(split.paths[i], image_size)),
                         generator(seed, "check", name, k)) for k, i in enumerate(chosen)]
        known = split.label_names == validation.label_names
        labels = split.labels[chosen] if known else np.zeros((count, len(validation.label_names)))
        write_set(output / name, images, labels, validation.label_names, f"val_syn_{fold}")
    return [output / name for name in sources]


def write_set(folder, images, labels, label_names, csv_name):
    """Write a folder like those of sample_ddp_val.py."""
    make_folder(folder / "gen_samples_val", "--output")
    names = [f"gen_samples_val/{i:06d}.png" for i in range(len(images))]
    for name, image in zip(names, images, strict=True):
        image.save(folder / name)
    write_split(folder, csv_name, names, labels, label_names, names)


def unchanged(image, _):
    return image


def blur(image, _):
    return image.filter(ImageFilter.GaussianBlur(BLUR * image.width))


def noise(image, draw):
    pixels = np.asarray(image, np.float32)
    grey = torch.randn(pixels.shape[:2], generator=draw).numpy()[:, :, None]  # as a camera's, not coloured
    return Image.fromarray((pixels + NOISE * grey).round().clip(0, 255).astype(np.uint8))


def reconstruct(codec, image, _):
    mean, _ = codec.moments(np.array(image)[None])
    return Image.fromarray(codec.decode(mean)[0].numpy())


def promises(rows):
    """What must be seen -> whether it is. rows: name of the set -> its row in results.json."""
    space = next(iter(rows["independent"]["kid"]))

    def kid(name):
        return rows[name]["kid"][space]["value"]

    independent, copies = rows["independent"], rows["copies"]
    noise_of_kid = 3 * independent["kid"][space]["standard_error"]
    kept = {
        "KID of independent real images is 0 up to three standard errors": abs(kid("independent")) < noise_of_kid,
        "KID of copied training images is as small: it cannot see copies": abs(kid("copies")) < noise_of_kid,
        "KID of blurred images is larger": kid("blurred") > kid("independent") + noise_of_kid,
        "KID of noisy images is larger": kid("noisy") > kid("independent") + noise_of_kid,
        "GG of copies is strongly negative": copies["gg"]["gap"] < min(-20, 5 * independent["gg"]["gap"]),
        "GG of independent images is not": independent["gg"]["gap"] > -20,
        "copies: all samples are exact duplicates of training images":
            len(copies["memorisation"]["exact_duplicates"]["copies"]) == copies["images"],
        "copies: all are near a training image, p < 0.001": copies["memorisation"]["close"]["value"] > 0.99
            and copies["memorisation"]["close"]["p"] < 1e-3,
        # not by its p: several images of one patient are not independent
        "independent: few are near a training image": independent["memorisation"]["close"]["value"] < 0.25,
        "AuthPct of copies is 0": copies["memorisation"]["authentic_percent"] == 0,
        "coverage of blurred images is lower": rows["blurred"]["fidelity"][space]["coverage"]
            < independent["fidelity"][space]["coverage"],
    }
    if "other" in rows:
        kept |= {"KID of another modality is the largest": kid("other") == max(map(kid, rows)),
                 "precision of another modality is near 0": rows["other"]["fidelity"][space]["precision"] < 0.1}
    if independent["lpips"]:
        blurred, plain, noisy = (rows[name]["lpips"]["mean"] for name in ("blurred", "independent", "noisy"))
        kept["LPIPS diversity: blurred < independent < noisy"] = blurred < plain < noisy
    return kept


def parser():
    p = Parser(__doc__)
    p.add_argument("--real", type=Path, required=True, metavar="ROOT", help="data root with a test.csv")
    p.add_argument("--other", type=Path, metavar="ROOT", help="data root of another modality")
    p.add_argument("--vae", metavar="NAME", help="also score the test images, encoded and decoded by this autoencoder: "
                   "ema, mse, retina, retina-2 or a folder")
    outside.add_flag(p)
    p.add_argument("--fold", type=integer(0), default=0, help="whose images are the training and validation images")
    p.add_argument("--image-size", type=integer(8, 2048), default=256, help="side of the images, in pixels")
    p.add_argument("--features", default="inception", metavar="NAME", help="feature space, as of evaluate.py")
    p.add_argument("--lpips", default="alex", metavar="NET", help="alex or none, as of evaluate.py")
    p.add_argument("--global-seed", type=integer(0), default=0, help="seed of choices and noise")
    p.add_argument("--output", type=Path, required=True, metavar="DIR", help="for the sets and the results")
    return p


if __name__ == "__main__":
    run(main)
