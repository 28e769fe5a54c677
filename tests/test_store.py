"""Images on their way into a data root: formats, links, names that meet, identical pictures; report and audit."""

import json
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

import prepare_data
from core.cli import run
from core.errors import UserError
from dataset import store as stores
from dataset.collection import Collection, Record
from dataset.images import center_crop, load_image
from dataset.patients import across, same_name
from dataset.root import read_split
from dataset.sources import folder as folder_source
from dataset.store import StoreOptions, changed, store


def picture(seed, size=(20, 16)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def call(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, args)])
    run(prepare_data.main)


def refusal(monkeypatch, capsys, *args):
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, *args)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


# ---- formats


def written(tmp_path, image, name="a.png", **options):
    image.save(tmp_path / name, **options)
    return load_image(tmp_path / name)


def test_grey_and_palette_keep_their_values(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(written(tmp_path, Image.fromarray(grey)), np.repeat(grey[..., None], 3, 2))
    colours = picture(0).quantize(16)
    assert np.array_equal(written(tmp_path, colours), np.asarray(colours.convert("RGB")))


def test_16_bit_is_scaled_from_its_whole_range(tmp_path):
    deep = np.array([[0, 128, 257], [32768, 65407, 65535]], np.uint16)
    assert written(tmp_path, Image.fromarray(deep), "a.png")[..., 0].tolist() == [[0, 0, 1], [128, 255, 255]]
    assert written(tmp_path, Image.fromarray(deep), "a.tif")[..., 1].tolist() == [[0, 0, 1], [128, 255, 255]]


@pytest.mark.parametrize("image", [np.full((4, 4), 70000, np.int32), np.full((4, 4), 0.5, np.float32)])
def test_pixels_without_a_known_range_are_refused(tmp_path, image):
    Image.fromarray(image).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match="expected 8 or 16 bits per channel: convert it"):
        load_image(tmp_path / "a.tif")


def test_transparent_places_are_black(tmp_path):
    pixels = np.full((4, 4, 4), 200, np.uint8)
    pixels[:2, :, 3], pixels[2:, :, 3] = 0, 255
    found = written(tmp_path, Image.fromarray(pixels))
    assert found[:2].max() == 0 and found[2:].min() == 200


def test_cmyk_is_converted_and_exif_obeyed(tmp_path):
    assert written(tmp_path, Image.new("CMYK", (4, 4), (0, 0, 0, 255)), "a.jpg").max() == 0
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° clockwise to see it upright
    wide = np.zeros((8, 16, 3), np.uint8)
    wide[:, :8] = 255
    found = written(tmp_path, Image.fromarray(wide), "b.png", exif=exif)
    assert found.shape == (16, 8, 3) and found[:7].min() == 255 and found[9:].max() == 0


def test_of_several_pages_the_first_counts(tmp_path):
    first, second = picture(1), picture(2)
    found = written(tmp_path, first, "a.tif", save_all=True, append_images=[second])
    assert np.array_equal(found, np.asarray(first))


# ---- store


def stored(tmp_path, records, **options):
    root = tmp_path / "root"
    root.mkdir(exist_ok=True)
    return store(Collection(("A",), records, len(records)), root, StoreOptions(**options), iter), root


def files(tmp_path, count=3, suffix=".JPG"):
    paths = [tmp_path / f"{i}{suffix}" for i in range(count)]
    for i, path in enumerate(paths):
        picture(i).save(path, format="JPEG" if suffix == ".JPG" else None)
    return paths


def test_a_killed_preparation_goes_on_with_what_nobody_has_touched(tmp_path, monkeypatch):
    """Five images; killed after the third; then the second is exchanged. What is left is that of one go."""
    paths = files(tmp_path, 5, ".png")
    records = [Record(f"s/{i}", (i % 2,), path) for i, path in enumerate(paths)]

    def stop(images):
        for k, image in enumerate(images):
            yield image
            if k == 2:
                raise KeyboardInterrupt

    (tmp_path / "root").mkdir()
    with pytest.raises(KeyboardInterrupt):
        store(Collection(("A",), records, 5), tmp_path / "root", StoreOptions(resize=32, workers=1), stop)
    done = len((tmp_path / "root" / "stored.jsonl").read_text().splitlines())
    assert done >= 3
    picture(77).save(paths[1])
    with open(tmp_path / "root" / "stored.jsonl", "a") as file:
        file.write('{"record": "s/4", "st')
    read = []
    monkeypatch.setattr(stores, "load_image", lambda path: (read.append(path), load_image(path))[1])
    found, root = stored(tmp_path, records, resize=32)
    assert read == [paths[1], *paths[done:]]
    shutil.rmtree(root)
    whole, root = stored(tmp_path, records, resize=32)
    for name in whole.__dataclass_fields__:
        assert np.array_equal(getattr(found, name), getattr(whole, name)), name
    assert [path.name for path in root.iterdir()] == ["images"]


