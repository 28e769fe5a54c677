"""Every command of a table: scripts/plan.py, its wrappers and the scripts for Slurm. No model runs here."""

import fnmatch
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from helpers import commands_of, parse, save_images

import sample_ddp
from classification.synthetic import open_synthetic
from core.errors import UserError
from dataset.root import read_split, write_split
from generation.checkpoint import Checkpoint
from generation.output import folder_name
from scripts import check_synthetic, plan
from scripts.throughput import Throughput

SHELL = [*ROOT.glob("*.sh"), *ROOT.glob("scripts/**/*.sh")]
MODELS = ("GeCA-S", "DiT-S", "LDM-B")


def make_root(folder, label_names=("AMD", "DME"), sizes=(6, 4)):
    """Two folds: train_0 has sizes[0] images and train_1 sizes[1]; val_k are the others."""
    names = [f"images/{path.name}" for path in save_images(np.zeros((sum(sizes) + 2, 8, 8, 3), np.uint8),
                                                             folder / "images")]
    first, second, test = names[:sizes[0]], names[sizes[0]:-2], names[-2:]
    for split, files in (("train_0", first), ("val_0", second), ("train_1", second), ("val_1", first), ("test", test)):
        labels = np.eye(len(label_names), dtype=int)[np.arange(len(files)) % len(label_names)]
        write_split(folder, split, files, labels, label_names, files)
    return folder


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # the plan goes there; this takes the tests back
    return make_root(tmp_path / "root")


def run_plan(monkeypatch, capsys, *arguments):
    """What the script prints."""
    monkeypatch.setattr(sys, "argv", ["plan.py", *map(str, arguments)])
    plan.main()
    return capsys.readouterr().out


@pytest.fixture
def dry(root, monkeypatch, capsys):
    """table, further arguments -> (printed plan, [(script, flags)] as the scripts themselves understand them)."""
    def make(table, *arguments):
        text = run_plan(monkeypatch, capsys, table, "--data", root, "--output", root.parent / "out", "--dry-run",
                        *arguments)
        return text, [(script, parse(script, words)[1]) for script, words in commands_of(text)]
    return make


# ---- the plan


def test_table_1_in_order(dry, root):
    text, found = dry(1)
    assert [(s, f.get("model"), f.get("fold")) for s, f in found] == [
        *(("extract_features", None, k) for k in (0, 1)), *(("train", m, k) for k in (0, 1) for m in MODELS),
        *(("sample_ddp_val", None, k) for k in (0, 1) for _ in MODELS), *(("evaluate", None, k) for k in (0, 1)),
        ("make_tables", None, None)]
    assert all(f["lpips"] == "alex" and f["features"] is None for s, f in found if s == "evaluate")
    assert not (root.parent / "out").exists() and "nothing is measured" in text.splitlines()[0]


def test_table_2_in_order(dry):
    _, found = dry(2)
    assert [(s, f.get("model"), f.get("fold")) for s, f in found][2:] == [
        *(("train", m, k) for k in (0, 1) for m in MODELS), *(("sample_ddp", None, k) for k in (0, 1) for _ in MODELS),
        *(("classify", None, "all") for _ in range(5)), ("make_tables", None, None)]
    classifiers = [f for s, f in found if s == "classify"]
    assert [f["method"] for f in classifiers] == ["baseline", "baseline-without-augmentation", *MODELS]
    assert [f["augment"] for f in classifiers] == ["geometric", "none", *["geometric"] * 3]
    baseline = classifiers[0]["output"]
    assert [f["baseline"] for f in classifiers] == [None, *[baseline] * 4]
    assert [[p.name for p in f["synthetic"]] for f in classifiers] == [[], [], *([m] for m in MODELS)]


