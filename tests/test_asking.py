"""Asking for images: which labels, how many, of which model; and finding them again."""

import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, call_script, refused, succeeded
from helpers import message_of, noise_images, save_images
from PIL import Image

from core.runs import checkpoint_file
from dataset.pictures import caption
from dataset.root import read_split, write_split
from dataset.samples import open_generated, sample_folders
from generation import labels as asking
from generation import output
from generation.trained import read

NAMES = ["DR", "FLD", "A=B"]
BUNDLED = ROOT / "assets" / "geca-xs-phantom"
PHANTOM = read(BUNDLED / "geca-xs-phantom.pt", {})[0].label_names


# ---- labels


@pytest.mark.parametrize("asked, values", [
    ("DR", (1, 0, 0)), (" DR , FLD=0.25 ", (1, 0.25, 0)), (["DR", "FLD"], (1, 1, 0)), ("A=B", (0, 0, 1)),
    ("A=B=0.5", (0, 0, 0.5)), ({"FLD": 0.5, "A=B": 0}, (0, 0.5, 0)), ("null", (0, 0, 0)), (None, (0, 0, 0)),
    ([], (0, 0, 0))], ids=str)
def test_labels_are_read_in_every_way_they_are_asked_for(asked, values):
    row = asking.values_of(asked, NAMES, "here")
    assert row.dtype == np.float32 and row.tolist() == list(values)


@pytest.mark.parametrize("asked, words", [
    ("dr", "knows no 'dr', it knows DR FLD A=B (or null)"), ("DR=2", "'2', expected a number from 0 to 1"),
    ("DR=-0.1", "'-0.1'"), ("DR=nan", "'nan'"), ("DR=", "''"), ({"DR": None}, "'None'"), ("", "knows no ''"),
    ([1, 0], "knows no '1'")], ids=str)
def test_labels_that_mean_nothing_are_refused(asked, words):
    message = message_of(lambda: asking.values_of(asked, NAMES, "--labels here"))
    assert message.startswith("--labels here: ") and words in message


def test_a_way_is_straight_and_has_both_ends():
    way = asking.between(np.array([1, 0], np.float32), np.array([0, 0.5], np.float32), 3)
    assert way.tolist() == [[1, 0], [0.5, 0.25], [0, 0.5]]


def test_a_top_up_by_hand():
    """B lacks 3 of 5; it occurs once alone and once with C, so both take turns; D never occurs."""
    labels = np.array([[1, 0, 0, 0]] * 6 + [[0, 1, 0, 0], [0, 1, 1, 0]] + [[0, 0, 1, 0]] * 3, np.float32)
    added = asking.top_up(labels, 5)
    assert sorted(map(tuple, added.tolist())) == [(0, 1, 0, 0)] * 2 + [(0, 1, 1, 0)]
    assert (labels.sum(0) + added.sum(0)).tolist() == [6, 5, 5, 0]
    assert asking.top_up(labels, 1).shape == (0, 4)


def test_combinations_are_topped_up_in_their_proportion():
    labels = np.array([[1, 0]] * 30 + [[1, 1]] * 10, np.float32)
    added = asking.top_up(labels, 80)
    together = np.concatenate([labels, added])
    assert together.sum(0).min() == 80 and (together.sum(0) >= 80).all()
    assert np.array_equal(added, asking.top_up(labels, 80)) and (added == [1, 1]).all()  # only these have the second
    alone = asking.top_up(labels[:, :1], 80)
    assert len(alone) == 40
    three = np.array([[1, 0, 0]] * 9 + [[1, 0, 1]] * 3 + [[0, 1, 0]] * 99, np.float32)
    rare = asking.top_up(three, 40)
    assert (rare[:, 2] == 1).sum() == 37 and (rare[:, 1] == 0).all()  # the rarest first: they bring the first with them


def test_captions_tell_soft_labels():
    assert caption(np.array([1, 0.5, 0]), NAMES) == "DR, FLD=0.5" and caption(np.zeros(3), NAMES) == "no label"


# ---- pictures


def test_a_grid_shows_some_of_every_combination():
    labels = np.array([[1, 0]] * 20 + [[0, 1]] * 3)
    numbers, columns = output.shown(labels)
    assert columns == 8 and numbers == [*range(20), *[None] * 4, 20, 21, 22, *[None] * 5]
    assert output.shown(labels[::-1])[0][:3] == [0, 1, 2]  # in the order in which they first occur
    assert output.shown(labels[18:]) == ([0, 1, None, 2, 3, 4], 3)
    for many in (np.eye(9), np.eye(4), np.zeros((60, 2)), np.arange(100)[:, None] % 7):
        assert output.shown(many) == ([*range(min(48, len(many)))], 8)


