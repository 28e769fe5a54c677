"""Study of learning: each model at several learning rates and schedules, and what else may help; docs/LEARNING.md.

    python scripts/study_learning.py --data data/oct --output runs/learning --dry-run     one command per row, printed
    python scripts/study_learning.py --data data/oct --output runs/learning               run what is missing
    python scripts/study_learning.py --data data/oct --output runs/learning --only GeCA-XS

Every arm trains from random weights on the same images, diffusion steps and noise, and is then sampled with the labels
of all validation images. OUTPUT/points.jsonl gets a line per arm, training seed, way of sampling and sampling seed:
KID of the samples against the validation images, the squared error of ε on validation images in five bins of the
diffusion step, seconds per training step. The same command goes on where it stopped; what is in points.jsonl already
is not measured again.
"""

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core.cli import Parser, integer, run  # noqa: E402
from core.errors import UserError  # noqa: E402
from core.files import make_folder, read_jsonl  # noqa: E402
from core.random import generator  # noqa: E402
from core.runs import METRICS  # noqa: E402
from core.schema import Number  # noqa: E402
from dataset import outside  # noqa: E402
from dataset.images import load_images  # noqa: E402
from dataset.root import read_split  # noqa: E402
from dataset.vae import cells_per_side, open_codec  # noqa: E402
from diffusion import create_diffusion  # noqa: E402
from evaluation.features import open_features  # noqa: E402
from generation import checkpoint as checkpoints  # noqa: E402
from generation.sampling import SamplingOptions, sample_images  # noqa: E402
from metrics.kid import polynomial_mmd  # noqa: E402

BATCH, SIZE = 32, 64
DRAWS = 3  # of noise and diffusion step, per validation image, for the held-out error
BINS = 5
POINT = {"model": str, "steps": Number(), "arm": str, "seed": Number(), "way": str, "sampling_seed": Number(),
         "kid": float, "error": float, "seconds_per_step": float, "error_by_t": [float]}  # schema of a line

@dataclass(frozen=True)
class Arm:
    """One way of training: a row of the study."""

    name: str
    model: str
    flags: tuple
    steps: int = 720
    seeds: int = 1


def rate(lr, schedule="linear", optimizer="adamw"):
    """A learning rate with warm-up, decay to 0 and clipping."""
    return ("--optimizer", optimizer, "--lr", lr, "--lr-schedule", schedule, "--warmup", "50", "--clip-norm", "1")


MODELS = ("GeCA-XS", "DiT-S", "LDM-B")
RATES = {"adamw": ("3e-4", "1e-3", "2e-3", "4e-3"), "muon": ("1e-3", "2e-3", "4e-3", "8e-3")}
ADAMW = {"GeCA-XS": "2e-3", "DiT-S": "1e-3", "LDM-B": "1e-3"}  # best learning rates of part 1, by held-out error
MUON = {"GeCA-XS": "4e-3", "DiT-S": "4e-3", "LDM-B": "2e-3"}


def heredity(p, lr="2e-3"):
    return Arm(f"GeCA-XS {lr} heredity {p}", "GeCA-XS", (*rate(lr), "--train-heredity", p))


ARMS = [
    # 1: optimiser, learning rate and schedule, the same grid for every model
    *(Arm(f"{model} 3e-4 constant", model, ("--lr", "3e-4")) for model in MODELS),
    *(Arm(f"{model} {lr} linear", model, rate(lr)) for lr in RATES["adamw"] for model in MODELS),
    *(Arm(f"{model} muon {lr} linear", model, rate(lr, optimizer="muon"), seeds=2 if lr == MUON[model] else 1)
      for lr in RATES["muon"] for model in MODELS),
    *(Arm(f"{model} {lr} cosine", model, rate(lr, "cosine")) for model, lr in ADAMW.items()),
    # 2: what else may help, at each model's best rate
    *(Arm(f"{model} {lr} min-snr", model, (*rate(lr), "--min-snr", "5")) for model, lr in ADAMW.items()),
    heredity("0.5"), heredity("0.9"),
    Arm("GeCA-XS 2e-3 betas 0.99", "GeCA-XS", (*rate("2e-3"), "--adam-betas", "0.9", "0.99")),
    # the one-dimensional position code as published, above, against rows and columns (docs/GROWTH.md)
    *(Arm("GeCA-XS muon 4e-3 linear position 2d", "GeCA-XS", (*rate("4e-3", optimizer="muon"), "--position-code", "2d"),
          steps, seeds) for steps, seeds in ((720, 2), (2160, 1))),
    # 3: longer, with the best of part 1; the comparison of docs/COMPARISON.md
    *(Arm(f"{model} muon {lr} linear", model, rate(lr, optimizer="muon"), steps, seeds)
      for steps, seeds in ((234, 2), (2160, 2), (5760, 1)) for model, lr in MUON.items()),
]
WAYS = {"published": {}, "none": {"heredity": "none"}, "below 550": {"heredity": "below:550"},
        "published, shared fire": {"shared_fire": True}, "none, shared fire": {"heredity": "none", "shared_fire": True}}