def test_the_defaults_are_those_of_the_paper(dry):
    found = [f for table in (1, 2) for f in dry(table)[1]]
    flags = dict(found)
    assert (flags["train"]["epochs"], flags["train"]["global_batch_size"], flags["train"]["vae"]) == (14000, 128, "ema")
    assert all(flags[s]["num_sampling_steps"] == 250 and flags[s]["sampler"] == "ddpm" and flags[s]["cfg_scale"] == 1.5
               for s in ("sample_ddp", "sample_ddp_val"))
    assert (flags["sample_ddp"]["expand_ratio"], flags["sample_ddp_val"]["expand_ratio"]) == (5, 1)
    assert {f["image_size"] for s, f in found if s in ("extract_features", "train")} == {256}
    c = flags["classify"]
    assert (c["backbone"], c["image_size"], c["epochs"], c["pretrained"]) == ("resnet50.tv_in1k", 448, 80, True)


@pytest.mark.parametrize("table, sampler", [(1, "sample_ddp_val"), (2, "sample_ddp")])
def test_each_command_takes_what_another_makes(dry, table, sampler):
    text, found = dry(table, "--models", "GeCA-XS DiT-S/4", "--vae", "retina", "--image-size", 64)
    by = {s: [f for script, f in found if script == s] for s, _ in found}
    assert {f["feature_path"] for f in by["train"]} == {f["features_path"] for f in by["extract_features"]}
    for trained, sampled in zip(by["train"], by[sampler], strict=True):
        run = Path(trained["results_dir"]) / f"000-{trained['model'].replace('/', '-')}-{trained['fold']}"
        assert sampled["ckpt"] == run / "checkpoints" / "best_ckpt.pt" and sampled["fold"] == trained["fold"]
        checkpoint = Checkpoint(args=trained, model_args={})
        options = sample_ddp.options_of(SimpleNamespace(**sampled), checkpoint)
        made = sampled["sample_dir"] / folder_name(checkpoint, sampled["ckpt"].stem, sampled["fold"], options)
        takers = [str(p) for f in by.get("evaluate", ()) if f["fold"] == trained["fold"] for p in f["gen"]]
        takers += [f"{p}/*-GS-fold-{trained['fold']}-*" for f in by.get("classify", ()) for p in f["synthetic"]]
        assert sum(fnmatch.fnmatch(made, pattern) for pattern in takers) == 1
    scored = {p for s in ("evaluate", "classify") for f in by.get(s, ()) for p in f["output"].parents}
    assert {*by["make_tables"][0]["results"]} <= scored and "* '" not in text and "'*" not in text


def test_folds_one_by_one_where_they_are_not_all(dry, root):
    write_split(root, "train_2", ["images/000000.png"], np.ones((1, 2), int), ("AMD", "DME"), ["p"])
    write_split(root, "val_2", ["images/000001.png"], np.ones((1, 2), int), ("AMD", "DME"), ["q"])
    found = [f for s, f in dry(2, "--folds", "0 2", "--models", "GeCA-S")[1] if s == "classify"]
    assert [(f["method"], f["fold"], f["baseline"] is not None) for f in found] == [
        ("baseline", 0, False), ("baseline", 2, False), ("baseline-without-augmentation", 0, False),
        ("baseline-without-augmentation", 2, True), ("GeCA-S", 0, False), ("GeCA-S", 2, True)]


def test_launchers_and_further_flags(dry):
    text, found = dry(2, "--launch", "accelerate launch --multi_gpu --num_processes 4", "--sample-launch",
                      "torchrun --nproc_per_node=4", "--extra-train", "--lr 3e-4", "--extra-sample=--tf32",
                      "--extra_classify", "--pretrained-file a_b=c", "--models", "GeCA-S", "--folds", "0 1")
    starts = {words.split(".py")[0] for words in text.splitlines() if ".py" in words and words[0] != "#"}
    assert starts == {"accelerate launch --multi_gpu --num_processes 4 train", "torchrun --nproc_per_node=4 sample_ddp",
                      "accelerate launch --multi_gpu --num_processes 4 classify", "python make_tables",
                      "torchrun --nproc_per_node=4 extract_features"}
    assert {f["lr"] for s, f in found if s == "train"} == {3e-4}
    assert {f["precision"] for s, f in found if s == "sample_ddp"} == {"tf32"}
    assert {str(f["pretrained_file"]) for s, f in found if s == "classify"} == {"a_b=c"}


