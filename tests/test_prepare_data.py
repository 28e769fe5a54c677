"""prepare_data.py, dataset/splits.py and dataset/sources/oct_and_eye_fundus.py."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import prepare_data
from core.cli import run
from core.errors import UserError
from dataset.images import load_image
from dataset.patients import join_identical
from dataset.root import read_split
from dataset.sources import oct_and_eye_fundus
from dataset.splits import TEST, split_by_patient

LABELS = ("NOR", "AMD", "WAMD", "DR", "CSC", "PED", "MEM", "FLD", "EXU", "CNV", "RVO")  # of the phantoms
REPOSITORY = Path(__file__).resolve().parent.parent


# ---- the split

def skewed(seed=0):
    """Labels from half of all patients down to 2 %, all images of a patient alike: (n, 6), names (n,)."""
    rng = np.random.default_rng(seed)
    rates = np.array([0.5, 0.3, 0.15, 0.08, 0.04, 0.02])
    labels, patients = [], []
    for p in range(400):
        has = rng.random(6) < rates
        for _ in range(rng.integers(1, 5)):
            labels.append(has & (rng.random(6) < 0.9))
            patients.append(f"p{p:03}")
    return np.array(labels, int), np.array(patients)


def deviation(labels, fold, folds=5, test_fraction=0.2):
    """Images of each label in each subset, minus the ideal: (subsets, K)."""
    shares = [test_fraction] + [(1 - test_fraction) / folds] * folds
    found = np.array([labels[fold == k].sum(axis=0) for k in range(-1, folds)])
    return found - np.outer(shares, labels.sum(axis=0))


def test_every_patient_is_in_one_subset():
    labels, patients = skewed()
    fold = split_by_patient(labels, patients, 5, 0.2, seed=0)
    assert set(fold) == {TEST, 0, 1, 2, 3, 4}
    for patient in set(patients):
        assert len(set(fold[patients == patient])) == 1


def test_labels_are_spread_evenly():
    labels, patients = skewed()
    stratified = np.abs(deviation(labels, split_by_patient(labels, patients, 5, 0.2, seed=0)))
    assert stratified.max() <= 4  # as many images as one patient has: no greedy dealing can promise less
    names, owner = np.unique(patients, return_inverse=True)
    chance = []
    for seed in range(10):
        drawn = np.random.default_rng(seed).choice(np.arange(-1, 5), len(names), p=[0.2] + [0.16] * 5)
        chance.append(np.abs(deviation(labels, drawn[owner])).mean())
    assert stratified.mean() < min(chance) / 3
    images = deviation(np.ones((len(labels), 1)), split_by_patient(labels, patients, 5, 0.2, seed=0))
    assert np.abs(images).max() <= 4


def test_six_patients_with_a_rare_label_go_to_six_subsets():
    labels = np.zeros((60, 2), int)
    labels[:, 0] = 1
    labels[::10, 1] = 1  # needs: 1.2 in the test set, 0.96 in each fold
    fold = split_by_patient(labels, [f"p{i:02}" for i in range(60)], 5, 0.2, seed=3)
    assert sorted(fold[::10]) == [-1, 0, 1, 2, 3, 4]
    assert np.bincount(fold + 1)[0] == 12
    assert sorted(np.bincount(fold + 1)[1:]) == [9, 9, 10, 10, 10]


def test_split_is_a_function_of_the_seed_and_not_of_the_row_order():
    labels, patients = skewed()
    fold = split_by_patient(labels, patients, 5, 0.2, seed=0)
    assert np.array_equal(fold, split_by_patient(labels, patients, 5, 0.2, seed=0))
    assert not np.array_equal(fold, split_by_patient(labels, patients, 5, 0.2, seed=1))
    order = np.random.default_rng(0).permutation(len(labels))
    assert np.array_equal(fold[order], split_by_patient(labels[order], patients[order], 5, 0.2, seed=0))


@pytest.mark.parametrize("test_fraction", [0.01, 0.2, 0.9])
def test_no_subset_is_empty_even_with_one_patient_for_each(test_fraction):
    patients = np.repeat([f"p{i}" for i in range(6)], [9, 1, 4, 1, 1, 30])
    fold = split_by_patient(np.ones((len(patients), 1), int), patients, 5, test_fraction, seed=0)
    assert sorted(set(fold)) == [-1, 0, 1, 2, 3, 4]


def test_images_without_labels_are_dealt_out_too():
    fold = split_by_patient(np.zeros((100, 3), int), [f"p{i:02}" for i in range(100)], 5, 0.2, seed=0)
    assert list(np.bincount(fold + 1)) == [20, 16, 16, 16, 16, 16]


def test_too_few_patients():
    with pytest.raises(UserError, match=r"--folds 5: found 5 .*expected at least 6 .*give fewer folds"):
        split_by_patient(np.ones((10, 1), int), [f"p{i % 5}" for i in range(10)], 5, 0.2, seed=0)


# ---- a small tree in the public layout

ROWS = [  # Name, DME, DR -> NODR, NPDR, PDR, DME
    ("0001_OD_o_1", "0", "0", (1, 0, 0, 0)),
    ("0001_OI_o_1", "1", "NPDR", (0, 1, 0, 1)),
    ("0002_OD_o_1", "1", "PDR", (0, 0, 1, 1)),
    ("0003_OD_o_2", "1", "-", (0, 0, 0, 1)),
    ("0003_od_o_3", "0", "", (0, 0, 0, 0)),
    ("0004_OD_o_1", "0", "-", (0, 0, 0, 0)),
]


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / "public", [row[:3] for row in ROWS])


def write_tree(folder, rows, modality="OCT"):
    for i, (name, _, _) in enumerate(rows):
        path = folder / modality / f"{modality}{i % 2 + 1}" / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (24, 40, 3), np.uint8)
        Image.fromarray(pixels).save(path, quality=90)
    write_rows(folder / f"{modality}.csv", rows)
    return folder


def write_rows(path, rows):
    with open(path, "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["Name", "DME", "DR", "Size", "Format"])
        out.writerows((*row, "40x24", "jpg") for row in rows)


def test_public_labels_are_mapped(tree):
    found = oct_and_eye_fundus.read(tree, "oct")
    records = list(found.records)
    assert found.labels == ("NODR", "NPDR", "PDR", "DME") and found.count == 6
    assert [record.labels for record in records] == [row[3] for row in ROWS]
    assert [record.patient for record in records] == ["0001", "0001", "0002", "0003", "0003", "0004"]
    assert [record.name for record in records] == [row[0] for row in ROWS]
    assert [record.file.relative_to(tree).as_posix() for record in records[:2]] == [
        "OCT/OCT1/0001_OD_o_1.jpg", "OCT/OCT2/0001_OI_o_1.jpg",
    ]


def test_fundus_has_its_own_table_and_folders(tmp_path):
    folder = write_tree(tmp_path, [("0009_OI_f_1", "1", "PDR")], "EYE FUNDUS")
    [record] = oct_and_eye_fundus.read(folder, "fundus").records
    assert (record.patient, record.name, record.labels) == ("0009", "0009_OI_f_1", (0, 0, 1, 1))
    assert record.file == folder / "EYE FUNDUS" / "EYE FUNDUS1" / "0009_OI_f_1.jpg"


@pytest.mark.parametrize(("row", "message"), [
    (("0001_OD_o_1", "0", "SEVERE"), r"OCT.csv, line 2: DR is 'SEVERE', expected 0, NPDR, PDR"),
    (("0001_OD_o_1", "2", "0"), r"OCT.csv, line 2: DME is '2', expected 0 or 1"),
    (("0001_OD_o_1", "", "0"), r"OCT.csv, line 2: DME is '', expected 0 or 1"),
    (("0077_OD_o_1", "0", "0"), r"1 of 1 images are missing, the first is 0077_OD_o_1.jpg"),
])
def test_wrong_rows_are_named(tree, row, message):
    write_rows(tree / "OCT.csv", [row])
    with pytest.raises(UserError, match=message):
        oct_and_eye_fundus.read(tree, "oct")


def test_a_name_listed_twice_is_refused(tree):
    write_rows(tree / "OCT.csv", [ROWS[0][:3], ROWS[2][:3], ROWS[0][:3]])
    with pytest.raises(UserError, match="line 4: 0001_OD_o_1 is listed a second time"):
        oct_and_eye_fundus.read(tree, "oct")


def test_missing_table_and_column(tree):
    with pytest.raises(UserError, match=r"EYE FUNDUS.csv: no such file; --input"):
        oct_and_eye_fundus.read(tree, "fundus")
    (tree / "OCT.csv").write_text("Name,DME\n0001_OD_o_1,0\n")
    with pytest.raises(UserError, match=r"no column DR \(found: Name, DME\)"):
        oct_and_eye_fundus.read(tree, "oct")


# ---- the script

def script(*args):
    """Run prepare_data.py in a process of its own."""
    command = [sys.executable, REPOSITORY / "prepare_data.py", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)


def here(monkeypatch, *args):
    """Run prepare_data.py in this process, which spares the seconds that importing torch takes."""
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, args)])
    run(prepare_data.main)


def refused(monkeypatch, capsys, *args):
    """The one line on stderr with which prepare_data.py refuses `args`."""
    with pytest.raises(SystemExit) as stop:
        here(monkeypatch, *args)
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err


PUBLIC = ("--source", "oct-and-eye-fundus", "--modality", "oct")


def check_root(root, folds):
    """Each image is in the test set or in one val set and all other train sets; patients are kept apart."""
    test = read_split(root, "test")
    held_out = []
    for k in range(folds):
        train, val = read_split(root, f"train_{k}"), read_split(root, f"val_{k}")
        assert not set(train.patients) & set(val.patients)
        assert not (set(train.patients) | set(val.patients)) & set(test.patients)
        assert len(set(train.filenames)) == len(train)
        held_out.append(set(val.filenames))
        everything = set(train.filenames) | held_out[k] | set(test.filenames)
        assert len(train) + len(val) + len(test) == len(everything)
        assert everything == {f"images/{path.name}" for path in (root / "images").iterdir()}
    assert sum(map(len, held_out)) == len(set.union(*held_out)) == len(everything) - len(test)


def test_public_tree_end_to_end(tree, tmp_path):
    root = tmp_path / "roots" / "oct"
    done = script(*PUBLIC, "--input", tree, "--output", root, "--folds", 2, "--test_fraction", 0.3)
    assert (done.returncode, done.stderr) == (0, "")
    check_root(root, folds=2)
    assert [path.name for path in root.parent.iterdir()] == ["oct"]
    assert sorted(path.name for path in root.iterdir()) == [
        "images", "report.json", "report.png", "report.txt", "test.csv", "train_0.csv", "train_1.csv", "val_0.csv",
        "val_1.csv",
    ]
    found = {}
    for name in ("test", "val_0", "val_1"):
        split = read_split(root, name, num_classes=4)
        about = zip(split.patients, map(tuple, split.labels), strict=True)
        found |= dict(zip(split.filenames, about, strict=True))
    assert found == {f"images/{name}.jpg": (name.split("_")[0], labels) for name, _, _, labels in ROWS}
    for path in (root / "images").iterdir():  # as they are, not encoded again
        [source] = tree.glob(f"OCT/*/{path.name}")
        assert path.samefile(source)
    printed = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line.strip()}
    assert printed["test"] == ["train_0", "val_0", "train_1", "val_1", "total"]
    assert printed["DME"][-1] == "3"
    assert printed["images"][-1] == "6"
    assert printed["patients"][-1] == "4"
    assert printed["no"][-1] == "2"  # no label
    assert int(printed["images"][0]) == len(read_split(root, "test"))
    assert int(printed["images"][3]) == len(read_split(root, "train_1"))


def test_truncated_image_leaves_nothing_behind(tree, tmp_path):
    damaged = tree / "OCT" / "OCT2" / "0004_OD_o_1.jpg"
    damaged.write_bytes(damaged.read_bytes()[:-300])
    root = tmp_path / "root"
    done = script(*PUBLIC, "--input", tree, "--output", root, "--folds", 2)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert str(damaged) in done.stderr
    assert "truncated" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["public"]


def test_existing_output_is_refused_and_untouched(tree, tmp_path, monkeypatch, capsys):
    root = tmp_path / "root"
    root.mkdir()
    (root / "mine.txt").write_text("keep")
    error = refused(monkeypatch, capsys, *PUBLIC, "--input", tree, "--output", root, "--folds", 2)
    assert f"--output {root}: already exists; remove it or choose another" in error
    assert [path.name for path in root.iterdir()] == ["mine.txt"]
    (root / "mine.txt").unlink()  # an empty folder is no obstacle
    here(monkeypatch, *PUBLIC, "--input", tree, "--output", root, "--folds", 2)
    check_root(root, folds=2)


@pytest.mark.parametrize(("args", "message"), [
    ((*PUBLIC, "--input", "TREE", "--folds", 4), "--folds 4: found 4 patient(s), expected at least 5"),
    ((*PUBLIC, "--input", "TREE", "--count", 5), "--count: belongs to --source phantom, not to oct-and-"),
    ((*PUBLIC, "--input", "TREE", "--image_size", 64), "--image-size: belongs to --source phantom"),
    (("--source", "phantom", "--modality", "oct"), "--modality: belongs to --source topcon-mm, oct-and-eye-fundus, n"),
    (PUBLIC, "--source oct-and-eye-fundus: needs --input"),
    ((*PUBLIC, "--input", "nowhere"), "OCT.csv: no such file"),
])
def test_refusals(tree, tmp_path, monkeypatch, capsys, args, message):
    args = [tree if arg == "TREE" else arg for arg in args]
    assert message in refused(monkeypatch, capsys, *args, "--output", tmp_path / "root")
    assert [path.name for path in tmp_path.iterdir()] == ["public"]


@pytest.mark.parametrize(("rows", "message"), [
    ([("0001_OD_o_1", "0", "4")], "DR is '4'"),
    ([("0009_OD_o_1", "0", "0")], "the first is 0009_OD_o_1.jpg"),
    ([], "found no image"),
])
def test_bad_tables_leave_nothing_behind(tree, tmp_path, monkeypatch, capsys, rows, message):
    write_rows(tree / "OCT.csv", rows)
    assert message in refused(monkeypatch, capsys, *PUBLIC, "--input", tree, "--output", tmp_path / "root")
    assert [path.name for path in tmp_path.iterdir()] == ["public"]


def test_dash_and_underscore_are_the_same_and_zero_defaults_are_shown(tree, tmp_path, monkeypatch, capsys):
    for spelling, root in (("--test-fraction", "a"), ("--test_fraction", "b")):
        output = tmp_path / root
        here(monkeypatch, *PUBLIC, "--input", tree, "--output", output, "--folds", 2, f"{spelling}=0.4")
    for name in ("test", "train_0", "val_1"):
        assert (tmp_path / "a" / f"{name}.csv").read_bytes() == (tmp_path / "b" / f"{name}.csv").read_bytes()
    with pytest.raises(SystemExit):
        here(monkeypatch, "--help")
    assert "(at least 0; default: 0)" in capsys.readouterr().out


def test_phantom_end_to_end(tmp_path):
    root = tmp_path / "phantom"
    done = script("--source", "phantom", "--count", 12, "--image-size", 32, "--folds", 2, "--output", root)
    assert (done.returncode, done.stderr) == (0, "")
    check_root(root, folds=2)
    test = read_split(root, "test")
    assert test.label_names == LABELS
    assert len(list((root / "images").iterdir())) == 12
    for path, patient in zip(test.paths, test.patients, strict=True):
        assert path.suffix == ".png"
        assert path.name.startswith(f"{patient}_")
        image = load_image(path)
        assert image.shape == (32, 32, 3)
        assert image.std() > 5


def test_patients_who_share_a_picture_are_joined():
    """b and c share a picture, c and a another one: one name for the three; d stands alone."""
    patients = np.array(["d", "b", "c", "c", "a"])
    pictures = np.array(["1", "2", "2", "3", "3"])
    assert join_identical(patients, pictures).tolist() == ["d", "a", "a", "a", "a"]
    assert join_identical(patients, np.arange(5)).tolist() == patients.tolist()