# ---- which checkpoint


def test_a_run_folder_stands_for_its_best_checkpoint(tmp_path):
    run, other = tmp_path / "000-GeCA", tmp_path / "001-GeCA"
    for folder in (run, other):
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "checkpoints" / "last_ckpt.pt").touch()
    last = run / "checkpoints" / "last_ckpt.pt"
    assert checkpoint_file(run, "--ckpt") == checkpoint_file(run / "checkpoints", "--ckpt") == last
    (run / "checkpoints" / "best_ckpt.pt").touch()
    assert checkpoint_file(run, "--ckpt") == run / "checkpoints" / "best_ckpt.pt"
    assert checkpoint_file(last, "--ckpt") == last and checkpoint_file(tmp_path / "x.pt", "--ckpt").name == "x.pt"
    assert checkpoint_file(BUNDLED, "--ckpt") == BUNDLED / "geca-xs-phantom.pt"
    assert "name one of 000-GeCA, 001-GeCA" in message_of(lambda: checkpoint_file(tmp_path, "--ckpt"))
    message = message_of(lambda: checkpoint_file(ROOT / "docs", "--load-from"))
    assert message.startswith("--load-from") and message.endswith("best_ckpt.pt or last_ckpt.pt)")


@pytest.fixture(scope="module")
def run_of_fold_3(tmp_path_factory):
    """The bundled weights as the run folder of a training of fold 3."""
    folder = tmp_path_factory.mktemp("run")
    content = torch.load(BUNDLED / "geca-xs-phantom.pt", weights_only=True)
    content["args"] = {**content["args"], "fold": 3}
    (folder / "checkpoints").mkdir()
    torch.save(content, folder / "checkpoints" / "best_ckpt.pt")
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A data root whose training images of fold 3 have two labels, the second of them once."""
    folder = tmp_path_factory.mktemp("root")
    paths = save_images(noise_images(5), folder / "images")
    labels = np.zeros((5, len(PHANTOM)), int)
    labels[:, PHANTOM.index("NOR")], labels[4] = 1, 0
    labels[4, PHANTOM.index("MEM")] = 1
    files = [f"images/{path.name}" for path in paths]
    write_split(folder, "train_3", files[2:], labels[2:], PHANTOM, files[2:])
    write_split(folder, "val_3", files[:2], labels[:2], PHANTOM, files[:2])
    return folder


def ask(script, checkpoint, folder, *more):
    return call_script(script, "--ckpt", checkpoint, "--num-sampling-steps", 2, "--sampler", "ddim",
                       "--per-proc-batch-size", 1, "--sample-dir", folder, *more)


def test_what_a_checkpoint_knows_need_not_be_said_and_not_be_contradicted(run_of_fold_3, root, tmp_path):
    for script, csv in (("sample_ddp.py", "train_syn_3"), ("sample_ddp_val.py", "val_syn_3")):
        succeeded(ask(script, run_of_fold_3, tmp_path, "--data-path", root))
        (folder,) = tmp_path.glob("*-fold-3-nstep-2-best_ckpt-size-64-vae-retina-*")
        assert len(read_split(folder, csv)) == {"train_syn_3": 3, "val_syn_3": 2}[csv]
        for flag, value in (("--fold", 0), ("--image-size", 32), ("--vae", "ema"), ("--model", "GeCA-S")):
            refused(ask(script, run_of_fold_3, tmp_path / "no", "--data-path", root, flag, value), f"{flag} {value}",
                    "was trained with", "leave the flag out")
    assert not (tmp_path / "no").exists()
    images, remark = open_generated(folder, 3, tuple(PHANTOM))
    assert len(images) == 2 and remark is None and images.about["image_size"] == 64
    assert images.about["training"]["lr"] > 0 and images.about["training_seed"] == 0
    assert (folder / images.about["checkpoint"]).resolve() == checkpoint_file(run_of_fold_3, "--ckpt").resolve()
    shutil.copytree(folder, tmp_path / "copy")
    assert sample_folders(tmp_path, "val_syn_3.csv") == [folder, tmp_path / "copy"]  # what a parent folder means


def test_a_grid_is_no_sample(tmp_path):
    save_images(noise_images(1), tmp_path)
    (tmp_path / "000000.png").rename(tmp_path / "grid.png")
    assert "no image in it" in message_of(lambda: open_generated(tmp_path, 0, ("A",)))


# ---- the command


def test_rare_labels_are_topped_up(run_of_fold_3, root, tmp_path):
    out = succeeded(ask("sample_ddp.py", run_of_fold_3, tmp_path, "--data-path", root, "--balance", 3))
    assert [line.split() for line in out.splitlines() if line.startswith(("NOR", "MEM"))] == [
        ["NOR", "2", "1", "3"], ["MEM", "1", "2", "3"]]
    assert "FLD" in next(line for line in out.splitlines() if "nothing to top up" in line)
    (folder,) = tmp_path.glob("*-balance-3")
    split = read_split(folder, "train_syn_3")
    added = {name: int(count) for name, count in zip(split.label_names, split.labels.sum(0), strict=True) if count}
    assert added == {"NOR": 1, "MEM": 2} and len(split) == 3
    refused(ask("sample_ddp.py", run_of_fold_3, tmp_path, "--data-path", root, "--balance", 1), "MEM the fewest, 1")


def test_on_a_walk_only_the_labels_change(tmp_path):
    succeeded(ask("sample_ddp.py", BUNDLED, tmp_path / "w", "--walk", "NOR", "MEM,DR=0.5", "--count", 3))
    (folder,) = (tmp_path / "w").glob("*-walk-NOR-MEM+DR=0.5-3")
    rows = (folder / "walk.csv").read_text().splitlines()
    columns = [rows[0].split(",").index(name) for name in ("NOR", "MEM", "DR")]
    found = [[row.split(",")[c] for c in columns] for row in rows[1:]]
    assert found == [["1", "0", "0"], ["0.5", "0.5", "0.25"], ["0", "1", "0.5"]]
    made = [np.asarray(Image.open(folder / "walk" / f"{i:06d}.png")) for i in range(3)]
    assert (made[0] != made[1]).any() and (folder / "grid.png").is_file()
    for names, image in (("NOR", made[0]), ("MEM,DR=0.5", made[2])):
        succeeded(ask("sample_ddp.py", BUNDLED, tmp_path / names, "--labels", names, "--count", 1, "--no-grid"))
        (sampled,) = (tmp_path / names).glob("*")
        assert np.array_equal(Image.open(sampled / "asked" / "000000.png"), image)
        assert not (sampled / "grid.png").exists()


def test_a_stopped_walk_goes_on_with_the_same_draws(tmp_path):
    flags = ("--walk", "NOR", "MEM", "--count", 3)
    succeeded(ask("sample_ddp.py", BUNDLED, tmp_path, *flags))
    (lost,) = tmp_path.glob("*/walk/000001.png")
    before = lost.read_bytes()
    lost.unlink()
    succeeded(ask("sample_ddp.py", BUNDLED, tmp_path, *flags))
    assert lost.read_bytes() == before


def test_every_combination_may_have_its_count(tmp_path):
    succeeded(ask("sample_ddp.py", BUNDLED, tmp_path, "--labels", "NOR", "--count", 1, "--labels", "MEM=0.5,DR",
                  "--count", 2))
    (folder,) = tmp_path.iterdir()
    labels = np.load(folder / "asked.npy")
    assert labels.sum(0)[[PHANTOM.index(name) for name in ("NOR", "MEM", "DR")]].tolist() == [1, 1, 2]
    assert labels.sum() == 4 and (folder / "asked.csv").read_text().count(",0.5,") == 2


@pytest.mark.parametrize("flags, words", [
    ((), ("found nothing to ask for", "either --data-path")),
    (("--labels", "NOR", "--walk", "NOR", "MEM"), ("found --labels and --walk",)),
    (("--walk", "NOR", "XX"), ("--walk XX", "knows no 'XX'")),
    (("--walk", "NOR", "MEM", "--count", 1), ("--count 1", "at least 2")),
    (("--walk", "NOR", "MEM", "--count", 2, 3), ("--count 2 3", "one number")),
    (("--labels", "NOR=1.5"), ("--labels NOR=1.5", "from 0 to 1")),
    (("--labels", "NOR", "--balance", 3), ("--balance 3", "found --labels")),
    (("--data-path", ".", "--balance", 3, "--expand-ratio", 2), ("--expand-ratio 2: not with --balance",)),
], ids=str)
def test_mistakes_are_one_line(flags, words, tmp_path):
    refused(ask("sample_ddp.py", BUNDLED, tmp_path / "no", *flags), *words)
    assert not (tmp_path / "no").exists()