def test_only_some_steps(dry):
    _, found = dry(2, "--only", "train", "sample", "--folds", 1, "--models", "DiT-S")
    assert [(s, f["fold"]) for s, f in found] == [("train", 1), ("sample_ddp", 1)]


def test_paths_are_as_seen_from_where_the_command_was_given(root, monkeypatch, capsys):
    monkeypatch.chdir(root.parent)
    text = run_plan(monkeypatch, capsys, 1, "--data", "root", "--output", "a b", "--vae", "root", "--dry-run")
    assert f"--data-path {root}" in text and f"--vae {root}" in text and f"'{root.parent}/a b/features'" in text
    assert f"cd {shlex.quote(str(ROOT))}" in text.splitlines()


@pytest.mark.parametrize("arguments, message", [
    (("--folds", "0 7"), "--folds 7: "), (("--models", "GeCA-S Other"), "expected some of"),
    (("--throughput", "nothing.json"), "nothing.json: cannot be read"), (("--steps", "0"), "--steps")])
def test_mistakes_are_one_line(dry, arguments, message, capsys):
    with pytest.raises((UserError, SystemExit)) as found:
        dry(1, *arguments)
    said = str(found.value) if isinstance(found.value, UserError) else capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1


# ---- estimates


def bench_file(path, cells=32, **rates):
    """task -> images per second of GeCA-S; a slower and a plain variant beside it."""
    rows = [{"model": "GeCA-S", "task": task, "cells": cells, "images": images, "seconds": images / rate / factor,
             "variant": variant} for task, rate in rates.items() for images, factor in ((1, 0.5), (4, 1.0))
            for variant, factor in (("asynchronous", factor), ("plain", 9))]
    path.write_text(json.dumps({"device": "cuda", "results": {"fp16": {"rows": rows}, "fp32": {"rows": rows[:0]}}}))
    return path


def test_hours_of_a_benchmark(dry, root):
    file = bench_file(root.parent / "b.json", train=7, guided=2)
    more = ("--throughput", file, "--models", "GeCA-S DiT-S", "--folds", 0, "--only", "train", "sample")
    text, _ = dry(2, "--launch", "accelerate launch --mixed_precision fp16", *more)
    hours = 14000 * 6 / 7 / 3600  # epochs x images / rate
    assert f"# 1 train-GeCA-S-0: {hours:.2f} GPU hours (at the throughput of b.json, fp16)" in text
    assert "train-DiT-S-0: not measured" in text and "sample-train-GeCA-S-0: not measured" in text  # fp32 was not
    assert text.splitlines()[0].endswith(f"steps to come: {hours:.2f} GPU hours")
    text, _ = dry(2, "--extra-sample", "--precision fp16", *more)
    assert f"sample-train-GeCA-S-0: {5 * 6 * 250 / 2 / 3600:.2f} GPU hours" in text
    assert "# 1 train-GeCA-S-0: not measured" in text  # in fp32
    bench_file(file, cells=8, train=7)
    assert "# 1 train-GeCA-S-0: not measured" in dry(2, "--launch", "x --mixed_precision fp16", *more)[0]


