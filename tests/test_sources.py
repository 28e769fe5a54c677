"""dataset/sources/ on small trees of the published layouts, with the faults that the real files have."""

from itertools import count

import numpy as np
import pytest
from PIL import Image

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
    octdl,
    odir5k,
    rfmid,
    topcon_mm,
)
from dataset.tables import read_table

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
    ('"id","é b "," A",,\n"1","x","0",,\n', "utf-8"),
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
    text(tmp_path / "val/oct.txt", "13-L-1 1 0 2\n")
    refused(r"oct.txt, line 1: '13-L-1 1 0 2', expected a name and 11 of 0 and 1", topcon_mm.read, tmp_path, "oct")


def test_topcon_mm_tables_name_their_files_in_any_column(tmp_path):
    header = "who,scan," + ",".join(reversed(TOPCON))
    text(tmp_path / "fundus_labels.csv", f"{header}\n1,5-L-2,{'0,' * 10}1\n2,6-R-1,1,{'0,' * 9}0\n")
    tree(tmp_path, "fundus_images/5-L-2.JPG", "fundus_images/6-R-1.JPG")
    assert told(topcon_mm.read(tmp_path, "fundus")) == {
        "5-L-2": ((1, *[0] * 10), "5", "L", ""), "6-R-1": ((*[0] * 10, 1), "6", "R", "")}


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
    assert len(own.remarks) == 1


def test_npz_files_that_are_none(tmp_path):
    refused("found none, expected one octmnist", medmnist.read_octmnist, tmp_path)
    (tmp_path / "octmnist.npz").write_bytes(b"PK")
    refused("octmnist.npz: ", medmnist.read_octmnist, tmp_path)
    wrong = npz(tmp_path / "a.npz", (4, 4, 3), (0, 5))
    refused(r"train_labels\[1\] is 5, expected 0 to 4", medmnist.read_retinamnist, wrong)
    refused("float64", medmnist.read_retinamnist, npz(tmp_path / "b.npz", (4, 4), val_images=np.zeros((2, 4, 4))))
    np.savez(tmp_path / "c.npz", train_images=np.zeros(3))
    refused("has no train_labels", medmnist.read_retinamnist, tmp_path / "c.npz")
    np.savez(tmp_path / "d.npz", **{f"{s}_{k}": np.array([{}], object) for s in ("train", "val", "test")
                                    for k in ("images", "labels")})
    refused("d.npz: no .npz file", medmnist.read_retinamnist, tmp_path / "d.npz")


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


def test_oct2017_names_meet_and_folders_have_blanks(tmp_path):
    tree(tmp_path, "OCT2017 /train/CNV/CNV-1-1.jpeg", "OCT2017 /test/CNV/CNV-1-1.jpeg",
         "OCT2017 /val/NORMAL/NORMAL-2-3.JPEG", "OCT2017 /readme/x.png", "__MACOSX/train/CNV/CNV-1-1.jpeg")
    text(tmp_path / "OCT2017 /train/.DS_Store", "x")
    found = oct2017.read(tmp_path)
    assert told(found) == {"test/CNV/CNV-1-1": ((1, 0, 0, 0), "1", "", "test"),
                           "train/CNV/CNV-1-1": ((1, 0, 0, 0), "1", "", "train"),
                           "val/NORMAL/NORMAL-2-3": ((0, 0, 0, 1), "2", "", "val")}
    assert len(found.remarks) == 1 and "readme/x.png" in found.remarks[0]
    tree(tmp_path, "OCT2017 /train/DME/CNV-7-1.jpeg")
    refused("named CNV but lies in DME", oct2017.read, tmp_path)