ALL_WAYS = ("GeCA-XS 3e-4 constant", "GeCA-XS 2e-3 linear", "GeCA-XS 2e-3 heredity 0.5")
SAMPLING_SEEDS = (0, 1)


def training_command(arm, seed, options):
    """train.py for an arm and a training seed; the number of epochs is that which gives its steps."""
    epochs = arm.steps // (options.images // BATCH)
    return ["train.py", *outside.flags(), "--model", arm.model, "--data-path", options.data, "--feature-path",
            options.output / "latents", "--fold", options.fold, "--image-size", SIZE, "--vae", "retina",
            "--global-batch-size", BATCH, *arm.flags, "--ema-decay", 0.999, "--epochs", epochs, "--global-seed", seed,
            "--val-samples", 24, "--sampler", "ddim", "--num-sampling-steps", 25, "--log-every", 90, "--ckpt-every",
            500, "--no-checkpoint-steps", "--results-dir", run_folder(arm, seed, options)]


def run_folder(arm, seed, options):
    return options.output / "train" / f"{arm.name.replace(' ', '-')}-{arm.steps}-seed-{seed}"


def checkpoint_of(arm, seed, options):
    return next(run_folder(arm, seed, options).glob("000-*/checkpoints/last_ckpt.pt"), None)


@dataclass(frozen=True)
class Options:
    """Where the study lies and what it is made on."""

    data: Path
    output: Path
    fold: int
    images: int  # training images


class Study:
    """Measures trained arms; what needs the data is opened once."""

    def __init__(self, options):
        self.options, self.device = options, "cpu"
        self.split = read_split(options.data, f"val_{options.fold}")
        self.codec = open_codec("retina")
        self.cells = cells_per_side(SIZE, self.codec)
        self.features = open_features("retina", self.device)
        images = load_images(self.split.paths, SIZE)
        self.real = self.features(images)
        self.labels = torch.as_tensor(self.split.labels)
        moments = self.codec.moments(torch.as_tensor(images))
        self.latents = moments[0]  # (n, C, h, w): posterior means

    def score(self, model, sampling):
        """KID × 1e-3 of one sample per validation image against all validation images."""
        ids = list(range(len(self.labels)))
        images = np.concatenate([made for _, made in sample_images(model, self.codec, self.labels, ids, self.cells,
                                                                   sampling, self.device)])
        return 1e3 * float(polynomial_mmd(self.real, self.features(images)))

    def held_out_error(self, model):
        """What the function says, on the validation images."""
        return held_out_error(model, self.latents, self.labels)


@torch.no_grad()
def held_out_error(model, latents, labels):
    """Mean squared error of ε on latents (n, C, h, w), over DRAWS draws: (all, list of five bins of t)."""
    diffusion, errors, steps = create_diffusion(), [], []
    for draw in range(DRAWS):
        generators = [generator(0, "held out", draw, i) for i in range(len(latents))]
        t = torch.stack([torch.randint(1000, (), generator=g) for g in generators])
        noise = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in generators])
        for part in torch.arange(len(t)).split(64):
            life = [generators[i] for i in part.tolist()]
            losses = diffusion.training_losses(
                lambda x, t, part=part, life=life: model(x, t, labels[part], None, life)[0],
                latents[part], t[part], noise[part])
            errors.append(losses["mse"])
        steps.append(t)
    errors, bins = torch.cat(errors), torch.cat(steps) * BINS // 1000
    return errors.mean().item(), [errors[bins == i].mean().item() for i in range(BINS)]


