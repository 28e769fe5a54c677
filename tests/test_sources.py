"""dataset/sources/ on small trees of the published layouts, with the faults that the real files have."""

import hashlib
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core import files
from core.errors import UserError
from dataset.sources import (
    aptos2019,
    csv_table,
    dr_rahim,
    geca,
    idrid,
    medmnist,
    messidor2,
    oct2017,
    oct_and_eye_fundus,
    octdl,
    odir5k,
    rfmid,
    topcon_mm,
)
from dataset.tables import find_image, find_images, match_images, read_table

NUMBERS = count()


def tree(root, *names):
    """Small pictures, all different."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(next(NUMBERS)).integers(0, 256, (6, 8, 3), np.uint8)
        Image.fromarray(pixels).save(path, format="PNG")
    return root


def text(path, content, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode(encoding))


def told(collection):
    """name -> (labels, patient, eye, split) of every record; names are unique."""
    records = list(collection.records)
    assert len(records) == collection.count == len({r.name for r in records})
    return {r.name: (r.labels, r.patient, r.eye, r.split) for r in records}


def refused(message, read, *args, **options):
    with pytest.raises(UserError, match=message) as found:
        list(read(*args, **options).records)
    assert "\n" not in str(found.value)


# ---- tables


@pytest.mark.parametrize(("content", "encoding"), [
    ("id,é b , A\n1,x,0\n", "utf-8-sig"), ("id;é b ; A\r\n1;x;0\r\n", "cp1252"), ("id\té b \t A\n\n1\tx\t0\n", "utf-8"),
    ('"id","é b "," A",,\n"1","x","0",,\n', "utf-8"), ("\r\n\r\nid,é b, A\r\n1,x,0\r\n", "utf-8"),
])
def test_tables_are_read_whatever_their_spelling(tmp_path, content, encoding):
    text(tmp_path / "t.csv", content, encoding)
    table = read_table(tmp_path / "t.csv")
    assert table.columns == ("id", "é b", "A") and table.rows == [{"id": "1", "é b": "x", "A": "0"}]
    assert table.column("a") == "A" and table.column("É_B") == "é b" and table.column("no", required=False) is None


@pytest.mark.parametrize(("content", "message"), [
    ("", "is empty"), ("a,a\n1,2\n", "two columns 'a'"), ("a,b\n1\n", "line 2: 1 cells, expected 2"),
    ("a,b\n1,2\n1,2,3\n", "line 3: 3 cells, expected 2"), ("a,b\n1,\0\n", "NUL"), ('a,b\n"1,2\n', "check its quotes"),
])
def test_tables_that_are_none(tmp_path, content, message):
    text(tmp_path / "t.csv", content)
    refused(message, lambda: read_table(tmp_path / "t.csv"))


def test_an_index_without_a_name_keeps_its_column(tmp_path):
    text(tmp_path / "t.csv", "\tA\n7\t1\n")
    assert read_table(tmp_path / "t.csv").rows == [{"column 1": "7", "A": "1"}]


def test_images_are_found_with_and_without_suffix_and_only_below_the_folder(tmp_path):
    tree(tmp_path, "i/a.PNG", "i/b.Jpg", "i/sub/c.png", "i.png", "d.png")
    found = {name: find_image(tmp_path / "i", name, (".png", ".jpg"))
             for name in ("a", "a.png", "b", "b.JPG", "sub\\c.png", "e", "", ".", "x" * 5000)}
    assert {name: path.relative_to(tmp_path / "i").as_posix() for name, path in found.items() if path} == {
        "a": "a.PNG", "a.png": "a.PNG", "b": "b.Jpg", "b.JPG": "b.Jpg", "sub\\c.png": "sub/c.png"}
    for name in ("../d.png", "sub/../../d", "..\\d", str(tmp_path / "d.png")):
        refused("leads out of", lambda name=name: find_image(tmp_path / "i", name, (".png",)))


def test_rows_and_images_are_matched(tmp_path):
    tree(tmp_path, "a.png", "b.png")
    text(tmp_path / "t.csv", "f,A\na,0\ngone,0\nb,0\nlost,0\n")
    table = read_table(tmp_path / "t.csv")
    a, b, c, d = table.rows
    present, remarks = match_images(table.rows, find_images(table.rows, "f", tmp_path, (".png",)), table)
    assert present == [(a, tmp_path / "a.png"), (c, tmp_path / "b.png")]
    assert remarks == [f"2 of 4 rows of t.csv have no image and were left out, the first is {tmp_path}/t.csv, line 3"]
    refused("none of its 2 images is there", lambda: match_images([b, d], [None, None], table))
    refused("line 4: a.png is listed a second time, the first is .*line 2; keep one row",
            lambda: match_images([a, c], [tmp_path / "a.png"] * 2, table))
    text(tmp_path / "t.csv", "f\na\n../a\n")
    refused(r"t.csv, line 3: f ../a: leads out of", lambda: find_images(
        read_table(tmp_path / "t.csv").rows, "f", tmp_path, (".png",)))


# ---- the published sets


TOPCON = ("NOR", "AMD", "WAMD", "DR", "CSC", "PED", "MEM", "FLD", "EXU", "CNV", "RVO")


def test_topcon_mm_lists(tmp_path):
    one, two = "1 " + "0 " * 9 + "0", "0 " * 10 + "1"
    for split, lines in (("train", f"12-L-1 {one}\n12-R-1 {two}\n"), ("val", f"13-L-1 {one}\n"),
                         ("test", f"14-R-2 {two}\n")):
        text(tmp_path / split / "oct.txt", lines)
    images = "train/Images/oct-images"
    tree(tmp_path, *(f"{images}/{n}.png" for n in ("12-L-1", "12-R-1", "13-L-1", "14-R-2", "99-L-1")))
    found = topcon_mm.read(tmp_path, "oct")
    nor, rvo = (1, *[0] * 10), (*[0] * 10, 1)
    assert found.labels == TOPCON and told(found) == {
        "12-L-1": (nor, "12", "L", "train"), "12-R-1": (rvo, "12", "R", "train"), "13-L-1": (nor, "13", "L", "val"),
        "14-R-2": (rvo, "14", "R", "test")}
    assert found.remarks == ("1 image(s) are in no table and were left out, the first is "
                             "train/Images/oct-images/99-L-1.png",)
    refused("neither train/cfp.txt nor fundus_labels.csv", topcon_mm.read, tmp_path, "fundus")
    (tmp_path / "test/oct.txt").unlink()
    assert topcon_mm.read(tmp_path, "oct").remarks[0] == "test/oct.txt is not there: no images of this set"
    text(tmp_path / "val/oct.txt", f"12-R-1 {one}\n")
    refused("val/oct.txt, line 1: 12-R-1.png is listed a second time", topcon_mm.read, tmp_path, "oct")
    text(tmp_path / "val/oct.txt", f"../../../x {one}\n")
    refused("val/oct.txt, line 1: name ../../../x: leads out of", topcon_mm.read, tmp_path, "oct")
    text(tmp_path / "val/oct.txt", "13-L-1 1 0 2\n")
    refused(r"oct.txt, line 1: '13-L-1 1 0 2', expected a name and 11 of 0 and 1", topcon_mm.read, tmp_path, "oct")


def test_topcon_mm_tables_name_their_files_in_any_column(tmp_path):
    header = "who,scan," + ",".join(reversed(TOPCON))
    gone = "".join(f"/mnt/x,9-L-{i},{'0,' * 10}0\n" for i in range(30))  # a download in part
    text(tmp_path / "fundus_labels.csv", f"{header}\n{gone}/mnt/y,5-L-2,{'0,' * 10}1\n2,6-R-1,1,{'0,' * 9}0\n")
    tree(tmp_path, "fundus_images/5-L-2.JPG", "fundus_images/6-R-1.JPG")
    found = topcon_mm.read(tmp_path, "fundus")
    assert told(found) == {"5-L-2": ((1, *[0] * 10), "5", "L", ""), "6-R-1": ((*[0] * 10, 1), "6", "R", "")}
    assert len(found.remarks) == 1 and found.remarks[0].startswith("30 of 32 rows of fundus_labels.csv have no image")
    tree(tmp_path, "oct_images/one.png")
    text(tmp_path / "oct_labels.csv", f"{header}\n1,one.png,{'0,' * 10}1\n")
    refused("line 2: one is not patient-eye-scan", topcon_mm.read, tmp_path, "oct")
    text(tmp_path / "oct_labels.csv", f"{header}\n1,one.png,{'0,' * 10}yes\n")
    refused("line 2: NOR is 'yes', expected 0 or 1", topcon_mm.read, tmp_path, "oct")
    text(tmp_path / "oct_labels.csv", f"{header}\n1,two.png,{'0,' * 10}1\n")
    refused("no column names files of", topcon_mm.read, tmp_path, "oct")


def npz(path, shape, labels=(0, 1), **changes):
    arrays = {}
    for i, split in enumerate(("train", "val", "test")):
        arrays[f"{split}_images"] = np.full((len(labels), *shape), 10 * i, np.uint8)
        arrays[f"{split}_labels"] = np.array(labels)[:, None]
    np.savez(path, **{**arrays, **changes})
    return path


@pytest.mark.parametrize("shape", [(28, 28), (28, 28, 1), (64, 64, 3)])
def test_medmnist_grey_and_colour(tmp_path, shape):
    npz(tmp_path / "octmnist_64.npz", shape, (3, 0))
    found = medmnist.read_octmnist(tmp_path)
    assert found.labels == ("CNV", "DME", "DRUSEN", "NORMAL")
    records = list(found.records)
    assert told(found) == {f"{split}/{i:06d}": (((0, 0, 0, 1), (1, 0, 0, 0))[i], "", "", split)
                           for split in ("train", "val", "test") for i in (0, 1)}
    assert np.asarray(records[2].draw()).shape == (shape if len(shape) == 3 and shape[2] == 3 else shape[:2])
    assert np.asarray(records[2].draw()).max() == 10


def test_retinamnist_says_what_is_unknown(tmp_path):
    found = medmnist.read_retinamnist(npz(tmp_path / "retinamnist_224.npz", (8, 8, 3), (4, 2)))
    assert found.labels == ("NODR", "MILD", "MODERATE", "SEVERE", "PDR")
    assert "DeepDRiD" in found.remarks[0] and "MD5" in found.remarks[1] and found.stated["images"] == 1600
    own = medmnist.read_retinamnist(npz(tmp_path / "mine.npz", (8, 8, 3)))
    assert len(own.remarks) == 1 and "patients are unknown" in own.remarks[0]


def test_large_arrays_are_read_from_the_disk_as_they_are_used(tmp_path, monkeypatch):
    file, seen = npz(tmp_path / "octmnist.npz", (8, 8)), []
    monkeypatch.setattr(Image, "fromarray", lambda array: seen.append(array) or array)
    expected = [np.array(record.draw()) for record in medmnist.read_octmnist(file).records]
    assert not any(isinstance(array, np.memmap) for array in seen)
    monkeypatch.setattr(files, "MAPPED", 0)
    found = [record.draw() for record in medmnist.read_octmnist(file).records]
    assert all(isinstance(array, np.memmap) for array in found) and all(map(np.array_equal, found, expected))


def test_an_npz_is_known_by_its_md5(tmp_path, monkeypatch):
    file = npz(tmp_path / "octmnist_224.npz", (4, 4))
    assert len(medmnist.read_octmnist(file).remarks) == 2
    digest = hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest()
    monkeypatch.setitem(medmnist.MD5, "octmnist_224.npz", digest)
    assert medmnist.read_octmnist(file).remarks == (medmnist.OCT2017,)


def test_npz_files_that_are_none(tmp_path):
    refused("found none, expected one octmnist", medmnist.read_octmnist, tmp_path)
    npz(tmp_path / "octmnist.npz", (4, 4))
    npz(tmp_path / "octmnist_64.npz", (4, 4))
    refused("found octmnist.npz, octmnist_64.npz, expected one octmnist", medmnist.read_octmnist, tmp_path)
    (tmp_path / "octmnist_64.npz").unlink()
    (tmp_path / "octmnist.npz").write_bytes(b"PK")
    refused("octmnist.npz: ", medmnist.read_octmnist, tmp_path)
    wrong = npz(tmp_path / "a.npz", (4, 4, 3), (0, 5))
    refused(r"train_labels\[1\] is 5, expected 0 to 4", medmnist.read_retinamnist, wrong)
    refused("float64", medmnist.read_retinamnist, npz(tmp_path / "b.npz", (4, 4), val_images=np.zeros((2, 4, 4))))
    np.savez(tmp_path / "c.npz", train_images=np.zeros(3))
    refused("has no `train_labels`", medmnist.read_retinamnist, tmp_path / "c.npz")
    np.savez(tmp_path / "d.npz", **{f"{s}_{k}": np.array([{}], object) for s in ("train", "val", "test")
                                    for k in ("images", "labels")})
    refused("d.npz: damaged .Object arrays cannot be loaded", medmnist.read_retinamnist, tmp_path / "d.npz")


def test_octdl(tmp_path):
    text(tmp_path / "OCTDL_labels.csv", "file_name,disease,subcategory,condition,patient_id,eye,sex,year,image_width,"
         "image_hight\namd_1,AMD,x,y,4986761,0,0,0,8,6\ndme_1,DME,x,y,4986761,OD,M,2019,8,6\ngone,NO,,,3,OS,F,0,8,6\n")
    tree(tmp_path, "OCTDL/AMD/amd_1.jpg", "OCTDL/DME/dme_1.jpg", "OCTDL/NO/more.jpg")
    found = octdl.read(tmp_path)
    assert told(found) == {"amd_1": ((1, 0, 0, 0, 0, 0, 0), "4986761", "", ""),
                           "dme_1": ((0, 0, 0, 1, 0, 0, 0), "4986761", "OD", "")}
    assert [remark.split(",")[0] for remark in found.remarks] == [
        "1 of 3 rows of OCTDL_labels.csv have no image and were left out", "the eye is unknown for 1 images",
        "1 image(s) are in no table and were left out"]
    text(tmp_path / "OCTDL_labels.csv", "file_name,disease,patient_id\namd_1,XYZ,1\n")
    refused("line 2: disease is 'XYZ', expected one of AMD", octdl.read, tmp_path)
    text(tmp_path / "OCTDL_labels.csv", "file_name,disease,patient_id\namd_1,AMD,1\namd_1.jpg,DME,1\n")
    refused("line 3: amd_1.jpg is listed a second time", octdl.read, tmp_path)
    tree(tmp_path, "OCTDL/DME/amd_1.jpg")
    refused("OCTDL/AMD/amd_1.jpg and .*OCTDL/DME/amd_1.jpg have one name", octdl.read, tmp_path)
    text(tmp_path / "labels.csv", "file_name,disease,patient_id\namd_1,AMD,1\n")
    refused("found 2 of OCTDL_labels.csv and labels.csv", octdl.read, tmp_path)


def test_oct2017_names_meet_and_folders_have_blanks(tmp_path):
    tree(tmp_path, "OCT2017 /train/CNV/CNV-1-1.jpeg", "OCT2017 /test/CNV/CNV-1-1.jpeg",
         "OCT2017 /val/NORMAL/NORMAL-2-3.JPEG", "OCT2017 /readme/x.png", "__MACOSX/train/CNV/CNV-1-1.jpeg")
    text(tmp_path / "OCT2017 /train/.DS_Store", "x")
    found = oct2017.read(tmp_path)
    assert told(found) == {"test/CNV/CNV-1-1": ((1, 0, 0, 0), "1", "", "test"),
                           "train/CNV/CNV-1-1": ((1, 0, 0, 0), "1", "", "train"),
                           "val/NORMAL/NORMAL-2-3": ((0, 0, 0, 1), "2", "", "val")}
    assert len(found.remarks) == 1 and "readme/x.png" in found.remarks[0]
    tree(tmp_path, "OCT2017 /train/DME/odd.jpeg")
    assert found.stated == {"images": 109309} and oct2017.read(tmp_path).remarks[0] == (
        "the patient of 1 image(s) is unknown: not named CLASS-PATIENT-N, the first is OCT2017 /train/DME/odd.jpeg")
    tree(tmp_path, "OCT2017 /train/DME/CNV-7-1.jpeg")
    refused("named CNV but lies in DME", oct2017.read, tmp_path)


@pytest.mark.parametrize("base", ["CellData/OCT", "."])
def test_oct2017_from_the_folder_itself(tmp_path, monkeypatch, base):
    tree(tmp_path, f"{base}/test/drusen/DRUSEN-3-1.jpeg", "loose.png")
    monkeypatch.chdir(tmp_path)
    found = oct2017.read(Path("."))
    assert told(found) == {"test/DRUSEN/DRUSEN-3-1": ((0, 0, 1, 0), "3", "", "test")}
    assert found.remarks == ("1 image(s) lie in no class folder and were left out, the first is loose.png",)
    (tmp_path / "empty").mkdir()
    refused("found no image in {train,val,test}", oct2017.read, tmp_path / "empty")
    refused("no such folder", oct2017.read, tmp_path / "nowhere")


def test_odir5k_has_labels_of_eyes_and_of_patients(tmp_path):
    header = "ID,Left-Diagnostic Keywords,N,D,G,C,A,H,M,O,filepath,labels,target,filename"
    text(tmp_path / "full_df.csv", f"{header}\n5,白内障\uff0ccataract,0,1,0,1,0,0,0,0,../input/x,['C'],[],5_left.jpg\n"
         f"5,normal,0,1,0,1,0,0,0,0,../input/y,['D'],[],5_right.jpg\n")
    tree(tmp_path, "preprocessed_images/5_left.jpg", "preprocessed_images/5_right.jpg", "Testing Images/9_left.jpg")
    eye, patient = odir5k.read(tmp_path), odir5k.read(tmp_path, "patient")
    assert told(eye) == {"5_left": ((0, 0, 0, 1, 0, 0, 0, 0), "5", "left", ""),
                         "5_right": ((0, 1, 0, 0, 0, 0, 0, 0), "5", "right", "")}
    assert {labels for labels, *_ in told(patient).values()} == {(0, 1, 0, 1, 0, 0, 0, 0)}
    assert eye.remarks == ("labels are those of each eye; the eye's differ from the patient's in 2 images",)
    tree(tmp_path, "preprocessed_images/8_left.jpg")
    assert odir5k.read(tmp_path).remarks[1].endswith("the first is preprocessed_images/8_left.jpg")
    refused("--label-level both: expected eye or patient", odir5k.read, tmp_path, "both")
    text(tmp_path / "full_df.csv", f"{header}\n5,x,0,1,0,1,0,0,0,0,x,['Q'],[],5_left.jpg\n")
    refused("line 2: labels is \"\\['Q'\\]\", expected a list of N D G", odir5k.read, tmp_path)
    text(tmp_path / "full_df.csv", f"{header}\n5,x,0,3,0,1,0,0,0,0,x,['D'],[],5_left.jpg\n")
    refused("line 2: D is '3', expected 0 or 1", odir5k.read, tmp_path)


@pytest.mark.parametrize("layout", ["grand challenge", "kaggle"])
def test_rfmid_numbers_start_again_in_every_split(tmp_path, layout):
    places = {"grand challenge": (
        ("2. Groundtruths/a. RFMiD_Training_Labels.csv", "1. Original Images/a. Training Set"),
        ("2. Groundtruths/b. RFMiD_Validation_Labels.csv", "1. Original Images/b. Validation Set"),
        ("2. Groundtruths/c. RFMiD_Testing_Labels.csv", "1. Original Images/c. Testing Set")), "kaggle": (
        ("Training_Set/Training_Set/RFMiD_Training_Labels.csv", "Training_Set/Training_Set/Training"),
        ("Evaluation_Set/Evaluation_Set/RFMiD_Validation_Labels.csv", "Evaluation_Set/Evaluation_Set/Validation"),
        ("Test_Set/Test_Set/RFMiD_Testing_Labels.csv", "Test_Set/Test_Set/Test"))}[layout]
    for table, images in places:
        text(tmp_path / table, "ID,Disease_Risk,DR,ARMD,HPED\r\n1,1,1,0,0\r\n2,0,0,0,0\r\n")
        tree(tmp_path, f"{images}/1.png", f"{images}/2.png")
        name = table.rpartition("/")[2]
        text(tmp_path / "__MACOSX" / f"._{name}", "\0")
    found = rfmid.read(tmp_path)
    assert found.labels == ("DR", "ARMD", "HPED") and told(found) == {
        f"{split}/{i}": ((int(i == 1), 0, 0), "", "", split) for split in ("train", "val", "test") for i in (1, 2)}
    assert found.remarks == ()
    text(tmp_path / table, "ID,Disease_Risk,DR,HPED\r\n1,1,1,0\r\n")
    refused("Testing_Labels.csv: labels DR HPED, expected those of the other tables", rfmid.read, tmp_path)
    text(tmp_path / table, "ID,Disease_Risk,DR,ARMD,HPED\r\n2,1,1,0,9\r\n")
    refused("Testing_Labels.csv, line 2: HPED is '9', expected 0 or 1", rfmid.read, tmp_path)
    text(tmp_path / "copy/RFMiD_Testing_Labels.csv", "ID,Disease_Risk,DR\r\n1,1,1\r\n")
    refused("found two tables of the test set", rfmid.read, tmp_path)
    refused("expected tables such as RFMiD_Training_Labels.csv", rfmid.read, tmp_path / images)


def test_aptos2019(tmp_path):
    text(tmp_path / "train.csv", "id_code,diagnosis\nab,4\ncd,0\n")
    text(tmp_path / "sample_submission.csv", "id_code,diagnosis\nzz,0\n")
    tree(tmp_path, "train_images/ab.png", "train_images/cd.png", "test_images/zz.png")
    found = aptos2019.read(tmp_path)
    assert told(found) == {"ab": ((0, 0, 0, 0, 1), "", "", ""), "cd": ((1, 0, 0, 0, 0), "", "", "")}
    assert found.remarks == () and found.stated["NODR"] == 1805 and sum(found.stated.values()) == 2 * 3662
    text(tmp_path / "train.csv", "id_code,diagnosis\nab,4\nno,0\n")
    assert [remark[:48] for remark in aptos2019.read(tmp_path).remarks] == [
        "1 of 2 rows of train.csv have no image and were ", "1 image(s) are in no table and were left out, th"]
    text(tmp_path / "train.csv", "id_code,diagnosis\nab,5\n")
    refused("line 2: diagnosis is '5', expected one of 0, 1, 2, 3, 4", aptos2019.read, tmp_path)
    text(tmp_path / "train.csv", "id_code,diagnosis\n../../ab,1\n")
    refused(r"train.csv, line 2: id_code ../../ab: leads out of", aptos2019.read, tmp_path)


def test_idrid_numbers_its_test_set_again(tmp_path):
    base = tmp_path / "B. Disease Grading"
    header = "Image name,Retinopathy grade,Risk of macular edema ,,,,,,,,,"
    for word, letter, grade in (("Training", "a", 2), ("Testing", "b", 3)):
        text(base / f"2. Groundtruths/{letter}. IDRiD_Disease Grading_{word} Labels.csv",
             f"{header}\r\nIDRiD_001,{grade},0,,,,,,,,,\r\n")
        tree(base, f"1. Original Images/{letter}. {word} Set/IDRiD_001.jpg")
        text(tmp_path / f"__MACOSX/1. Original Images/{letter}. {word} Set/._IDRiD_001.jpg", "x")
        text(tmp_path / f"__MACOSX/2. Groundtruths/._{word} Labels.csv", "x")
    assert told(idrid.read(tmp_path)) == {"train/IDRiD_001": ((0, 0, 1, 0, 0), "", "", "train"),
                                          "test/IDRiD_001": ((0, 0, 0, 1, 0), "", "", "test")}
    refused("found 0 folder", idrid.read, tmp_path / "B. Disease Grading/2. Groundtruths")
    tree(base, "1. Original Images/b. Testing Set/IDRiD_002.jpg")
    assert [remark.rpartition("/")[2] for remark in idrid.read(tmp_path).remarks] == ["IDRiD_002.jpg"]
    text(base / "2. Groundtruths/b. IDRiD_Disease Grading_Testing Labels.csv",
         f"{header}\r\nIDRiD_001,x,0,,,,,,,,,\r\n")
    refused("line 2: Retinopathy grade is 'x', expected one of 0, 1, 2, 3, 4", idrid.read, tmp_path)


@pytest.mark.parametrize("names", [("image_id", "adjudicated_dr_grade"), ("id_code", "diagnosis")])
def test_messidor2_leaves_out_what_cannot_be_graded(tmp_path, names):
    text(tmp_path / "messidor_data.csv", f"{','.join(names)},adjudicated_dme,adjudicated_gradable\n"
         "20051019_38557_0100_PP.png,0,0,1\nIM000001.jpg,2,0,1\nIM000002.JPG,,,0\n")
    tree(tmp_path, "IMAGES/20051019_38557_0100_PP.png", "IMAGES/IM000001.JPG", "IMAGES/IM000002.JPG")
    found = messidor2.read(tmp_path)
    assert [(labels, patient) for labels, patient, *_ in told(found).values()] == [
        ((1, 0, 0, 0, 0), ""), ((0, 0, 1, 0, 0), "")]
    assert "1 images could not be graded" in found.remarks[0] and "messidor-2.csv is not there" in found.remarks[1]
    text(tmp_path / "messidor-2.csv", "left;right\n20051019_38557_0100_PP.png;IM000001.JPG\n")
    assert [row[1:3] for row in told(messidor2.read(tmp_path)).values()] == [
        ("20051019_38557_0100_PP", "left"), ("20051019_38557_0100_PP", "right")]
    text(tmp_path / "messidor-2.csv", "left;right\n20051019_38557_0100_PP.png;x.png\n")
    assert messidor2.read(tmp_path).remarks[1] == "messidor-2.csv names no patient for 1 images"
    text(tmp_path / "messidor_data.csv", f"{','.join(names)},adjudicated_gradable\nIM000001.JPG,2,maybe\n")
    refused("line 2: adjudicated_gradable is 'maybe', expected 0 or 1", messidor2.read, tmp_path)
    text(tmp_path / "messidor_data.csv", f"{','.join(names)}\nIM000001.JPG,7\n")
    refused(f"line 2: {names[1]} is '7', expected one of 0, 1, 2, 3, 4", messidor2.read, tmp_path)


def test_dr_rahim(tmp_path):
    base = "DR and maculopathy 10 classes"
    tree(tmp_path, f"{base}/1 - No DR/Patient001_L.jpg", f"{base}/7 - Severe DR with maculopathy/Patient001_R.jpg",
         f"{base}/10 - ADED/Patient254-R.jpg")
    found = dr_rahim.read(tmp_path)
    assert told(found) == {"Patient001_L": ((1, 0, 0, 0, 0), "001", "L", ""),
                           "Patient001_R": ((0, 0, 0, 1, 0), "001", "R", ""),
                           "Patient254-R": ((0, 0, 0, 0, 1), "254", "R", "")}
    assert found.remarks == ("Patient254-R.jpg: not named as the others, taken all the same",
                             "1 images of ADED (advanced diabetic eye disease) count as PDR")
    assert found.stated["PDR"] == 23 and sum(found.stated[label] for label in found.labels) == found.stated["images"]
    text(tmp_path / "labels.csv", "x")
    text(tmp_path / "read.me", "x")
    assert dr_rahim.read(tmp_path).remarks[0] == "1 file(s) are no images and were left out, the first is read.me"
    tree(tmp_path, f"{base}/11 - Other/Patient002_L.jpg")
    refused("expected CLASS/PatientNNN_L.jpg", dr_rahim.read, tmp_path)


def test_the_release_names_labels_in_any_order(tmp_path):
    text(tmp_path / "oct_multilabel/train_0.csv", ",filename,A,B\n0,imgs/a.png,1,0\n")
    text(tmp_path / "oct_multilabel/val_0.csv", "x,filename,B,A\n0,imgs/b.png,1.0,0.0\n")
    tree(tmp_path, "imgs/a.png", "imgs/b.png")
    found = geca.read(tmp_path)
    assert found.labels == ("A", "B") and told(found) == {"imgs/a": ((1, 0), "", "", "train"),
                                                          "imgs/b": ((0, 1), "", "", "val")}
    tree(tmp_path, "oct_multilabel/v.1/b.PNG", "imgs/c.png")
    text(tmp_path / "oct_multilabel/val_0.csv", "x,filename,A,B\n0,v.1\\b,1,0\n")
    found = geca.read(tmp_path)
    assert found.remarks == ("2 image(s) are in no table and were left out, the first is imgs/b.png",)
    assert told(found)["v.1/b"] == ((1, 0), "", "", "val")
    for content, message in (("0,imgs/a.png,1,0", "line 2: imgs/a.png is listed a second time"),
                             ("0,../x.png,1,0", "line 2: filename ../x.png: leads out of"),
                             ("0,imgs/b.png,1,2", "line 2: B is '2', expected 0 or 1")):
        text(tmp_path / "oct_multilabel/val_0.csv", f"x,filename,A,B\n{content}\n")
        refused(message, geca.read, tmp_path)
    text(tmp_path / "oct_multilabel/val_0.csv", ",filename,B,C\n0,imgs/b.png,1,0\n")
    refused("labels B C, expected A B", geca.read, tmp_path)


@pytest.mark.parametrize(("modality", "kind", "letter"), [("oct", "OCT", "o"), ("fundus", "EYE FUNDUS", "f")])
def test_oct_and_eye_fundus(tmp_path, modality, kind, letter):
    rows = (f"0001_OD_{letter}_1,0,NPDR,9X9,jpg", f"0001_OI_{letter}_1,1,-,9X9,jpg", f"0002_od_{letter}_1,1,,9X9,jpg",
            "odd,0,0,9X9,jpg", f"0009_OD_{letter}_1,0,0,9X9,jpg")
    text(tmp_path / f"{kind}.csv", "\r\n".join(("Name,DME,DR ,Size,Format", *rows)), "utf-8-sig")
    tree(tmp_path, f"{kind}/{kind}1/0001_OD_{letter}_1.jpg", f"{kind}/{kind}2/0001_OI_{letter}_1.JPG",
         f"{kind}/{kind}2/0002_od_{letter}_1.jpg", f"{kind}/{kind}2/odd.jpg", f"{kind}/{kind}3/0007_OD_{letter}_1.jpg")
    found = oct_and_eye_fundus.read(tmp_path, modality)
    assert found.labels == ("NODR", "NPDR", "PDR", "DME") and told(found) == {
        f"0001_OD_{letter}_1": ((0, 1, 0, 0), "0001", "OD", ""),
        f"0001_OI_{letter}_1": ((0, 0, 0, 1), "0001", "OI", ""),
        f"0002_od_{letter}_1": ((0, 0, 0, 1), "0002", "OD", ""), "odd": ((1, 0, 0, 0), "odd", "", "")}
    assert found.stated == {"images": {"oct": 1113, "fundus": 1548}[modality]} and found.remarks == (
        f"1 of 5 rows of {kind}.csv have no image and were left out, the first is {tmp_path}/{kind}.csv, line 6",
        f"1 image(s) are in no table and were left out, the first is {kind}/{kind}3/0007_OD_{letter}_1.jpg",
        "2 images have no grade of retinopathy: NODR, NPDR and PDR are all 0")
    tree(tmp_path, f"{kind}/{kind}3/odd.jpg")
    refused(f"{kind}3/odd.jpg and .*{kind}2/odd.jpg have one name", oct_and_eye_fundus.read, tmp_path, modality)


# ---- anybody's own


def test_a_table_is_guessed_and_said(tmp_path):
    tree(tmp_path, "pics/a.PNG", "pics/sub/b.png", "pics/c.png", "pics/left.png")
    text(tmp_path / "t.csv", "No;File;Patient ID;laterality;split;Drusen;Fluid\n1;a;p1;L;train;1.0;0\n"
         "2;sub/b;p1;R;train;0;1\n3;c;p2;L;Test;0;0\n", "cp1252")
    found = csv_table.read(tmp_path / "pics", tmp_path / "t.csv")
    assert found.labels == ("Drusen", "Fluid") and told(found) == {
        "a": ((1, 0), "p1", "L", "train"), "sub/b": ((0, 1), "p1", "R", "train"), "c": ((0, 0), "p2", "L", "test")}
    assert found.remarks == (
        "columns: images from 'File', labels from 'Drusen Fluid', patients from 'Patient ID', eyes from 'laterality', "
        "split from 'split'", "1 image(s) are in no table and were left out, the first is left.png")


def test_one_column_of_categories_becomes_one_hot(tmp_path):
    tree(tmp_path, *(f"{i}.png" for i in range(6)))
    rows = "\n".join(f"{i}.png,{'normal' if i < 3 else 'amd'},{i % 2}.0" for i in range(6))
    text(tmp_path / "t.csv", f"file,diagnosis,grade\n{rows}\n")
    words = csv_table.read(tmp_path, tmp_path / "t.csv", label_columns=["diagnosis"])
    assert words.labels == ("amd", "normal") and told(words)["0"] == ((0, 1), "", "", "")
    text(tmp_path / "t.csv", "file,grade\n" + "\n".join(f"{i}.png,{i % 3}" for i in range(6)))
    grades = csv_table.read(tmp_path, tmp_path / "t.csv")
    assert grades.labels == ("grade_0", "grade_1", "grade_2") and told(grades)["5"] == ((0, 0, 1), "", "", "")


@pytest.mark.parametrize(("content", "options", "message"), [
    ("file,A\n0.png,2\n1.png,0\n", {"label_columns": ["A"], "image_column": "file"}, None),
    ("file,A,B\n0.png,2,1\n1.png,0,1\n", {"label_columns": ["A", "B"]}, "line 2: A is '2', expected 0 or 1"),
    ("file,A\nx.png,1\n", {}, "no column names files of"),
    ("file,A\n0.png,1\n", {"image_column": "F"}, "--image-column F"),
    ("file,A,B\n0.png,x,1u\n1.png,y,2u\n0.png,x,1u\n1.png,y,2u\n", {}, r"found 2 column\(s\) that could be labels"),
    ("file,split,A\n0.png,dev,1\n1.png,train,0\n", {"split_column": "split"}, "split is 'dev', expected train, val"),
    ("file,A\n../0.png,1\n", {"image_column": "file"}, "leads out of"),
])
def test_tables_that_need_a_word(tmp_path, content, options, message):
    tree(tmp_path / "i", "0.png", "1.png")
    text(tmp_path / "t.csv", content)
    if message:
        refused(message, csv_table.read, tmp_path / "i", tmp_path / "t.csv", **options)
    else:
        assert csv_table.read(tmp_path / "i", tmp_path / "t.csv", **options).labels == ("A_0", "A_2")
