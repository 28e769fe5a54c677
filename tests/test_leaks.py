"""What images are, whatever they are called, and whether two splits share them."""

import os

import numpy as np
import pytest
from helpers import message_of, noise_images, save_images

from dataset import contents, leaks
from dataset.root import fingerprint, read_split, write_split


@pytest.fixture
def root(tmp_path):
    """Train: images 0 to 3 of patients 7, 8; test: 4 and 5 of patients 9, 10."""
    save_images(noise_images(6), tmp_path / "images")
    names = [f"images/{i:06d}.png" for i in range(6)]
    write_split(tmp_path, "train_0", names[:4], np.ones((4, 1)), ["A"], ["7", "7", "8", "8"])
    write_split(tmp_path, "test", names[4:], np.ones((2, 1)), ["A"], ["9", "10"])
    return tmp_path


def both(root):
    return read_split(root, "train_0"), read_split(root, "test")


def test_nothing_in_common(root):
    assert leaks.shared(*both(root)) == [] and leaks.unknown_patients(both(root)[0]) == []


@pytest.mark.parametrize("spelling", ["7", "7.0", " 7 ", "007"])
def test_a_patient_is_one_however_written(root, spelling):
    text = (root / "test.csv").read_text()
    (root / "test.csv").write_text(text.replace(",10\n", f",{spelling}\n"))
    (line,) = leaks.shared(*both(root))
    assert line == f"{root / 'train_0.csv'} and test.csv: 1 patient(s) in both, the first is 7"


@pytest.mark.parametrize("name", ["./images/000001.png", "images/../images/000001.png", "copy.png"])
def test_an_image_is_one_however_called(root, name):
    if name == "copy.png":
        (root / name).write_bytes((root / "images/000001.png").read_bytes())
    text = (root / "test.csv").read_text()
    (root / "test.csv").write_text(text.replace("images/000005.png", name))
    (line,) = leaks.shared(*both(root))
    assert line == (f"{root / 'train_0.csv'} and test.csv: 1 identical image(s) in both, the first is "
                    f"images/000001.png = {name}")


def test_patients_that_nobody_names_are_said(root):
    write_split(root, "val_0", ["images/000000.png", "images/000001.png"], np.ones((2, 1)), ["A"], ["", "7"])
    (line,) = leaks.unknown_patients(read_split(root, "val_0"))
    assert line == (f"{root / 'val_0.csv'}: 1 of 2 images name no patient (column patient_name), so whether a patient "
                    "is in two splits cannot be known")


def test_what_a_model_has_seen_is_found_again(root):
    train, test = both(root)
    known = leaks.identities(train)
    assert len(known) == 4 and leaks.seen(known, train) == 4 and leaks.seen(known, test) == 0
    assert leaks.seen(known + leaks.identities(test)[:1], test) == 1


def test_contents_follow_the_bytes_and_nothing_else(root):
    train, _ = both(root)
    before, file = fingerprint(train), train.paths[0]
    os.utime(file, (1, 1))
    assert fingerprint(train) == before
    size, times = file.stat().st_size, (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    spoilt = bytearray(file.read_bytes())
    spoilt[-1] ^= 1
    file.write_bytes(spoilt)
    os.utime(file, ns=times)  # as `cp -p` and rsync do: neither size nor time tells
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (size, times[1])
    assert fingerprint(train) != before


def test_what_is_remembered_is_not_read(root, monkeypatch):
    train, _ = both(root)
    states, known = [contents.state(path) for path in train.paths], contents.hashes(train.paths)
    monkeypatch.setattr(contents, "_known", {})
    monkeypatch.setattr(contents, "file_hash", lambda path: "read")
    contents.remember(train.paths, states, known)
    os.utime(train.paths[2])
    assert contents.hashes(train.paths) == [known[0], known[1], "read", known[3]]


def test_a_file_that_is_gone_is_one_line(root):
    assert message_of(lambda: contents.hashes([root / "no.png"])).startswith(f"{root / 'no.png'}: cannot be read (")
