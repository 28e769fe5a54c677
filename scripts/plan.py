"""Every command of Table 1 or 2 for a data root, in order: run them, or with --dry-run only print them.

    scripts/table1.sh --data data/oct --output runs/oct --dry-run
    scripts/table2.sh --data data/oct --output runs/oct \\
        --launch "accelerate launch --multi_gpu --num_processes 4 --mixed_precision fp16" \\
        --sample-launch "torchrun --nproc_per_node=4"

Table 1: for each fold extract latents, train each model, sample with the validation labels, evaluate all together.
Table 2: the same latents and models, five images for the labels of each training image, classifiers with and without
them. Both may share an --output, and then share what they have in common. Defaults are the paper's settings. The same
command goes on where it stopped: finished steps are noted in OUTPUT/done, and every script continues its own work.
Hours in the plan come from measurements alone: logs of this --output, or else --throughput.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from classification.data import folds_of
from classification.output import check
from classification.synthetic import csv_files
from core import claims
from core.cli import Parser, integer, run
from core.errors import UserError
from core.files import file_hash, make_folder, write_text
from core.runtime import AGAIN
from dataset import outside
from dataset.root import read_split
from diffusion.samplers import SAMPLERS
from models import MODELS
from presets import PRESETS, presets_of
from scripts.throughput import Throughput

ROOT = Path(__file__).resolve().parent.parent
KINDS = {1: ("extract", "train", "sample", "evaluate", "table"),
         2: ("extract", "train", "sample", "baseline", "classify", "table")}
EXTRA = ("train", "sample", "classify")  # scripts that may be given further flags
BASELINES = {"baseline": "geometric", "baseline-without-augmentation": "none"}  # method -> --augment
REPEAT_SECONDS = 10  # between two SIGUSR1 to a command that goes on
NOT_SETTINGS = ("data", "output", "folds", "models", "only", "launch", "sample_launch", "throughput", "dry_run",
                "table")  # of these, a continued plan may have others


@dataclass(frozen=True)
class Step:
    """A command; `work` is what it does in units that have a throughput: (task, model, number), or None."""

    kind: str
    name: str
    command: str
    work: tuple | None = None


class Plan:
    """The steps of a table. Everything lies below --output: features, train, synthetic, evaluate, classify, tables."""

    def __init__(self, args):
        self.args, self.out = args, args.output
        known = folds_of(args.data, "all")
        unknown = [fold for fold in args.folds or () if fold not in known]
        if unknown:
            raise UserError(f"--folds {unknown[0]}: {args.data} has the folds {' '.join(map(str, known))}")
        self.folds = [fold for fold in known if not args.folds or fold in args.folds]
        self.whole = self.folds == known
        self.counts = {(name, k): len(read_split(args.data, f"{name}_{k}")) for name in ("train", "val")
                       for k in self.folds}

    def steps(self):
        parts = {"extract": self.extract, "train": self.train, "sample": self.sample, "evaluate": self.evaluate,
                 "baseline": self.baseline, "classify": self.classify, "table": self.table}
        return [step for kind in KINDS[self.args.table] if not self.args.only or kind in self.args.only
                for step in parts[kind]()]

    # ---- the parts, each a list of steps

    def extract(self):
        return [Step("extract", f"extract-{k}", self.command(
            self.args.sample_launch, "extract_features.py", "--data-path", self.args.data, "--features-path",
            self.out / "features", "--fold", k, *self.space())) for k in self.folds]

    def train(self):
        a = self.args
        return [Step("train", f"train-{plain(model)}-{k}", self.command(
            a.launch, "train.py", *self.preset(model), "--model", model, "--data-path", a.data, "--feature-path",
            self.out / "features", "--fold", k, *self.space(), "--epochs", a.epochs, "--global-batch-size", a.batch,
            "--validate-every", a.validate_every, "--results-dir", self.runs(model, k)) + more(a.extra_train),
            ("train", model, a.epochs * self.counts["train", k])) for k in self.folds for model in a.models]

    def sample(self):
        a, table1 = self.args, self.args.table == 1
        script, name, ratio = ("sample_ddp_val.py", "val", 1) if table1 else ("sample_ddp.py", "train", a.expand)
        return [Step("sample", f"sample-{name}-{plain(model)}-{k}", self.command(
            a.sample_launch, script, *self.preset(model), "--ckpt",
            self.runs(model, k) / f"000-{plain(model)}-{k}/checkpoints/best_ckpt.pt", "--data-path", a.data, "--fold",
            k, "--expand-ratio", ratio, "--num-sampling-steps", a.steps, "--sampler", a.sampler, "--sample-dir",
            self.out / "synthetic" / plain(model)) + more(a.extra_sample),
            ("guided", model, ratio * a.steps * self.counts[name, k])) for k in self.folds for model in a.models]

    def evaluate(self):
        a = self.args
        features = ["--features", *a.features] if a.features else []
        return [Step("evaluate", f"evaluate-{k}", self.command(
            "python", "evaluate.py", "--real", a.data, "--fold", k, *features, "--lpips",
            a.lpips, "--output", self.out / "evaluate" / f"fold-{k}", "--gen") + "".join(
                f" {shlex.quote(str(self.out / 'synthetic' / plain(model)))}/*-GS-fold-{k}-*" for model in a.models))
            for k in self.folds]

    def baseline(self):
        """Real images alone, with and without augmentation; the second is compared with the first."""
        return [step for method, augment in BASELINES.items() for step in self.classifier(
            "baseline", method, ["--augment", augment], compared=method != "baseline")]

    def classify(self):
        return [step for model in self.args.models for step in self.classifier(
            "classify", plain(model), ["--synthetic", self.out / "synthetic" / plain(model)], 1 + self.args.expand)]

    def classifier(self, kind, method, flags, times=1, compared=True):
        """All folds in one command or, where they are not all that there are, one by one; the last one is compared."""
        a, folds = self.args, ["all"] if self.whole else self.folds
        baseline = ["--baseline", self.out / "classify" / "baseline"] if compared else []
        return [Step(kind, f"{kind}-{method}-{k}", self.command(
            a.launch, "classify.py", "--data-path", a.data, "--fold", k, "--method", method, *flags,
            *(baseline if k == folds[-1] else []), "--backbone", a.backbone, "--image-size", a.classify_size,
            "--epochs", a.classify_epochs, "--output", self.out / "classify" / method) + more(a.extra_classify),
            ("classify", None, a.classify_epochs * times * sum(
                self.counts["train", f] for f in (self.folds if self.whole else [k])))) for k in folds]

    def table(self):
        results = self.out / ("evaluate" if self.args.table == 1 else "classify")
        return [Step("table", f"table{self.args.table}", self.command(
            "python", "make_tables.py", results, "--output", self.out / "tables"))]

    # ---- what they share

    def command(self, launch, script, *words):
        """A line of shell; paths are as seen from the repository."""
        allowed = outside.flags() if script != "make_tables.py" else []  # which reads no data root
        return f"{launch} " + " ".join(shlex.quote(str(word)) for word in (script, *allowed, *words))

    def preset(self, model):
        if not self.args.model_preset:
            return []
        name = f"{self.args.model_preset}-{plain(model).lower()}"
        if name not in PRESETS:
            raise UserError(f"--model-preset {self.args.model_preset}: there is no preset {name} for --models {model}; "
                            f"there are {', '.join(p for p in PRESETS if p.startswith(f'{self.args.model_preset}-'))}")
        return ["--preset", name]

    def space(self):
        return "--image-size", self.args.image_size, "--vae", self.args.vae

    def runs(self, model, fold):
        """A --results-dir of its own for each run, so that the run in it is number 000."""
        return self.out / "train" / f"{plain(model)}-fold-{fold}"


def plain(model):
    return model.replace("/", "-")


def more(flags):
    return f" {flags}" if flags else ""


def seen_from_root(path):
    """The path as the commands write it, which run in the repository."""
    path = Path(path).resolve()
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) and path != ROOT else path


def main():
    before = dict(os.environ)
    args = parser().parse_args()
    exported = {name: value for name, value in os.environ.items() if before.get(name) != value}  # by --assets
    args.output = args.output or Path("runs") / f"tables-{args.data.resolve().name}"
    args.data, args.output = seen_from_root(args.data), seen_from_root(args.output)
    for name in ("vae", "throughput"):  # a name, or a path
        if getattr(args, name) and Path(getattr(args, name)).exists():
            setattr(args, name, str(seen_from_root(getattr(args, name))))
    args.features = [str(seen_from_root(f)) if Path(f).exists() else f for f in args.features or ()]
    os.chdir(ROOT)
    steps = Plan(args).steps()
    settings = {key: value for key, value in sorted(vars(args).items()) if key not in NOT_SETTINGS}
    settings["csv_files"] = {path.name: file_hash(path) for path in csv_files(args.data)}
    check(args.output, settings, parser().defaults())
    if args.dry_run:
        print(written(steps, args, exported))
        return
    make_folder(args.output / "done", "--output")
    claims.write_settings(args.output, settings)
    for number, step in enumerate(steps, 1):
        print(f"\n== {number} of {len(steps)}: {step.name}", flush=True)
        if is_done(step, args.output):
            print("done already")
        else:
            execute(step, args.output)


def stamp(step, output):
    return output / "done" / step.name


def is_done(step, output):
    """Has this very command ended well? Tables are cheap and always made."""
    file = stamp(step, output)
    return step.kind != "table" and file.is_file() and file.read_text() == step.command + "\n"


def execute(step, output):
    """Run a command; note that it is done, or end this program: with its exit code, AGAIN after SIGTERM or SIGUSR1."""
    print(step.command, flush=True)
    places = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # `python` is this one
    child, asked = None, []

    def hand_on(kind, frame):
        asked.append(kind)
        if child and kind != signal.SIGINT:  # the terminal has told the child too, which saves its work
            child.send_signal(kind)

    # Before the child starts: a signal that comes while it does is kept for it, and does not end this program.
    before = {kind: signal.signal(kind, hand_on) for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    child = subprocess.Popen(["bash", "-c", step.command], env={**os.environ, "PATH": places})
    for kind in set(asked) - {signal.SIGINT}:
        child.send_signal(kind)
    code = wait(child, asked)
    for kind, handler in before.items():
        signal.signal(kind, handler)
    if not code:
        write_text(stamp(step, output), step.command + "\n")
    if code or asked:
        print(f"{called()}: {step.name} ended with exit code {code}; the same command goes on from there",
              file=sys.stderr)
        if asked:  # whatever a launcher made of the exit code
            sys.exit(130 if signal.SIGINT in asked else AGAIN)
        sys.exit(code if code > 0 else 128 - code)


def wait(child, asked):
    """The exit code of a command. SIGUSR1, once in `asked`, is repeated: processes that still start may miss it."""
    while True:
        try:
            return child.wait(REPEAT_SECONDS)
        except subprocess.TimeoutExpired:
            if signal.SIGUSR1 in asked:
                child.send_signal(signal.SIGUSR1)


def written(steps, args, exported):
    """The plan as a shell script, with an estimate for each command."""
    flags = {"train": f"{args.launch} {args.extra_train}", "guided": args.extra_sample}
    throughput, sums, lines = Throughput(args.output, args.throughput, cells_of(args), flags), {}, []
    for number, step in enumerate(steps, 1):
        done, estimate = is_done(step, args.output), throughput.hours(step.work)
        if estimate and not done:
            sums[estimate.unit] = sums.get(estimate.unit, 0) + estimate.hours
        lines += ["", f"# {number} {step.name}: {'done' if done else estimate or 'not measured'}", step.command]
    total = ", ".join(f"{hours:.2f} {unit}" for unit, hours in sums.items()) or "nothing is measured"
    exports = [f"export {name}={shlex.quote(value)}" for name, value in exported.items()]
    return "\n".join([f"# Table {args.table}: {len(steps)} commands. Measured steps to come: {total}", "set -e",
                      f"cd {shlex.quote(str(ROOT))}", *exports, *lines])


def cells_of(args):
    """Cells per side that a denoiser works on here; None where the autoencoder does not say."""
    from dataset.vae import NAMED

    return args.image_size // 8 if args.vae in NAMED else None


class PlanParser(Parser):
    """With flags of other scripts as values: `--extra-train "--lr 1e-4"`, which argparse would take for a flag."""

    def parse_known_args(self, args=None, namespace=None):
        words, joined = list(sys.argv[1:] if args is None else args), []
        while words:
            word = words.pop(0)
            quoted = word.replace("_", "-") in (f"--extra-{name}" for name in EXTRA) and words
            joined.append(f"{word}={words.pop(0)}" if quoted else word)
        return super().parse_known_args(joined, namespace)


def called():
    """The script that a user has called: table1.sh and table2.sh start this one with the number of their table."""
    return f"table{sys.argv[1]}.sh" if sys.argv[1:2] in (["1"], ["2"]) else Path(__file__).name


def parser():
    p = PlanParser(__doc__, presets=presets_of("table"), own_dry_run=True, prog=called())
    p.add_argument("table", type=int, choices=(1, 2), help=argparse.SUPPRESS)  # table1.sh and table2.sh say it
    p.add_argument("--data", type=Path, required=True, metavar="ROOT", help="data root of prepare_data.py")
    outside.add_flag(p)
    p.add_argument("--output", type=Path, metavar="DIR", help="for everything (default: runs/tables-ROOT)")
    p.add_argument("--folds", type=fold_list, metavar='"0 1 ..."', help="which folds (default: all that there are)")
    p.add_argument("--models", type=model_list, metavar='"NAME ..."',
                   help="which generators")
    p.add_argument("--only", nargs="+", choices=sorted({*KINDS[1], *KINDS[2]}), metavar="STEP",
                   help=f"steps of these kinds alone: {' '.join(dict.fromkeys([*KINDS[1], *KINDS[2]]))}")
    p.add_argument("--dry-run", action="store_true", help="print the plan, a shell script with an estimate for each "
                   "command, and do nothing")
    p.add_argument("--throughput", type=Path, metavar="FILE", help="measured with benchmarks/bench.py --json FILE, on "
                   "one device and the grid of this plan")
    g = p.add_argument_group("generators")
    g.add_argument("--model-preset", metavar="NAME", help="train and sample model M with --preset NAME-m; what is "
                   "given here comes first")
    g.add_argument("--image-size", type=integer(8, 2048), help="pixels")
    g.add_argument("--vae", help="ema, mse, retina, retina-2 or a folder")
    g.add_argument("--epochs", type=integer(1), help="of train.py")
    g.add_argument("--batch", type=integer(1), help="images per training step over all processes")
    g.add_argument("--validate-every", type=integer(1), metavar="EPOCHS", help="of train.py")
    g.add_argument("--steps", type=integer(1, 1000), help="sampling steps")
    g.add_argument("--sampler", choices=SAMPLERS, help="ancestral, DDIM or DPM-Solver++(2M)")
    g = p.add_argument_group("scores")
    g.add_argument("--features", nargs="+", metavar="NAME", help="feature spaces of KID (default: inception, and dino "
                   "for GG)")
    g.add_argument("--lpips", default="alex", metavar="NET", help="alex, alex=FILE or none")
    g.add_argument("--expand", type=integer(1), help="synthetic images per training image, for Table 2")
    g.add_argument("--backbone", help="of the classifier, any timm model")
    g.add_argument("--classify-size", type=integer(8, 2048), help="pixels of the classifier")
    g.add_argument("--classify-epochs", type=integer(1), help="of the classifier, at most")
    g = p.add_argument_group("machine")
    g.add_argument("--launch", default="python", help="starts train.py and classify.py: accelerate launch ...")
    g.add_argument("--sample-launch", default="python", help="starts extraction and sampling: torchrun ...")
    for name in EXTRA:
        g.add_argument(f"--extra-{name}", default="", metavar='"FLAGS"', help=f"further flags of every {name} command")
    p.set_defaults(**presets_of("table")["paper"].settings)
    return p


def fold_list(text):
    """An argparse type: "0 1 2"."""
    return [integer(0)(word) for word in text.split()]


def model_list(text):
    """An argparse type: names of models."""
    names = text.split()
    if not names or not set(names) <= set(MODELS):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected some of {', '.join(MODELS)}")
    return names


if __name__ == "__main__":
    run(main, name=called())