def test_odir5k_has_labels_of_eyes_and_of_patients(tmp_path):
    header = "ID,Left-Diagnostic Keywords,N,D,G,C,A,H,M,O,filepath,labels,target,filename"
    text(tmp_path / "full_df.csv", f"{header}\n5,白内障\uff0ccataract,0,1,0,1,0,0,0,0,../input/x,['C'],[],5_left.jpg\n"
         f"5,normal,0,1,0,1,0,0,0,0,../input/y,['D'],[],5_right.jpg\n")
    tree(tmp_path, "preprocessed_images/5_left.jpg", "preprocessed_images/5_right.jpg", "Testing Images/9_left.jpg")
    eye, patient = odir5k.read(tmp_path), odir5k.read(tmp_path, "patient")
    assert told(eye) == {"5_left": ((0, 0, 0, 1, 0, 0, 0, 0), "5", "left", ""),
                         "5_right": ((0, 1, 0, 0, 0, 0, 0, 0), "5", "right", "")}
    assert {labels for labels, *_ in told(patient).values()} == {(0, 1, 0, 1, 0, 0, 0, 0)}
    assert "differ from the patient's in 2 images" in eye.remarks[-1]


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
    found = rfmid.read(tmp_path)
    assert found.labels == ("DR", "ARMD", "HPED") and told(found) == {
        f"{split}/{i}": ((int(i == 1), 0, 0), "", "", split) for split in ("train", "val", "test") for i in (1, 2)}
    assert found.remarks == ()


def test_aptos2019(tmp_path):
    text(tmp_path / "train.csv", "id_code,diagnosis\nab,4\ncd,0\n")
    text(tmp_path / "sample_submission.csv", "id_code,diagnosis\nzz,0\n")
    tree(tmp_path, "train_images/ab.png", "train_images/cd.png", "test_images/zz.png")
    found = aptos2019.read(tmp_path)
    assert told(found) == {"ab": ((0, 0, 0, 0, 1), "", "", ""), "cd": ((1, 0, 0, 0, 0), "", "", "")}
    text(tmp_path / "train.csv", "id_code,diagnosis\nab,5\n")
    refused("line 2: diagnosis is '5', expected one of 0, 1, 2, 3, 4", aptos2019.read, tmp_path)
    text(tmp_path / "train.csv", "id_code,diagnosis\n../../ab,1\n")
    refused("leads out of", aptos2019.read, tmp_path)


def test_idrid_numbers_its_test_set_again(tmp_path):
    base = tmp_path / "B. Disease Grading"
    header = "Image name,Retinopathy grade,Risk of macular edema ,,,,,,,,,"
    for word, letter, grade in (("Training", "a", 2), ("Testing", "b", 3)):
        text(base / f"2. Groundtruths/{letter}. IDRiD_Disease Grading_{word} Labels.csv",
             f"{header}\r\nIDRiD_001,{grade},0,,,,,,,,,\r\n")
        tree(base, f"1. Original Images/{letter}. {word} Set/IDRiD_001.jpg")
    assert told(idrid.read(tmp_path)) == {"train/IDRiD_001": ((0, 0, 1, 0, 0), "", "", "train"),
                                          "test/IDRiD_001": ((0, 0, 0, 1, 0), "", "", "test")}
    refused("found 0 folder", idrid.read, tmp_path / "B. Disease Grading/2. Groundtruths")


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
    tree(tmp_path, f"{base}/11 - Other/Patient002_L.jpg")
    refused("expected CLASS/PatientNNN_L.jpg", dr_rahim.read, tmp_path)


def test_the_release_names_labels_in_any_order(tmp_path):
    text(tmp_path / "oct_multilabel/train_0.csv", ",filename,A,B\n0,imgs/a.png,1,0\n")
    text(tmp_path / "oct_multilabel/val_0.csv", "x,filename,B,A\n0,imgs/b.png,1.0,0.0\n")
    tree(tmp_path, "imgs/a.png", "imgs/b.png")
    found = geca.read(tmp_path)
    assert found.labels == ("A", "B") and told(found) == {"imgs/a": ((1, 0), "", "", "train"),
                                                          "imgs/b": ((0, 1), "", "", "val")}
    text(tmp_path / "oct_multilabel/val_0.csv", ",filename,B,C\n0,imgs/b.png,1,0\n")
    refused("labels B C, expected A B", geca.read, tmp_path)


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
