r"""Do the scores of evaluate.py move as they promise? Real images, made worse in known ways, are scored as generated.

    python scripts/check_metrics.py --real data/oct --other data/fundus --image-size 64 --features retina --lpips none \
        --output check

Five sets of equally many images: real images that nothing else saw (ROOT/test.csv), the same blurred, the same with
noise, copies of training images, and images of another data root (--other, left out without it). Writes them to
OUTPUT/sets, calls evaluate.py on all of them, and says of each promise whether it was kept; exit code 1 if one was not.
"""

import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image, ImageFilter

from core.cli import Parser, integer, run
from core.errors import UserError
from core.files import make_folder
from core.random import generator
from dataset.images import load_image
from dataset.root import read_split, write_split

BLUR = 1 / 64  # radius as a share of the side
NOISE = 20  # standard deviation in grey values


def main():
    args = parser().parse_args()
    make_folder(args.output, "--output")
    sets = make_sets(args)
    command = [sys.executable, str(Path(__file__).resolve().parent.parent / "evaluate.py"), "--real", str(args.real),
               "--fold", str(args.fold), "--image-size", str(args.image_size), "--features", args.features,
               "--lpips", args.lpips, "--global-seed", str(args.global_seed), "--output", str(args.output),
               "--gen", *map(str, sets)]
    if subprocess.run(command, check=False).returncode:
        raise UserError("evaluate.py failed, see above")
    rows = {Path(row["folder"]).name: row for row in json.loads((args.output / "results.json").read_text())["rows"]
            if row["kind"] == "generated"}
    kept = [promise(name, value) for name, value in promises(rows).items()]
    sys.exit(0 if all(kept) else 1)


def make_sets(args):
    """Write the sets -> their folders."""
    test, train = read_split(args.real, "test"), read_split(args.real, f"train_{args.fold}")
    count = min(len(test), len(read_split(args.real, f"val_{args.fold}")), len(train))
    other = read_split(args.other, "test") if args.other else None
    if other is not None and len(other) < count:
        raise UserError(f"--other {args.other}: has {len(other)} test images, expected at least {count}")
    sources = {"independent": (test, lambda image, g: image), "blurred": (test, blur), "noisy": (test, noise),
               "copies": (train, lambda image, g: image)}
    if other is not None:
        sources["other"] = (other, lambda image, g: image)
    return [write_set(args, name, split, count, change) for name, (split, change) in sources.items()]


def write_set(args, name, split, count, change):
    folder = args.output / "sets" / name
    make_folder(folder / "gen_samples_val", "--output")
    chosen = torch.randperm(len(split), generator=generator(args.global_seed, "check", split.path.name))[:count]
    names = [f"gen_samples_val/{i:06d}.png" for i in range(count)]
    for file, i in zip(names, chosen.tolist(), strict=True):
        image = Image.fromarray(load_image(split.image_paths[i], args.image_size))
        change(image, generator(args.global_seed, "check", name, i)).save(folder / file)
    known = read_split(args.real, f"val_{args.fold}").label_names
    labels = split.labels[chosen.numpy()] if split.label_names == known else np.zeros((count, len(known)))
    write_split(folder, f"val_syn_{args.fold}", names, labels, known, names)
    return folder


def blur(image, _):
    return image.filter(ImageFilter.GaussianBlur(BLUR * image.width))


def noise(image, draw):
    pixels = np.asarray(image, np.float32)
    grey = torch.randn(pixels.shape[:2], generator=draw).numpy()[:, :, None]  # as a camera's, not coloured
    return Image.fromarray((pixels + NOISE * grey).round().clip(0, 255).astype(np.uint8))


def promises(rows):
    """What must be seen -> whether it is. rows: name of the set -> its row in results.json."""
    space = next(iter(rows["independent"]["kid"]))

    def kid(name):
        return rows[name]["kid"][space]["value"]

    independent, copies = rows["independent"], rows["copies"]
    noise_of_kid = 3 * independent["kid"][space]["standard_error"]
    found = {
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
        found |= {"KID of another modality is the largest": kid("other") == max(map(kid, rows)),
                  "precision of another modality is near 0": rows["other"]["fidelity"][space]["precision"] < 0.1}
    if independent["lpips"]:
        def lpips(name):
            return rows[name]["lpips"]["mean"]

        found["LPIPS diversity: blurred < independent < noisy"] = (
            lpips("blurred") < lpips("independent") < lpips("noisy"))
    return found


def promise(name, value):
    print(f"{'kept  ' if value else 'BROKEN'}  {name}")
    return value


def parser():
    p = Parser(__doc__)
    p.add_argument("--real", type=Path, required=True, metavar="ROOT", help="data root with a test.csv")
    p.add_argument("--other", type=Path, metavar="ROOT", help="data root of another modality")
    p.add_argument("--fold", type=integer(0), default=0, help="whose images are the training and validation images")
    p.add_argument("--image-size", type=integer(8, 2048), default=256, help="side of the images, in pixels")
    p.add_argument("--features", default="inception", metavar="NAME", help="feature space, as of evaluate.py")
    p.add_argument("--lpips", default="alex", metavar="NET", help="alex or none, as of evaluate.py")
    p.add_argument("--global-seed", type=integer(0), default=0, help="seed of choices and noise")
    p.add_argument("--output", type=Path, required=True, metavar="DIR", help="for the sets and the results")
    return p


if __name__ == "__main__":
    run(main)
