"""A check that can fail: do synthetic images help a classifier where they must, and not where they cannot?

    python scripts/check_synthetic.py --output runs/check-synthetic

Phantoms, of which few are there to train with. A perfect generator, the phantom drawer itself, makes five new images
for the labels of each training image: scores must rise. The same images with their labels dealt anew, so that all
frequencies stay, must not help. All rows take the same number of steps, so no gain comes from longer training.
Prints one row for each set; exit code 1 where a perfect generator does not help, or shuffled labels help as well.
The same command continues a stopped check.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.claims import built_whole
from core.cli import Parser, integer, run
from core.errors import UserError
from core.files import write_text
from core.random import generator
from core.text import aligned, p_is, p_value
from dataset.root import read_split, write_split
from dataset.sources.phantom import draw_scan
from evaluation.results import read

ROOT = Path(__file__).resolve().parent.parent
SIZE, FOLDS, EXPAND = 64, 2, 5
TEST = 0.8  # share of the images: few to train with, many to tell a difference with
SMALL = ("--backbone", "test_resnet.r160_in1k", "--no-pretrained", "--image-size", SIZE, "--optimizer", "adamw", "--lr",
         "1e-3", "--global-batch-size", 32, "--steps-per-epoch", 20, "--epochs", 10)
SHARE = 0.5  # of the gain of the perfect generator, is more than shuffled labels may gain
P = 0.05


def main():
    args = parser().parse_args()
    data, rows = args.output / "data", []
    if not (data / "test.csv").is_file():
        script("prepare_data.py", "--source", "phantom", "--count", args.count, "--image-size", SIZE, "--folds", FOLDS,
               "--test-fraction", TEST, "--global-seed", args.global_seed, "--output", data)
    for fold in range(FOLDS):
        make_synthetic(data, fold, args.output, args.global_seed)
    for seed in range(args.seeds):
        runs = {name: args.output / f"classify-{seed}" / name for name in ("real", "perfect", "shuffled")}
        for name, folder in runs.items():
            more = [] if name == "real" else ["--synthetic", args.output / name, "--baseline", runs["real"]]
            script("classify.py", "--data-path", data, *more, *SMALL, "--method", name, "--global-seed", seed,
                   "--output", folder)
            rows.append({"seed": seed, **row_of(read([folder / "results.json"])[0])})
    print(table(rows))
    wrong = verdict(rows)
    print("\n".join(wrong) or "as it must be: the perfect generator helps, shuffled labels do not")
    sys.exit(1 if wrong else 0)


def script(name, *arguments):
    """Run a script of the repository; a failure ends this one too."""
    command = [sys.executable, str(ROOT / name), *map(str, arguments)]
    print("python", name, *command[2:], flush=True)
    if subprocess.run(command, cwd=Path.cwd()).returncode:
        raise UserError(f"{name}: failed, see above; the same command goes on from there")


def make_synthetic(data, fold, output, seed):
    """Sample folders as classify.py takes them: OUTPUT/perfect/fold-K, and OUTPUT/shuffled/fold-K with its images."""
    split = read_split(data, f"train_{fold}")
    labels = np.tile(split.labels, (EXPAND, 1))
    names = [f"images/{i:05d}.png" for i in range(len(labels))]
    order = torch.randperm(len(labels), generator=generator(seed, "shuffled", fold)).numpy()
    for kind, shown in (("perfect", labels), ("shuffled", labels[order])):
        folder = output / kind / f"fold-{fold}"
        if folder.is_dir():
            continue
        folder.parent.mkdir(exist_ok=True)
        with built_whole(folder) as made:
            if kind == "perfect":
                draw(made, names, labels, split.label_names, (seed, fold))
            else:  # the same files
                shutil.copytree(output / "perfect" / folder.name / "images", made / "images", copy_function=os.link)
            write_text(made / "settings.json", json.dumps({"about": {"model": kind}}) + "\n")
            write_split(made, f"train_syn_{fold}", names, shown, split.label_names, [f"syn_{i}" for i in
                                                                                    range(len(names))])


def draw(folder, names, labels, label_names, seed):
    """One new eye for each row of labels; every other one is a left eye, which is a mirrored right one."""
    (folder / "images").mkdir()
    for i, (name, row) in enumerate(zip(names, labels, strict=True)):
        shown = {label_names[k] for k in np.flatnonzero(row)}
        image = Image.fromarray(draw_scan(shown, (*seed, i, 7), 0, SIZE))  # four numbers: no eye of the data has four
        (ImageOps.mirror(image) if i % 2 else image).save(folder / name)


def row_of(results):
    """What the table shows of a results.json, at image level: means over folds, and the test against real images."""
    mean = {score: results["summary"]["image"]["0.5"][score]["mean"] for score in ("ap", "auc", "f1_sen_spe")}
    folds = results["folds"].values()
    row = {"method": results["method"], "images": sum(f["n_train"] + f["n_synthetic"] for f in folds) // len(folds)}
    if results["significance"]:
        test = results["significance"]["levels"]["image"]["permutation"]["ap"]
        row |= {"gain": test["difference"], "p": test["p"], "stars": test["stars"]}
    return row | mean


def table(rows):
    """One line for each set of images; scores in per cent."""
    lines = [["seed", "training set", "images", "mAP", "AUC", "F1(sen/spe)", "gain of mAP", "p"]]
    for row in rows:
        test = ["–", "–"]
        if "gain" in row:
            test = [f"{100 * row['gain']:+.2f}", f"{p_value(row['p'])} {row['stars']}".strip()]
        lines.append([str(row["seed"]), row["method"], str(row["images"]),
                      *(f"{100 * row[score]:.2f}" for score in ("ap", "auc", "f1_sen_spe")), *test])
    return aligned(lines, left=2)


def verdict(rows):
    """What is not as it must be, one line each; for every seed."""
    wrong = []
    for seed in sorted({row["seed"] for row in rows}):
        perfect, shuffled = (next(r for r in rows if r["seed"] == seed and r["method"] == name)
                             for name in ("perfect", "shuffled"))
        if perfect["gain"] <= 0 or perfect["p"] >= P:
            wrong.append(f"seed {seed}: the perfect generator does not help: {100 * perfect['gain']:+.2f}, "
                         f"{p_is(perfect['p'])}")
        if shuffled["gain"] > 0 and (shuffled["p"] < P or shuffled["gain"] >= SHARE * perfect["gain"]):
            wrong.append(f"seed {seed}: shuffled labels help: {100 * shuffled['gain']:+.2f}, {p_is(shuffled['p'])}")
    return wrong


def parser():
    p = Parser(__doc__)
    p.add_argument("--output", type=Path, default=Path("runs/check-synthetic"), metavar="DIR", help="for everything")
    p.add_argument("--count", type=integer(100), default=320, help="phantoms; a tenth of them train in each fold")
    p.add_argument("--seeds", type=integer(1), default=1, help="how many seeds of the classifier, each a check")
    p.add_argument("--global-seed", type=integer(0), default=0, help="seed of the phantoms")
    return p


if __name__ == "__main__":
    run(main)