def ways_of(arm):
    """The ways an arm is sampled: only the automaton has a choice, and all are tried on a few arms."""
    names = list(WAYS) if arm.name in ALL_WAYS else ["published", "none"]
    return {name: WAYS[name] for name in names} if arm.model.startswith("GeCA") else {"published": {}}


def measure(study, arm, seed, missing):
    """Lines of points.jsonl for the `missing` (way, sampling seed) of a trained arm."""
    file = checkpoint_of(arm, seed, study.options)
    model = checkpoints.build(checkpoints.load(file))
    error, bins = study.held_out_error(model)
    logged = read_jsonl(file.parents[1] / "metrics.jsonl", "remove the run", METRICS)
    losses = [row["loss"] for row in logged if "loss" in row]
    speed = [row["steps_per_second"] for row in logged if "steps_per_second" in row]
    for way, sampling_seed in missing:
        sampling = SamplingOptions(steps=25, sampler="ddim", seed=sampling_seed, batch_size=74, **ways_of(arm)[way])
        yield {"arm": arm.name, "model": arm.model, "steps": arm.steps, "flags": list(arm.flags), "seed": seed,
               "way": way, "sampling_seed": sampling_seed, "kid": study.score(model, sampling),
               "loss": float(np.mean(losses[-2:])), "error": error, "error_by_t": bins,
               "seconds_per_step": float(1 / np.median(speed))}


def main():
    args = parser().parse_args()
    images = len(read_split(args.data, f"train_{args.fold}"))
    if images < BATCH:
        raise UserError(f"--data {args.data}: train_{args.fold} has {images} images, expected at least {BATCH}")
    options = Options(args.data, args.output, args.fold, images)
    arms = [arm for arm in ARMS if not args.only or any(word in f"{arm.name} {arm.steps}" for word in args.only)]
    if not arms:
        raise UserError(f"--only {' '.join(args.only)}: fits no arm; there are {', '.join(a.name for a in ARMS)}")
    commands = [(arm, seed, training_command(arm, seed, options)) for arm in arms for seed in range(arm.seeds)]
    if args.dry_run:
        print("\n".join(shlex.join(map(str, ["python", *command])) for _, _, command in commands))
        return
    make_folder(args.output, "--output")
    call(["extract_features.py", *outside.flags(), "--data-path", args.data, "--features-path",
          args.output / "latents", "--fold", args.fold, "--image-size", SIZE, "--vae", "retina"])
    file, study = args.output / "points.jsonl", Study(options)
    for arm, seed, command in commands:
        known = {(row["way"], row["sampling_seed"]) for row in read_rows(file)
                 if (row["arm"], row["steps"], row["seed"]) == (arm.name, arm.steps, seed)}
        missing = [(way, s) for way in ways_of(arm) for s in SAMPLING_SEEDS if (way, s) not in known]
        if not missing:
            continue
        call(command)
        for row in measure(study, arm, seed, missing):
            append_row(file, row)
            print(f"{arm.name}, {arm.steps} steps, seed {seed}, {row['way']}: KID {row['kid']:.0f}e-3, held-out error "
                  f"{row['error']:.4f}", flush=True)


def call(command):
    """Run a script of the project. Raises UserError where it fails."""
    if subprocess.run([sys.executable, *map(str, command)], cwd=ROOT).returncode:
        raise UserError(f"{command[0]}: failed, see above; the same command goes on from here")


def read_rows(file):
    return read_jsonl(file, "remove it and measure again", POINT) if file.is_file() else []


def append_row(file, row):
    """Add a line; several studies may write to one file."""
    with open(file, "a", encoding="utf-8") as lines:
        lines.write(json.dumps(row) + "\n")


def parser():
    p = Parser(__doc__)
    p.add_argument("--data", type=Path, required=True, metavar="ROOT", help="data root")
    outside.add_flag(p)
    p.add_argument("--output", type=Path, required=True, metavar="DIR", help="for runs and points.jsonl")
    p.add_argument("--fold", type=integer(0), default=0, help="train on train_{fold}, score against val_{fold}")
    p.add_argument("--only", nargs="+", metavar="WORD", help="arms whose name and number of steps contain one of these")
    p.add_argument("--dry-run", action="store_true", help="print the commands and exit")
    return p


if __name__ == "__main__":
    run(main)