@pytest.mark.parametrize("copy", [False, True])
def test_files_are_linked_or_copied_as_they_are(tmp_path, copy):
    paths = files(tmp_path)
    records = [Record(f"s/{i}", (1,), path, patient=f"p{i}") for i, path in enumerate(paths)]
    found, root = stored(tmp_path, records, copy=copy)
    assert found.filenames.tolist() == ["images/s/0.jpg", "images/s/1.jpg", "images/s/2.jpg"]
    assert found.linked.tolist() == [not copy] * 3 and found.sizes.tolist() == [[20, 16]] * 3
    for path, name in zip(paths, found.filenames, strict=True):
        assert (root / name).samefile(path) != copy and (root / name).read_bytes() == path.read_bytes()


def test_where_nothing_can_be_linked_it_is_copied(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("cross-device link")

    monkeypatch.setattr("os.link", refuse)
    found, root = stored(tmp_path, [Record("a", (1,), files(tmp_path)[0])])
    assert not found.linked.any() and (root / "images/a.jpg").is_file()


def test_names_that_meet_are_refused_not_overwritten(tmp_path):
    one, two, _ = files(tmp_path)
    with pytest.raises(UserError, match=r"two images want the name A: .*0\.JPG and .*1\.JPG; rename one"):
        stored(tmp_path, [Record("a", (1,), one), Record("A", (1,), two)])


def test_a_resized_root_is_what_the_crop_would_have_made(tmp_path):
    paths = [tmp_path / "a.png"]
    picture(5, (90, 70)).save(paths[0])
    found, root = stored(tmp_path, [Record("a", (1,), paths[0])], resize=32)
    assert found.sizes.tolist() == [[90, 70]]
    small = load_image(root / "images/a.png")
    assert small.shape == (32, 32, 3) and np.array_equal(small, load_image(paths[0], 32))
    assert np.array_equal(load_image(root / "images/a.png", 32), small)


def test_filters_do_what_they_say():
    dots = np.zeros((9, 9, 3), np.uint8)
    dots[4, 4] = 255
    assert np.asarray(changed(Image.fromarray(dots), StoreOptions(median=True))).max() == 0
    image = picture(3, (40, 40))
    assert np.array_equal(changed(image, StoreOptions(resize=20)), center_crop(image, 20))


def test_clahe_stretches_lightness_and_keeps_grey_grey():
    pytest.importorskip("skimage")
    flat = np.repeat(np.linspace(100, 120, 64).astype(np.uint8)[None, :, None], 64, 0).repeat(3, 2)
    found = np.asarray(changed(Image.fromarray(flat), StoreOptions(clahe=True))).astype(int)
    assert np.ptp(found) > 2 * np.ptp(flat) and np.abs(found - found.mean(-1, keepdims=True)).max() <= 1


# ---- folders of classes


def classes(root, names, split=""):
    for i, name in enumerate(names):
        path = root / split / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i + 100 * len(split)).save(path)
    return root


def test_one_folder_per_class(tmp_path):
    tree = classes(tmp_path / "t", ["A/p1_1.png", "A/p1_2.PNG", "B/p2_1.jpg", "B/sub/p3_1.tif"])
    for junk in (".DS_Store", "__MACOSX/A/x.png", "A/notes.txt"):
        (tree / junk).parent.mkdir(parents=True, exist_ok=True)
        (tree / junk).write_text("x")
    found = folder_source.read(tree, r"(p\d+)_")
    records = list(found.records)
    assert found.labels == ("A", "B") and found.count == 4
    assert [(r.name, r.labels, r.patient, r.split) for r in records] == [
        ("A/p1_1", (1, 0), "p1", ""), ("A/p1_2", (1, 0), "p1", ""), ("B/p2_1", (0, 1), "p2", ""),
        ("B/sub/p3_1", (0, 1), "p3", "")]
    assert found.remarks == ("1 file(s) are no images and were left out, the first is A/notes.txt",)


