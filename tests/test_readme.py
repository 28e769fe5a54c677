"""Every command that the documentation shows is one that the scripts accept."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT

from pipeline import sampling

SCRIPTS = [p.stem for p in ROOT.glob("*.py") if "def main()" in p.read_text()]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("assets/*/README.md"), ROOT / "quickstart.sh",
             *(ROOT / f"{name}.py" for name in SCRIPTS)]

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


def parser_of(script):
    """The very parser that the script uses."""
    module = importlib.import_module(script)
    return module.parser() if hasattr(module, "parser") else sampling.parser(module.__doc__, "labels")


def commands_of(path):
    """(script, arguments) of every line that starts one of our scripts and is not an outline (…)."""
    text = path.read_text().replace("\\\n", " ")
    for line in text.splitlines():
        line = re.sub(r"^\s*(#|>)\s*", "", line.strip())
        found = re.search(rf"^(?:python|torchrun|accelerate launch)\b.*?\b({'|'.join(SCRIPTS)})\.py\s+(--.*)", line)
        if found and "..." not in found[2]:
            yield found[1], shlex.split(re.split(r"\s{2,}#|\s[|>]\s|\s\|\|", found[2])[0])


DOCUMENTED = [(path.name, *command) for path in DOCUMENTS for command in commands_of(path)]


def test_the_documents_show_every_script():
    assert {script for _, script, _ in DOCUMENTED} == set(SCRIPTS)
    assert {script for name, script, _ in DOCUMENTED if name == "README.md"} >= set(SCRIPTS) - {
        "train_vae", "sample_ddp"}


@pytest.mark.parametrize("document, script, arguments", DOCUMENTED)
def test_documented_command_parses(document, script, arguments):
    parser_of(script).parse_args([re.sub(r"\$\{?\w+\}?", "1", a) for a in arguments])


@pytest.mark.parametrize("command", PUBLISHED)
def test_published_command_parses(command):
    words = shlex.split(command)
    place = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script = Path(words[place]).stem
    args = vars(parser_of(script).parse_args(words[place + 1:]))
    assert args["fold"] == int(words[words.index("--fold") + 1])


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_help(script):
    bare = [a.option_strings[0] for a in parser_of(script)._actions if a.option_strings and not a.help]
    assert not bare


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_wrong_flag_is_one_line_and_exit_code_2(script, capsys):
    with pytest.raises(SystemExit) as stop:
        parser_of(script).parse_args(["--no-such-flag", "1"])
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
