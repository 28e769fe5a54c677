"""Train a classifier on real and generated images and test it once: one row of the paper's Table 2.

    python classify.py --data-path data/oct --fold all --output results_classify/baseline
    python classify.py --data-path data/oct --fold all --synthetic synthetic_oct --baseline results_classify/baseline
    accelerate launch --multi_gpu --num_processes 4 --mixed_precision bf16 classify.py --data-path data/oct ...

`--synthetic`: a folder of sample_ddp.py, or a folder that holds one for each fold. An epoch shows all real and
generated images once, as in the paper: with five times as many generated images it has six times as many updates. Only
`--steps-per-epoch N`, the same N for all rows, can tell whether a gain comes from the images or from the updates; it
also gives all rows the same schedule. The network is chosen by the mAP of the validation images; the images of test.csv
are opened once for each fold, at the end.
Several processes train as one does: what is dropped of an image depends on its place in the batch, and batch norm uses
the whole batch. That needs GPUs; on a CPU, train a backbone with batch norm in one process.
Writes OUTPUT/results.json (see classification/report.py), predictions_{fold}.npz and, for each fold,
fold-{fold}/: log.txt, metrics.jsonl, TensorBoard events, checkpoints/best_ckpt.pt and last_ckpt.pt. The same command
continues a stopped run; folds that are finished stay, and further folds add to them.
"""

import math
import sys
import time
from argparse import BooleanOptionalAction
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path

import torch
from accelerate import Accelerator

from classification import filtering
from classification import network as classifiers
from classification import report as reports
from classification.batches import AUGMENTATIONS, ImageStore
from classification.data import folds_of, read_fold
from classification.output import claim_output, find_output, settings_of_fold
from classification.synthetic import default_method
from classification.training import MIN_LR, MOMENTUM, Recipe, Training
from core import claims, runs
from core.cli import Parser, integer, line, number, run
from core.errors import UserError
from core.files import file_hash
from core.progress import progress_bar
from core.runtime import AGREE_EVERY, Interruption, by_first, start, stop
from dataset import outside
from metrics.significance import PERMUTATIONS
from presets import OPTIMISERS, PAPER_CLASSIFIER, presets_of

NOT_SETTINGS = ("fold", "output", "synthetic", "filter", "baseline", "permutations", "data_path", "pretrained_file",
                "log_every", "num_workers", "cache_gb", "mixed_precision")  # of these, a continued run may have others


def train(args, training, log, interruption):
    """Train until --epochs, the smallest learning rate or an interruption -> whether it was interrupted."""
    accelerator, number, checkpoints = training.accelerator, training.fold.number, log.folder / "checkpoints"
    bar = progress_bar(initial=training.step, total=training.last_step, unit="steps", title=f"fold {number}",
                       active=log.active)
    losses, window, stopped = [], time.monotonic(), False
    with bar, closing(training.batches()) as batches:
        while not training.finished and not stopped:
            losses.append(training.train_step(*next(batches)))
            bar.update()
            end_of_epoch = training.step % training.steps_per_epoch == 0
            if end_of_epoch or training.step % args.log_every == 0:
                loss = accelerator.reduce(torch.stack(losses).mean(), "sum").item()
                if not math.isfinite(loss):
                    raise UserError(f"the loss is {loss} at step {training.step}; lower --lr or use bf16 for fp16")
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                throughput = len(losses) * training.batch / (time.monotonic() - window)
                log.metrics(training.step, loss=loss, images_per_second=throughput, lr=training.lr)
                losses, window = [], time.monotonic()
            if end_of_epoch:
                value, best = training.validate()
                log.text(f"fold {number}, epoch {training.epoch}: loss {loss:.4f}, validation mAP {100 * value:.2f}"
                         f"{' (best)' if best else ''}, learning rate {training.lr:g}, {throughput:.1f} images/s")
                log.metrics(training.step, validation_map=value)
                if best:
                    training.save(checkpoints / "best_ckpt.pt", args.method)
            if end_of_epoch or training.step % AGREE_EVERY == 0:
                stopped = asked_to_stop(accelerator, interruption) and not training.finished
            if end_of_epoch or stopped:
                training.save(checkpoints / "last_ckpt.pt", args.method, training=training.state())
                window = time.monotonic()  # throughput is that of training alone
    if stopped:
        log.text(f"stopped at step {training.step}; the same command continues")
    return stopped