def test_split_folders_are_splits_and_names_may_meet(tmp_path):
    tree = tmp_path / "t"
    for side in ("train", "valid", "test"):
        classes(tree, ["A/1.png", "A/1.jpg", "B /2.png"], side)
    found = folder_source.read(tree)
    assert found.labels == ("A", "B")
    assert [(r.name, r.split) for r in found.records][:4] == [
        ("test/A/1-jpg", "test"), ("test/A/1-png", "test"), ("test/B/2", "test"), ("train/A/1-jpg", "train")]
    assert {r.split for r in found.records} == {"train", "val", "test"}


@pytest.mark.parametrize(("names", "pattern", "message"), [
    ([], "", "found no image"), (["a.png"], "", "lies in no class folder"),
    (["train/a.png"], "", "expected FOLDER/train/CLASS"), (["A/x.png"], "(", "no regular expression"),
    (["A/x.png"], r"p(\d+)", "finds no patient in x.png"),
])
def test_folders_that_are_none(tmp_path, names, pattern, message):
    (tmp_path / "t").mkdir()
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        folder_source.read(classes(tmp_path / "t", names), pattern)


# ---- the script: splits of the authors, conflicts, report


def published(tmp_path):
    tree = tmp_path / "tree"
    for side, count in (("train", 6), ("val", 3), ("test", 3)):
        classes(tree, [f"{'AB'[i % 2]}/p{i}_{side}.png" for i in range(count)], side)
    return tree


def test_a_published_split_is_kept(tmp_path, monkeypatch, capsys):
    tree, root = published(tmp_path), tmp_path / "root"
    call(monkeypatch, "--source", "folder", "--input", tree, "--output", root)
    assert sorted(p.name for p in root.glob("*.csv")) == ["test.csv", "train_0.csv", "val_0.csv"]
    for name, side, count in (("train_0", "train", 6), ("val_0", "val", 3), ("test", "test", 3)):
        split = read_split(root, name)
        assert len(split) == count and all(f"images/{side}/" in f for f in split.filenames)
    assert "12 of 12 images have no patient" in capsys.readouterr().out
    assert "patient_name" not in (root / "test.csv").read_text()


def test_folds_merge_their_validation_set_and_leave_the_test_set(tmp_path, monkeypatch):
    tree, root = published(tmp_path), tmp_path / "root"
    call(monkeypatch, "--source", "folder", "--input", tree, "--output", root, "--folds", 3)
    assert {f.split("/")[1] for f in read_split(root, "test").filenames} == {"test"}
    held_out = [f for k in range(3) for f in read_split(root, f"val_{k}").filenames]
    assert len(held_out) == len(set(held_out)) == 9 and not any("/test/" in f for f in held_out)


def test_resplit_joins_what_a_published_split_tears(tmp_path, monkeypatch, capsys):
    tree = published(tmp_path)
    picture(0).save(tree / "train/A/same.png")
    picture(0).save(tree / "test/A/same.png")
    flags = ("--source", "folder", "--input", tree, "--patient-pattern", r"^(p\d+|same)")
    call(monkeypatch, *flags, "--output", tmp_path / "a")
    out = capsys.readouterr().out
    assert "the published split has 4 patients and 1 pictures in test and train; --resplit joins them" in out
    facts = json.loads((tmp_path / "a/report.json").read_text())
    assert facts["across_published_split"]["test and train"] == {"patients": 4, "pictures": 1}
    call(monkeypatch, *flags, "--output", tmp_path / "b", "--resplit", "--folds", 2)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, "--check", tmp_path / "b")
    assert "share" not in capsys.readouterr().out and stop.value.code in (0, 1)
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, "--check", tmp_path / "a")
    out = capsys.readouterr().out
    assert stop.value.code == 1 and "train_0.csv and test.csv share 4 patient(s): p0, p1, p2, …" in out
    assert "train_0.csv and test.csv share 1 picture(s): images/train/A/same.png" in out


