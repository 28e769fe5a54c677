"""dataset/root.py, images.py, sets.py: reading a data root and its images; sets of images."""

from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from core.errors import UserError
from dataset.images import center_crop, check_images, load_image, load_images
from dataset.root import NOT_LABELS, read_split, write_split
from dataset.sets import LabelledImages


def grey(rows):
    return Image.fromarray(np.array(rows, np.uint8))


@pytest.fixture
def root(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8), (i, 10 * i, 100)).save(tmp_path / "images" / f"{i}.png")
    return tmp_path


def write(root, text, name="test"):
    (root / f"{name}.csv").write_bytes(text.encode() if isinstance(text, str) else text)


# ---- the crop

def test_crop_halves_with_a_box_filter():
    image = grey([[200, 0, 10, 20], [0, 0, 30, 40], [4, 4, 8, 8], [4, 4, 8, 8]])
    assert np.array_equal(center_crop(image, 2), [[50, 25], [4, 8]])  # plain means of 2 x 2 pixels
    corner = np.zeros((8, 8))
    corner[0, 0] = 160
    assert np.array_equal(center_crop(grey(corner), 2), [[10, 0], [0, 0]])  # halved twice: 160 / 16


def test_crop_takes_the_centre():
    wide = grey([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])  # the short side is already 2: pixels stay as they are
    assert np.array_equal(center_crop(wide, 2), [[2, 3], [7, 8]])  # (5 - 2) // 2 = 1 column off on the left
    tall = grey([[1, 2], [3, 4], [5, 6], [7, 8]])
    assert np.array_equal(center_crop(tall, 2), [[3, 4], [5, 6]])


def test_crop_of_an_oct_scan():
    """1408 × 573 -> 704 × 286 -> 630 × 256, 187 columns off: c shows x = (c + 187) · 1408 / 630."""
    pixels = np.zeros((573, 1408), np.uint8)
    left, right = round((187 + 20) * 1408 / 630), round((187 + 236) * 1408 / 630)
    pixels[:, left:right] = 255
    row = np.asarray(center_crop(grey(pixels), 256))[128]
    assert row.shape == (256,)
    assert row[:18].max() == 0
    assert row[22:234].min() == 255
    assert row[238:].max() == 0
    assert int(row[:128].sum()) == pytest.approx(108 * 255, abs=255)  # the edges to within a pixel
    assert int(row[128:].sum()) == pytest.approx(108 * 255, abs=255)


def test_crop_keeps_all_of_the_short_side():
    pixels = np.zeros((573, 1408), np.uint8)
    pixels[:287] = 255
    column = np.asarray(center_crop(grey(pixels), 256))[:, 128]
    assert int(column.sum()) == pytest.approx(128 * 255, abs=255)
    assert (column[0], column[-1]) == (255, 0)


def test_crop_enlarges_small_images():
    pixels = np.zeros((20, 10), np.uint8)
    pixels[5:15] = 255  # exactly the central square: 10 x 20 -> 32 x 64, rows 16 to 48
    pixels[10:15, 5:] = 0
    crop = np.asarray(center_crop(grey(pixels), 32))
    assert crop.shape == (32, 32)
    assert crop[3:13, 3:].min() >= 250
    assert crop[19:29, :13].min() >= 250
    assert crop[19:29, 19:].max() <= 5


@pytest.mark.parametrize("size", [(257, 256), (511, 512), (512, 513), (1000, 1000), (33, 700), (1, 3)])
def test_crop_is_square(size):
    assert center_crop(Image.new("RGB", size), 256).size == (256, 256)


# ---- images

def test_images_are_rgb_and_in_order(root):
    grey(np.full((4, 6), 7)).save(root / "grey.png")
    assert np.array_equal(load_image(root / "grey.png"), np.full((4, 6, 3), 7))
    paths = [root / "images" / f"{i}.png" for i in (2, 0, 1)]
    images = load_images(paths, 4)
    assert images.shape == (3, 4, 4, 3)
    assert images.dtype == np.uint8
    assert images[:, 0, 0].tolist() == [[2, 20, 100], [0, 0, 100], [1, 10, 100]]


def test_damaged_images_are_named(root):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(root / "half.jpg")
    (root / "half.jpg").write_bytes((root / "half.jpg").read_bytes()[:2000])
    (root / "text.png").write_text("not an image")
    for name in ("half.jpg", "text.png", "nowhere.png"):
        with pytest.raises(UserError, match=rf"{name}: cannot be read as an image"):
            check_images([root / "images" / "0.png", root / name])
    check_images([root / "images" / "0.png"])


# ---- splits

def test_split_round_trip(root):
    labels = np.array([[1, 0], [0, 0], [1, 1]], np.float32)
    write_split(root, "train_0", [f"images/{i}.png" for i in range(3)], labels, ("DME", "0"), ["b", "a", "b"])
    split = read_split(root, "train_0", num_classes=2)
    assert len(split) == 3
    assert split.filenames == ("images/0.png", "images/1.png", "images/2.png")
    assert split.paths == tuple(root / "images" / f"{i}.png" for i in range(3))
    assert split.label_names == ("DME", "0")
    assert split.patients == ("b", "a", "b")
    assert np.array_equal(split.labels, labels)
    assert split.labels.dtype == np.float32
    assert (split.csv, split.folder, split.name, split.eyes) == (root / "train_0.csv", root, "train_0", None)
    text = (root / "train_0.csv").read_text()
    assert text.startswith(",filename,DME,0,patient_name\n0,images/0.png,1,0,b\n1,")