def make_run(folder, rates, started):
    """A run folder with logged images per second."""
    folder.mkdir(parents=True)
    lines = [{"step": i, "images_per_second": rate} for i, rate in enumerate(rates)] + [{"step": 9, "kid": 1.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "log.txt").write_text(f"run: 5 images, 9 process(es) on cpu\nrun: 5 images, {started}, mixed\n")


def test_hours_of_earlier_runs(tmp_path):
    make_run(tmp_path / "train/GeCA-S-fold-0/000-GeCA-S-0", (2, 40, 44), "4 process(es) on cuda")
    make_run(tmp_path / "train/GeCA-S-fold-1/000-GeCA-S-1", (10,), "1 process(es) on cuda")
    make_run(tmp_path / "train/DiT-S-fold-0/000-DiT-S-0", (), "1 process(es) on cpu")
    found = Throughput(tmp_path, None, 32, {})
    hours = found.hours(("train", "GeCA-S", 36000))
    assert (hours.hours, hours.unit) == (1.0, "GPU hours")  # the median of 40 / 4 and 10
    assert found.hours(("train", "DiT-S", 1)) is None and found.hours(None) is None
    assert str(Throughput(tmp_path, None, 32, {}).hours(("train", "GeCA-S", 18000))) == (
        "0.50 GPU hours (at the throughput of 2 run(s) here)")


def test_hours_of_classifiers(dry, root):
    make_run(root.parent / "out" / "classify" / "baseline" / "fold-0", (5,), "1 process(es) on cpu")
    text, _ = dry(2, "--models", "GeCA-S", "--only", "baseline", "classify")
    real = 80 * (6 + 4) / 5 / 3600  # epochs x training images of both folds / rate
    assert f"# 1 baseline-baseline-all: {real:.2f} CPU hours" in text
    assert f"# 3 classify-GeCA-S-all: {6 * real:.2f} CPU hours" in text  # with five synthetic images for each
    assert text.splitlines()[0].endswith(f"to come: {8 * real:.2f} CPU hours")


# ---- running it


def test_a_plan_goes_on_where_it_failed(root, monkeypatch, capsys):
    out = root.parent / "out"
    steps = [plan.Step("train", "one", f"echo 1 >> {out}/log"), plan.Step("train", "two", f"test -e {out}/allowed"),
             plan.Step("table", "three", f"echo 3 >> {out}/log")]
    monkeypatch.setattr(plan.Plan, "steps", lambda self: steps)
    command = (1, "--data", root, "--output", out)
    with pytest.raises(SystemExit) as stop:
        run_plan(monkeypatch, capsys, *command)
    assert stop.value.code == 1 and "two ended with exit code 1" in capsys.readouterr().err
    (out / "allowed").touch()
    text = run_plan(monkeypatch, capsys, *command)
    assert text.count("done already") == 1 and (out / "log").read_text() == "1\n3\n"
    run_plan(monkeypatch, capsys, *command)
    assert (out / "log").read_text() == "1\n3\n3\n"  # tables are always made
    steps[0] = plan.Step("train", "one", f"echo other >> {out}/log")
    assert "# 1 one: not measured" in run_plan(monkeypatch, capsys, *command, "--dry-run")
    run_plan(monkeypatch, capsys, *command)
    assert "other" in (out / "log").read_text()


def test_an_output_keeps_its_settings(root, monkeypatch, capsys):
    monkeypatch.setattr(plan.Plan, "steps", lambda self: [])
    command = ("--data", root, "--output", root.parent / "out")
    run_plan(monkeypatch, capsys, 1, *command)
    run_plan(monkeypatch, capsys, 2, *command, "--folds", 1, "--models", "GeCA-XS", "--launch", "other")
    with pytest.raises(UserError, match=r"made with other settings \(epochs 14000 \(now 5\)\)"):
        run_plan(monkeypatch, capsys, 1, *command, "--epochs", 5)
    write_split(root, "test", ["images/000000.png"], np.ones((1, 2), int), ("AMD", "DME"), ["p"])
    with pytest.raises(UserError, match="csv_files"):
        run_plan(monkeypatch, capsys, 1, *command)


@pytest.mark.parametrize("kind, ending, code", [
    (signal.SIGTERM, 130, 75), (signal.SIGTERM, 1, 75), (signal.SIGUSR1, 75, 75), (signal.SIGUSR1, 0, 75)])
def test_a_signal_is_handed_on(tmp_path, kind, ending, code):
    """A step that is told to stop may save first; the plan then ends with "again", whatever the step's exit code."""
    def missed(*_):
        raise AssertionError("the plan itself was hit")

    (tmp_path / "done").mkdir()
    before = signal.signal(kind, missed)
    try:
        with pytest.raises(SystemExit) as stop:
            plan.execute(plan.Step("train", "x", f"trap 'touch {tmp_path}/saved; exit {ending}' {kind.name}; sleep .3; "
                                   f"kill -{kind.name} $PPID; sleep 5 & wait"), tmp_path)
        assert signal.getsignal(kind) is missed
    finally:
        signal.signal(kind, before)
    assert stop.value.code == code and (tmp_path / "saved").exists()
    assert (tmp_path / "done" / "x").exists() == (ending == 0)


def test_a_signal_that_was_missed_comes_again(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "REPEAT_SECONDS", 0.1)
    (tmp_path / "done").mkdir()
    with pytest.raises(SystemExit) as stop:
        plan.execute(plan.Step("train", "x", f"trap '' USR1; kill -USR1 $PPID; sleep .5; trap 'touch {tmp_path}/saved; "
                               "exit 75' USR1; while :; do sleep .1; done"), tmp_path)
    assert stop.value.code == 75 and (tmp_path / "saved").exists()


def test_a_step_that_fails_ends_the_plan_with_its_exit_code(tmp_path):
    with pytest.raises(SystemExit) as stop:
        plan.execute(plan.Step("train", "x", "exit 3"), tmp_path)
    assert stop.value.code == 3


# ---- shell


@pytest.mark.parametrize("script", SHELL, ids=lambda p: p.name)
def test_shell_scripts_are_well_formed(script):
    assert subprocess.run(["bash", "-n", script], capture_output=True, text=True).stderr == ""
    assert os.access(script, os.X_OK) == script.read_text().startswith("#!")  # what is sourced has no first line


def fake(path, text='echo "$@"'):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


def link(folder):
    """The scripts for Slurm as seen from another folder that is submitted from."""
    (folder / "scripts" / "slurm").symlink_to(ROOT / "scripts" / "slurm")


def shell(script, *arguments, **environment):
    done = subprocess.run(["bash", ROOT / script, *arguments], env={"PATH": os.environ["PATH"], **environment},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)


@pytest.mark.parametrize("number, steps, folds, models", [
    (0, ["train", "sample"], "0", "GeCA-S"), (3, ["train", "sample"], "1", "DiT-S"), (5, ["train"], "1", "LDM-B"),
    (1, ["extract"], "1", "GeCA-S"), (2, ["classify"], "0 1", "LDM-B"), (0, ["baseline"], "0 1", "GeCA-S DiT-S LDM-B"),
    (0, ["evaluate", "table"], "0 1", "GeCA-S DiT-S LDM-B")])
def test_tasks_of_an_array_job(tmp_path, number, steps, folds, models):
    fake(tmp_path / "scripts" / "table2.sh", "printf '%q ' \"$@\"")
    link(tmp_path)
    found = shell("scripts/slurm/array.sh", "2", *steps, SLURM_SUBMIT_DIR=str(tmp_path), FOLDS="0 1", DATA="d",
                  OUTPUT="o", SLURM_ARRAY_TASK_ID=str(number))
    assert found == ["--data", "d", "--output", "o", "--folds", folds, "--models", models, "--only", *steps]
    plan.parser().parse_args(["2", *found])


def test_a_table_on_two_nodes(tmp_path):
    fake(tmp_path / "scripts" / "table2.sh", "printf '%q ' \"$@\"")
    link(tmp_path)
    fake(tmp_path / "bin" / "scontrol", "echo node7; echo node8")
    fake(tmp_path / "bin" / "accelerate")
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    found = shell("scripts/slurm/multinode.sh", "2", "--models", "GeCA-S", SLURM_SUBMIT_DIR=str(tmp_path), PATH=path,
                  DATA="d", OUTPUT="o", SLURM_JOB_NODELIST="node[7-8]", SLURM_JOB_ID="40007", SLURM_NNODES="2")
    args = plan.parser().parse_args(["2", *found])
    assert args.launch == args.sample_launch == "srun --kill-on-bad-exit=1 scripts/slurm/accelerate_node.sh"
    assert args.models == ["GeCA-S"]
    words = shell("scripts/slurm/accelerate_node.sh", "train.py", "--fold", "0", PATH=path, SLURM_NNODES="2", GPUS="4",
                  SLURM_NODEID="1", MASTER_ADDR="node7", MASTER_PORT="20007")
    assert words[-3:] == ["train.py", "--fold", "0"]
    from accelerate.commands.launch import launch_command_parser
    launched = launch_command_parser().parse_args(words[1:])
    assert (launched.num_machines, launched.machine_rank, launched.num_processes, launched.main_process_ip,
            launched.main_process_port, launched.mixed_precision) == (2, 1, 8, "node7", 20007, "fp16")


@pytest.mark.parametrize("array, state, code, requeued", [
    ({}, "RUNNING", 75, "7"), ({"SLURM_ARRAY_JOB_ID": "6", "SLURM_ARRAY_TASK_ID": "1"}, "RUNNING", 75, "6_1"),
    ({}, "COMPLETING", 75, None), ({}, "RUNNING", 2, None)])
def test_only_a_stopped_job_that_still_runs_is_requeued(tmp_path, array, state, code, requeued):
    """With the id of this one task of an array; a job that Slurm is ending (scancel) stays ended."""
    fake(tmp_path / "bin" / "squeue", f"echo {state}")
    fake(tmp_path / "bin" / "scontrol", f'echo "$@" > {tmp_path}/asked')
    fake(tmp_path / "plan", f"trap 'exit {code}' USR1; sleep .2; kill -TERM $PPID; while :; do sleep .1; done")
    done = subprocess.run(["bash", "-c", f"source scripts/slurm/requeue.sh; requeued_when_stopped {tmp_path}/plan"],
                          cwd=ROOT, env={"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "7", **array})
    assert done.returncode == code
    asked = tmp_path / "asked"
    assert (asked.read_text() if asked.exists() else None) == (requeued and f"requeue {requeued}\n")


@pytest.mark.parametrize("table", [1, 2])
def test_a_plan_speaks_as_the_script_that_was_called(table, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["plan.py", str(table), "--help"])
    with pytest.raises(SystemExit):
        plan.main()
    assert capsys.readouterr().out.startswith(f"usage: table{table}.sh [-h]")
    (tmp_path / "done").mkdir()
    with pytest.raises(SystemExit):
        plan.execute(plan.Step("train", "x", "exit 3"), tmp_path)
    assert capsys.readouterr().err.startswith(f"table{table}.sh: x ended with exit code 3")


# ---- scripts/check_synthetic.py


def rows(perfect, shuffled, seed=0):
    return [{"seed": seed, "method": "real"}, *({"seed": seed, "method": name, "gain": gain, "p": p}
            for name, (gain, p) in (("perfect", perfect), ("shuffled", shuffled)))]


@pytest.mark.parametrize("perfect, shuffled, wrong", [
    ((0.10, 0.01), (-0.05, 0.01), []), ((0.10, 0.01), (0.02, 0.3), []),
    ((0.10, 0.20), (0.00, 0.9), ["does not help"]), ((-0.10, 0.01), (-0.2, 0.9), ["does not help"]),
    ((0.10, 0.01), (0.02, 0.04), ["shuffled labels help"]), ((0.10, 0.01), (0.06, 0.4), ["shuffled labels help"])])
def test_the_check_can_fail(perfect, shuffled, wrong):
    found = check_synthetic.verdict(rows((0.1, 0.01), (-0.1, 0.5)) + rows(perfect, shuffled, seed=1))
    assert [line.startswith("seed 1: ") for line in found] == [True] * len(wrong)
    assert all(expected in line for expected, line in zip(wrong, found, strict=True))


def test_perfect_and_shuffled_images(tmp_path):
    data = make_root(tmp_path / "data", ("AMD", "CSC"), (5, 2))
    for fold in (0, 1):
        check_synthetic.make_synthetic(data, fold, tmp_path, 0)
    truth = np.tile(read_split(data, "train_0").labels, (5, 1))
    perfect, shuffled = (open_synthetic(tmp_path / name, 0).split for name in ("perfect", "shuffled"))
    assert np.array_equal(perfect.labels, truth) and all(
        one.samefile(other) for one, other in zip(perfect.paths, shuffled.paths, strict=True))
    assert not np.array_equal(shuffled.labels, truth) and np.array_equal(shuffled.labels.sum(0), truth.sum(0))
    contents = {p.read_bytes() for k in (0, 1) for p in (tmp_path / "perfect" / f"fold-{k}" / "images").iterdir()}
    assert len(contents) == 5 * (5 + 2)  # no image twice, within or between folds