def test_one_picture_with_two_labels_is_refused_dropped_or_kept(tmp_path, monkeypatch, capsys):
    tree = classes(tmp_path / "tree", [f"{'AB'[i % 2]}/p{i}.png" for i in range(8)])
    picture(0).save(tree / "B/again.png")
    flags = ("--source", "folder", "--input", tree, "--folds", 2, "--output", tmp_path / "root")
    error = refusal(monkeypatch, capsys, *flags)
    assert "1 picture(s) occur with different labels, the first is images/A/p0.png = images/B/again.png" in error
    assert not (tmp_path / "root").exists()
    call(monkeypatch, *flags, "--on-conflict", "drop")
    assert "2 images of 1 pictures with different labels are left out" in capsys.readouterr().out
    assert len(list((tmp_path / "root/images").rglob("*.png"))) == 7 and (tree / "A/p0.png").is_file()
    call(monkeypatch, *flags[:-1], tmp_path / "other", "--on-conflict", "keep")
    assert "1 of them have different labels" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        call(monkeypatch, "--check", tmp_path / "other")
    assert "images/A/p0.png = images/B/again.png: one picture with different labels" in capsys.readouterr().out


def test_report_counts_what_is_there(tmp_path, monkeypatch, capsys):
    tree = classes(tmp_path / "tree", [f"{'AB'[i % 2]}/p{i // 2}_{i}.png" for i in range(8)])
    call(monkeypatch, "--source", "folder", "--input", tree, "--patient-pattern", r"(p\d)_", "--folds", 2, "--output",
         tmp_path / "root")
    facts = json.loads((tmp_path / "root/report.json").read_text())
    total = facts["counts"]["total"]
    assert (total["images"], total["patients"], total["unlabelled"]) == (8, 4, 0)
    assert total["labels"]["A"] == {"images": 4, "patients": 4} and facts["images_per_patient"] == {"2": 4}
    assert facts["sizes"] == {"20x16": 8} and facts["linked"] == 8
    assert Image.open(tmp_path / "root/report.png").width > 600
    assert (tmp_path / "root/report.txt").read_text() in capsys.readouterr().out


# ---- audit


def hand_made(root, **tables):
    (root / "images").mkdir(parents=True)
    for i in range(9):
        picture(i).save(root / f"images/{i}.png")
    for name, rows in tables.items():
        (root / f"{name}.csv").write_text("\n".join(rows) + "\n")
    return root


def faults(monkeypatch, capsys, root):
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, "--check", root)
    out = capsys.readouterr().out.splitlines()
    assert stop.value.code == bool(len(out) - 1)
    return out


HEAD = "filename,A,B,patient_name"


def test_a_sound_root_has_no_faults(tmp_path, monkeypatch, capsys):
    root = hand_made(tmp_path / "r", train_0=[HEAD, "images/0.png,1,0,1", "images/1.png,0,1,2"],
                     val_0=[HEAD, "images/2.png,1,0,3", "images/3.png,0,1,4"],
                     test=[HEAD, "images/4.png,1,0,5", "images/5.png,0,1,6"])
    assert faults(monkeypatch, capsys, root) == [f"{root}: no fault found"]


def test_every_fault_is_listed_at_once(tmp_path, monkeypatch, capsys):
    root = hand_made(
        tmp_path / "r", train_0=[HEAD, "images/0.png,1,0,1", "images/1.png,1,1,7"],
        val_0=[HEAD, "images/2.png,1,0, 7.0", "images/3.png,0,1,4", "images/6.png,1,0,8"],
        test=["filename,B,A,patient_name", "images/4.png,1,0,007", "images/8.png,0,1,6"],
        train_1=[HEAD, "images/gone.png,1,0,1"])
    picture(1).save(root / "images/3.png")  # the picture of images/1.png, with other labels
    (root / "images/6.png").write_bytes(b"no image")
    found = "\n".join(faults(monkeypatch, capsys, root))
    for expected in ("train_1.csv: names 1 missing file(s)", "val_1.csv: missing, fold 1 has only the other half",
                     "(their order differs)", "train_0.csv: A is always positive in 2 images",
                     "images/6.png: cannot be read",
                     "train_0.csv and val_0.csv share 1 patient(s): 7", "train_0.csv and val_0.csv share 1 picture(s)",
                     "train_0.csv and test.csv share 1 patient(s): 7", "one picture with different labels"):
        assert expected in found, (expected, found)
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, "--check", tmp_path / "nowhere")
    assert stop.value.code == 2


def test_patients_are_compared_as_people_write_them():
    assert len({same_name(name) for name in ("7", "7.0", " 7", "007", 7)}) == 1
    assert same_name(" P7") == "p7" and same_name("7a") == "7a" and same_name("nan") == "nan"
    assert across(["a", "b", "a", "c"], ["train", "train", "test", "val"]) == {("test", "train"): ["a"]}