@pytest.mark.parametrize("header", [
    ",filename,A,B", "Unnamed: 0,A,filename,B", "index,A,B,filename", "filename,A,B", "\ufefffilename,A,B",
    ",client_id,filename,A,B,patient_name,multi_class_label",
    "multi_class_label,A,patient_name,B,filename,client_id",
])
def test_every_other_column_is_a_label(root, header):
    values = {"filename": "images/1.png", "A": "1", "B": "0.0", "patient_name": "p1"}
    columns = header.lstrip("\ufeff").split(",")
    write(root, header + "\n" + ",".join(values.get(column, "5") for column in columns) + "\n")
    split = read_split(root, "test")
    assert split.label_names == ("A", "B")
    assert split.labels.tolist() == [[1.0, 0.0]]
    assert split.patients == (("p1",) if "patient_name" in columns else ("images/1.png",))


@pytest.mark.parametrize("page", ["README.md", "docs/DATA.md"])
def test_the_pages_name_every_column_that_is_no_label(page):
    text = (ROOT / page).read_text()
    assert not [name for name in NOT_LABELS if f"`{name}`" not in text]


def test_num_classes_must_agree(root):
    write(root, ",filename,A,B\n0,images/0.png,1,0\n")
    with pytest.raises(UserError, match=r"--num-classes 11: .*has 2 labels \(A B\); give --num-classes 2"):
        read_split(root, "test", num_classes=11)


def test_missing_table_names_what_there_is(root):
    with pytest.raises(UserError, match=r"train_7.csv: no such file \(found: no CSV at all\)"):
        read_split(root, "train_7")
    write(root, "")
    with pytest.raises(UserError, match=r"found: test.csv.*prepare_data.py"):
        read_split(root, "train_7")


def test_missing_images_are_counted(root):
    write(root, ",filename,A\n0,images/0.png,1\n1,images/8.png,1\n2,images/9.png,0\n")
    with pytest.raises(UserError, match=r"names 2 missing file\(s\), the first is .*8.png"):
        read_split(root, "test")


@pytest.mark.parametrize(("text", "message"), [
    ("", "test.csv: is empty"),
    (",filename,A\n", "holds no image"),
    (",name,A\n0,images/0.png,1\n", "no column `filename` .*'name', 'A'; expected UTF-8"),
    (",filename,A\n0,images/0.png,1\n1,images/1.png,2\n", "line 3: label A is '2', expected 0 or 1"),
    (",filename,A\n0,images/0.png,\n", "line 2: label A is '', expected 0 or 1"),
    (",filename,A,B\n0,images/0.png,1\n", "line 2: 3 cells, expected 4 as in the header"),
    (",filename,A\n0,images/0.png,1,1\n", "line 2: 4 cells, expected 3"),
    (",filename,A\n0,images/0.png,1\n1,images/0.png,1\n", "names images/0.png more than once"),
    (",filename,patient_name\n0,images/0.png,a\n", "no label column"),
    (",filename,A\n0,images/0.png,nan\n", "label A is 'nan'"),
    (b",filename,A\n0,images/\xe9.png,1\n", "line 2: is not UTF-8 .byte 0xe9."),
])
def test_bad_tables(root, text, message):
    write(root, text)
    with pytest.raises(UserError, match=message):
        read_split(root, "test")


# ---- sets

def five(**more):
    return LabelledImages(tuple(Path(f"{i}.png") for i in range(5)), **more)


def test_a_part_keeps_everything_in_order():
    images = five(labels=np.eye(5, dtype=np.float32), label_names=tuple("ABCDE"), filenames=tuple("fghij"),
                  patients=tuple("ppqqr"), eyes=tuple("lrlrl"), name="all", about={"seed": 3})
    part = images.take([3, 1], "two")
    assert len(part) == 2 and (part.name, part.about, part.label_names) == ("two", {"seed": 3}, tuple("ABCDE"))
    assert part.paths == (Path("3.png"), Path("1.png")) and part.labels.argmax(1).tolist() == [3, 1]
    assert (part.filenames, part.patients, part.eyes) == (("i", "g"), ("q", "p"), ("r", "r"))
    assert images.take([0]).name == "all" and len(images.take([])) == 0
    unknown = five().take([4])
    assert (unknown.labels, unknown.filenames, unknown.patients, unknown.eyes) == (None,) * 4


def test_a_random_part_is_a_function_of_the_seed_and_the_rest_is_the_rest():
    one, other = five(eyes=tuple("abcde")).split_at_random(2, 0, "purpose")
    assert len(one) == 2 and sorted(one.eyes + other.eyes) == list("abcde")
    assert list(one.eyes) == sorted(one.eyes) and list(other.eyes) == sorted(other.eyes)
    parts = {five(eyes=tuple("abcde")).split_at_random(2, seed, "purpose")[0].eyes for seed in range(20)}
    assert len(parts) > 3 and five(eyes=tuple("abcde")).split_at_random(2, 0, "purpose")[0].eyes == one.eyes


def test_the_digest_is_of_contents_in_order(root):
    paths = [root / "images" / f"{i}.png" for i in range(3)]
    digest = LabelledImages(tuple(paths)).digest
    assert digest != LabelledImages(tuple(paths[::-1])).digest
    paths[1].rename(root / "other.png")
    assert digest == LabelledImages((paths[0], root / "other.png", paths[2])).digest
    (root / "other.png").write_bytes(paths[0].read_bytes())
    assert digest != LabelledImages((paths[0], root / "other.png", paths[2])).digest