def asked_to_stop(accelerator, interruption):
    """Whether any of the processes was asked to stop: then all do."""
    asked = torch.tensor(float(interruption.asked is not None), device=accelerator.device)
    return accelerator.reduce(asked, "sum").item() > 0


def run_fold(args, fold, settings, interruption):
    """Train, choose and test the network of one fold -> whether it was interrupted."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=args.mixed_precision)
    folder = reports.fold_folder(args.output, fold.number)
    training = Training(recipe_of(args), accelerator, fold)
    by_first(accelerator, lambda: hold_fold(folder, settings))
    last = folder / "checkpoints" / "last_ckpt.pt"
    exists = last.is_file()
    if exists:
        training.restore(last)
    log = runs.RunLog(folder, accelerator.is_main_process, training.step)
    log.text(f"{args.method}, fold {fold.number}: {args.backbone}, {args.image_size} pixels, {fold.real} real and "
             f"{len(fold.training) - fold.real} synthetic images, {training.steps_per_epoch} steps of {training.batch} "
             f"per epoch, {accelerator.num_processes} process(es) on {accelerator.device}, mixed precision "
             f"{accelerator.mixed_precision}")
    for remark in fold.remarks:
        log.text(f"warning: {remark}")
    if fold.filtered:
        log.text(filtering.sentence(fold.filtered))
    if exists:
        log.text(f"continuing from step {training.step}")
    accelerator.wait_for_everyone()  # the folder is there
    stopped = train(args, training, log, interruption)
    if not stopped:
        test(args, training, log)
    log.close()
    return stopped


def hold_fold(folder, settings):
    """From now on the folder of a fold is this job's; the folds of an output may be trained by several jobs."""
    runs.hold(folder)
    claims.write_settings(folder, settings)


def test(args, training, log):
    """Score the chosen network, in float32, on validation images (for thresholds) and, once, on the test images."""
    accelerator, fold = training.accelerator, training.fold
    best = classifiers.load_classifier(log.folder / "checkpoints" / "best_ckpt.pt", accelerator.device)
    validation_scores = training.predict(best.scores, training.validation)
    test_scores = training.predict(best.scores, ImageStore(fold.test.paths, args.image_size, 0))
    about = {"best_epoch": training.best_epoch, "epochs": training.epoch, "steps": training.step,
             "steps_per_epoch": training.steps_per_epoch, "validation_map": training.best, "seed": args.global_seed,
             "classifier": best.identity, "mixed_precision": accelerator.mixed_precision, "filter": fold.filtered}
    if accelerator.is_main_process:
        reports.save_fold(args.output, *reports.fold_result(fold, validation_scores, test_scores, about,
                                                            args.global_seed))
        log.text(f"fold {fold.number}: tested the network of epoch {training.best_epoch} of {training.epoch}")
    accelerator.wait_for_everyone()


def main():
    args = parse_args()
    folds = [read_fold(args.data_path, number, labels=args.labels, synthetic=args.synthetic, seed=args.global_seed,
                       synthetic_ratio=args.synthetic_ratio, allow_leaks=args.allow_leaks, judge=args.filter)
             for number in folds_of(args.data_path, args.fold)]
    args.method = args.method or default_method(folds[0].synthetic, args.augment)
    settings = settings_of(args, folds[0])
    defaults = parser().defaults()
    folder, note = find_output(args.output, args.method, settings, folds, defaults)
    done = reports.finished(folder)
    if args.baseline:
        reports.check_comparable(args.baseline, settings, {*done, *(fold.number for fold in folds)})
    process = start()
    if note and process.is_main_process:
        print(note)
    left = [fold for fold in folds if fold.number not in done]
    if left:
        check_start(args, left, process)
    args.output = by_first(process, lambda: claim_output(args.output, args.method, settings, defaults))
    with Interruption() as interruption:
        stopped = any(run_fold(args, sifted(args, fold, process), settings_of_fold(settings, fold), interruption)
                      for fold in left)
    if stopped:
        stop()
        sys.exit(interruption.exit_code)
    if process.is_main_process:
        rows = reports.write(args.output, args.method, args.data_path.resolve().name, settings, baseline=args.baseline,
                             permutations=args.permutations, seed=args.global_seed)
        print(f"\n{rows}\n\n{args.output}: results.json")
    process.wait_for_everyone()


