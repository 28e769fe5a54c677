"""Every command that the documentation shows, and every one that was published, is one that the scripts accept."""

import ast
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT
from helpers import commands_of, parse

SCRIPTS = [p.stem for p in ROOT.glob("*.py") if "def main()" in p.read_text()]
MODULES = [p for p in ROOT.glob("[!.]*/**/*.py") if p.parent.name not in ("tests", "benchmarks")]
PAGES = [p for pattern in ("*.md", "docs/**/*.md", "assets/*/*.md", "*.sh") for p in ROOT.glob(pattern)]

PUBLISHED = [  # the published README, verbatim
    "torchrun --nnodes=1 --master-port 29504 --nproc_per_node=1 extract_features.py --data-path data/oct_multilabel/ "
    "--features-path store/oct_features/ --global-batch-size 128 --fold 0",
    "accelerate launch --main_process_port 29504 --multi_gpu --num_processes 4 --mixed_precision fp16 train.py "
    "--model GeCA-S --feature-path store/oct_features/ --num-classes 11 --global-batch-size 128 --epochs 14000 "
    "--fold 8 --validate_every 700 --data-path data/oct_multilabel/ --results-dir ./results_oct_GeCA/",
    "torchrun --master-port 29506 --nnodes=1 --nproc_per_node=1 sample_ddp_val.py --expand_ratio 1 --model GeCA-S "
    "--data-path oct_multilabel/ --fold 0 --num-sampling-steps 250 "
    "--ckpt ./results_oct_GeCA/001-GeCA-S/checkpoints/best_ckpt.pt --sample-dir ./synthetic_oct/",
    "python evaluate.py --fold 0 --image-size 256 --device_list cuda:0 --real ./oct_multilabel/ "
    "--gen ./synthetic_oct/GeCA-S-GS-fold-0-nstep-250-best_ckpt-size-256-vae-ema-cfg-1.5-seed-0/",
    "torchrun --master-port 29506 --nnodes=1 --nproc_per_node=1 sample_ddp.py --per-proc-batch-size 64 "
    "--expand_ratio 5 --model GeCA-S --data-path ./store/oct_features/ --fold 0 --num-sampling-steps 250 "
    "--ckpt ./results_oct_GeCA/001-GeCA-S/checkpoints/best_ckpt.pt --sample-dir ./synthetic_oct/",
]

# Further published flags. Where ours differ: `--num-classes` and `--in-channels` are read from the data, the VAE or
# the checkpoint if they are not given.
SAMPLER = ("--ckpt C --data-path D", "--num-classes 11 --global-seed 3 --tf32 --image_space --in_channels 4",
           {"cfg_scale": 1.5, "num_sampling_steps": 250, "per_proc_batch_size": 32, "global_seed": 0,
            "precision": "fp32"})
FURTHER = [
    ("extract_features", "--data-path D --features-path F",
     "--model GeCA-S --image-size 512 --num-classes 11 --global-seed 3 --vae mse --num-workers 2",
     {"image_size": 256, "global_seed": 0, "vae": "ema", "num_workers": 4}),
    ("train", "--data-path D --feature-path F",
     "--image-size 512 --val_samples 8 --log-every 5 --ckpt-every 5 --load_from C --in_channels 4 --grad_norm "
     "--image_space --cache --multi_scale --global-seed 3 --vae mse --num_workers 2 --num-workers 2",
     {"image_size": 256, "val_samples": 24, "log_every": 100, "vae": "ema", "model": "GeCA-S", "lr": 1e-4,
      "ema_decay": 0.9999, "global_batch_size": 128, "epochs": 14000, "cfg_scale": 1.5, "grad_norm": False}),
    ("sample_ddp", *SAMPLER),
    ("sample_ddp_val", *SAMPLER),
    ("evaluate", "--real R --gen G", "--gg_extractor dino", {"fold": 0}),  # --image-size: test_evaluate.py
]