def sifted(args, fold, process):
    """The fold without the generated images that --filter leaves out."""
    if not fold.filter:
        return fold

    def judge():
        classifier = filtering.open_filter(fold.filter, fold, process.device)
        return filtering.sift(classifier, fold, args.filter_quantile, args.eval_batch_size)

    kept, report = by_first(process, judge)
    return replace(fold.mixed(args.synthetic_ratio, args.global_seed, kept), filtered=report)


def recipe_of(args):
    """The flags that say how to train."""
    return Recipe(**{field.name: getattr(args, field.name) for field in fields(Recipe)})


def settings_of(args, fold):
    """What a run must share with one that it continues: flags, labels, the test set, all the same for every fold."""
    flags = {key: value for key, value in sorted(vars(args).items()) if key not in NOT_SETTINGS}
    weights = file_hash(args.pretrained_file) if args.pretrained_file and args.pretrained_file.is_file() else None
    return flags | {"labels": list(fold.label_names), "test_images": fold.hashes["test"],
                    "has_synthetic": bool(fold.synthetic), "pretrained_sha256": weights}


def check_start(args, folds, process):
    """Raise UserError for what would else fail after the start: filter, precision, batch size, weights, processes."""
    for fold in folds:
        if fold.filter:
            filtering.open_filter(fold.filter, fold, "cpu")
    precision = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=args.mixed_precision).mixed_precision
    on_cpu, processes = process.device.type == "cpu", process.num_processes
    if precision == "fp16" and on_cpu:
        raise UserError("--mixed-precision fp16 needs a GPU (there is no loss scaling on a CPU); give bf16 or no")
    smallest = min(min(args.global_batch_size, len(fold.training)) for fold in folds)
    if smallest < processes:
        raise UserError(f"--global-batch-size {args.global_batch_size}: {smallest} images per step, expected at least "
                        f"one for each of the {processes} processes")
    net = recipe_of(args).network(len(folds[0].label_names))
    if on_cpu and processes > 1 and classifiers.has_batch_norm(net):
        raise UserError(f"--backbone {args.backbone}: has batch norm, found {processes} processes on a CPU, expected "
                        "one (only GPUs compute batch norm over several processes); start one process, use GPUs, or "
                        "give a backbone without batch norm")
    classifiers.check(net, smallest, f"--backbone {args.backbone}")


def fold_number(text):
    """An argparse type: the number of a fold, or "all"."""
    return text if text == "all" else integer(0)(text)


def parse_args():
    """The flags, their defaults filled in. Raises UserError where they contradict each other."""
    args = parser().parse_args()
    for name, value in OPTIMISERS[args.optimizer].items():  # not in a preset, which may be given another optimiser
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.pretrained_file and not args.pretrained:
        raise UserError("--pretrained-file: contradicts --no-pretrained; leave one of them out")
    for name in ("synthetic_ratio", "filter"):
        if getattr(args, name) is not None and not args.synthetic:
            raise UserError(f"--{name.replace('_', '-')}: needs --synthetic; leave it out")
    return args