def documents():
    """(name, text) of the pages, and of the docstrings at the head of what can be run."""
    yield from ((str(p.relative_to(ROOT)), p.read_text()) for p in PAGES)
    for p in [*(ROOT / f"{script}.py" for script in SCRIPTS), *MODULES]:
        yield str(p.relative_to(ROOT)), ast.get_docstring(ast.parse(p.read_text())) or ""


DOCUMENTED = [(name, *command) for name, text in documents() for command in commands_of(text)]


def test_commands_are_found_wherever_they_stand():
    text = ("# python train.py --a 1\n[ -f x ] || python -m evaluation.features --b \"$X/y\" \\\n    --c 2   remark\n"
            "torchrun --nproc_per_node=2 scripts/plot.py run  # remark\npython train.py ...\nof python, --d")
    assert list(commands_of(text)) == [
        ("train", ["--a", "1"]), ("evaluation.features", ["--b", "1/y", "--c", "2"]), ("scripts.plot", ["run"])]


def test_the_documents_show_every_script():
    assert {script for name, script, _ in DOCUMENTED if name == f"{script}.py"} == set(SCRIPTS)
    shown = {script for name, script, _ in DOCUMENTED if name in ("README.md", "quickstart.sh")}
    assert shown >= {"prepare_data", "extract_features", "train", "sample_ddp_val", "evaluate"}


@pytest.mark.parametrize("document, script, arguments", DOCUMENTED)
def test_documented_command_parses(document, script, arguments):
    parse(script, arguments)


@pytest.mark.parametrize("command", PUBLISHED)
def test_published_command_parses(command):
    ((script, arguments),) = commands_of(command)
    _, flags = parse(script, arguments)
    for flag, value in zip(arguments[::2], arguments[1::2], strict=True):
        found = flags[flag[2:].replace("-", "_")]
        found = found[0] if isinstance(found, list) else found
        assert Path(found) == Path(value) if "/" in value else str(found) == value


@pytest.mark.parametrize("script, required, more, defaults", FURTHER)
def test_further_published_flags_and_defaults(script, required, more, defaults):
    bare, given = (parse(script, shlex.split(text))[1] for text in (required, f"{required} {more}"))
    assert {name: bare[name] for name in defaults} == defaults
    for flag in re.findall(r"--([\w-]+)", more):
        name = flag.replace("-", "_")
        name = {"tf32": "precision"}.get(name, name)
        assert name == "in_channels" or given[name] != bare[name] or given[name] == 11


def test_flags_in_prose_exist():
    """`--flag` in the running text of a page."""
    known = {"--help", "--nproc-per-node"} | {
        flag for script in [*SCRIPTS, "benchmarks.bench", "scripts.plan"] for action in parse(script, None)[0]._actions
        for flag in action.option_strings}
    known |= set(re.findall(r"--[a-z]+(?=\)|\|)", (ROOT / "quickstart.sh").read_text()))
    named = {(p.name, flag.replace("_", "-")) for p in PAGES for code in re.findall(r"`([^`\n]+)`", p.read_text())
             if not code.startswith("sbatch ")  # flags of Slurm
             for flag in re.findall(r"(?<!\S)--[a-z][\w-]*", code)}
    assert named and not [(page, flag) for page, flag in sorted(named) if flag not in known]


def test_no_page_is_unfinished():
    assert not [(p.name, word) for p in PAGES for word in re.findall(r"@[A-Z]+@|TODO|FIXME", p.read_text())]


def test_no_line_of_the_readme_is_too_wide():
    wide = {i: len(line) for i, line in enumerate((ROOT / "README.md").read_text().splitlines(), 1) if len(line) > 120}
    assert not wide


def test_links_lead_somewhere():
    """Links and pictures within the repository."""
    broken = [(page.name, link) for page in PAGES for link in re.findall(r"\]\(([^)#\s]+)", page.read_text())
              if "://" not in link and not (page.parent / link).exists()]
    assert not broken


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_help(script):
    actions = parse(script, None)[0]._actions
    assert len(actions) > 2 and not [a.option_strings[0] for a in actions if a.option_strings and not a.help]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_wrong_flag_is_one_line_and_exit_code_2(script, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(script, ["--no-such-flag", "1"])
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