def parser():
    p = Parser(__doc__, presets=presets_of("classify"))
    p.add_argument("--data-path", type=Path, required=True, metavar="ROOT", help="data root of prepare_data.py")
    outside.add_flag(p)
    p.add_argument("--fold", type=fold_number, default="all", metavar="K", help="a fold's number, or all")
    p.add_argument("--synthetic", type=Path, nargs="+", default=[], metavar="DIR", help="sample folders of "
                   "sample_ddp.py to train with, or folders that hold one for each fold")
    p.add_argument("--output", type=Path, metavar="DIR", help="for results (default: the next "
                   "results_classify/NNN-METHOD, or that with the same settings)")
    p.add_argument("--method", type=line, help="name of the row (default: the generator's model, or baseline)")
    p.add_argument("--baseline", type=Path, metavar="RESULTS", help="results.json, or its folder, of a run on the same "
                   "folds to test the difference against")
    p.add_argument("--permutations", type=integer(99), default=PERMUTATIONS, help="of that test; **** after Holm's "
                   "correction for four methods needs 40000")
    g = p.add_argument_group("data")
    g.add_argument("--labels", nargs="+", metavar="NAME", help="labels to learn (default: all)")
    g.add_argument("--synthetic-ratio", "--real-to-synthetic", type=number(0), metavar="RATIO", help="synthetic images "
                   "per real one, at most, over all --synthetic (default: all that there are); the second is the older "
                   "spelling")
    g.add_argument("--filter", type=Path, metavar="RESULTS", help="leave out generated images that the classifiers in "
                   "this output folder, trained on the real images of the same folds, find unlike their labels or far "
                   "from every real one (classification/filtering.py)")
    g.add_argument("--filter-quantile", type=number(0, 1), default=0.1, metavar="SHARE", help="as unlike, or as far, "
                   "as the worst SHARE of the validation images are")
    g.add_argument("--augment", choices=AUGMENTATIONS,
                   help="random rotation, crop, mirror, brightness and contrast, or nothing")
    g.add_argument("--allow-leaks", action="store_true", help="go on, with a warning that stays in the results, where "
                   "test or validation patients are trained on")
    g.add_argument("--cache-gb", type=number(0), default=4, help="decoded images kept in memory, by each process: "
                   "gigabytes for training and as many for validation images; what is beyond is read again")
    g.add_argument("--num-workers", type=integer(1), default=4, help="threads that read and augment images")
    g = p.add_argument_group("network")
    g.add_argument("--backbone", help="any timm model")
    g.add_argument("--pretrained", action=BooleanOptionalAction, default=True, help="start from published weights")
    g.add_argument("--pretrained-file", type=Path, metavar="FILE", help="a file of those weights")
    g.add_argument("--image-size", type=integer(8, 2048), help="side of the square crop, in pixels")
    g = p.add_argument_group("optimisation")
    g.add_argument("--epochs", type=integer(1), help="at most")
    g.add_argument("--steps-per-epoch", type=integer(1), help="updates between validations (default: as many as "
                   "all training images, real and synthetic, fill)")
    g.add_argument("--early-stopping", type=integer(1), metavar="EPOCHS", help="stop after so many epochs without a "
                   f"better validation mAP (default: only when the learning rate is below {MIN_LR:g})")
    g.add_argument("--global-batch-size", type=integer(1), help="images per step over all processes")
    g.add_argument("--optimizer", choices=OPTIMISERS, help=f"SGD with momentum {MOMENTUM}, or AdamW")
    g.add_argument("--lr", type=number(MIN_LR), help="learning rate (default: 1e-3 for sgd, 1e-4 for adamw)")
    g.add_argument("--weight-decay", type=number(0), help="(default: 1e-4 for sgd, 1e-2 for adamw)")
    g.add_argument("--mixed-precision", choices=("no", "fp16", "bf16"), default=None,
                   help="of training and validation (default: as accelerate was configured, or no)")
    g.add_argument("--global-seed", type=integer(0), default=0, help="seed of every draw")
    g.add_argument("--eval-batch-size", type=integer(1), default=32, help="images per forward pass of evaluation")
    g.add_argument("--log-every", type=integer(1), default=50, metavar="STEPS", help="steps between metrics")
    p.set_defaults(**PAPER_CLASSIFIER)
    return p


if __name__ == "__main__":
    run(main, stop)
