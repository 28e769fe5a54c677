"""metrics/classification.py and dataset/eyes.py: against reference values, by hand, against brute force."""


import json

import numpy as np
import pytest
from helpers import GOLDEN_METRICS, classified_set

from core.errors import UserError
from dataset.eyes import eye_names
from dataset.root import read_split
from metrics.classification import SCORES, all_scores, choose_thresholds, eyes, label_scores

GOLDEN = GOLDEN_METRICS["classification"]


def test_equals_the_reference_values():
    scores, labels = classified_set()
    found = all_scores(scores, labels, [str(k) for k in range(11)])
    for k, expected in enumerate(GOLDEN["per_class"]):
        assert {key: found["labels"][str(k)][key] for key in SCORES} == pytest.approx(expected, abs=1e-9)
    assert {key: found["macro"][key] for key in SCORES} == pytest.approx(GOLDEN["mean"], abs=1e-9)
    assert found["macro"]["labels"] == 11


def test_by_hand():
    """Exactly 0.5 means that the label is there. Then: 2 of 3 found, 1 false alarm in 2, so precision 2/3.

    Positives rank 1, 2, 5 among five: AP = (1 + 1 + 3/5) / 3; of 3 · 2 pairs 4 are in order.
    """
    found = label_scores([0.9, 0.5, 0.4, 0.499, 0.1], [1, 1, 0, 0, 1])
    assert (found["sen"], found["spe"]) == pytest.approx((2 / 3, 1))
    found = label_scores([0.9, 0.8, 0.7, 0.2, 0.1], [1, 1, 0, 0, 1])
    assert found == pytest.approx({"positives": 3, "negatives": 2, "sen": 2 / 3, "spe": 1 / 2, "auc": 4 / 6,
                                   "f1": 4 / 6, "f1_sen_spe": 4 / 7, "ap": 2.6 / 3})


def test_nothing_predicted_is_zero():
    found = label_scores([0.1, 0.2, 0.3], [0, 1, 0])
    assert (found["sen"], found["spe"], found["f1"], found["f1_sen_spe"]) == (0, 1, 0, 0)
    found = label_scores([0.9, 0.1], [0, 1])
    assert (found["sen"], found["spe"], found["f1_sen_spe"]) == (0, 0, 0)


def test_undefined_labels_are_left_out():
    """Of three labels one has no positive image and one no negative: the mean is that of the third."""
    scores = np.array([[0.9, 0.3, 0.2], [0.8, 0.1, 0.7], [0.2, 0.6, 0.8]])
    found = all_scores(scores, np.array([[0, 1, 1], [0, 1, 0], [0, 1, 1]]), "ABC")
    for name, counts in (("A", (0, 3)), ("B", (3, 0))):
        row = found["labels"][name]
        assert all(row[key] is None for key in SCORES) and (row["positives"], row["negatives"]) == counts
    assert found["macro"] == {key: found["labels"]["C"][key] for key in SCORES} | {"labels": 1}
    assert found["macro"]["ap"] == pytest.approx((1 + 2 / 3) / 2)
    nothing = all_scores(scores, np.zeros((3, 3)), "ABC")["macro"]
    assert nothing == dict.fromkeys(SCORES) | {"labels": 0}
    json.dumps(found, allow_nan=False)


# ---- thresholds


def test_threshold_by_hand():
    """Above 0.3: both positives and none of the negatives below; half-way between 0.2 and 0.3."""
    assert choose_thresholds(np.array([[0.1], [0.2], [0.3], [0.35]]), np.array([[0], [0], [1], [1]])) == [0.25]


def test_thresholds_are_the_best_there_are():
    scores, labels = classified_set()
    chosen = choose_thresholds(scores, labels)

    def f1_sen_spe(k, threshold):
        said, true = scores[:, k] >= threshold, labels[:, k] == 1
        sen, spe = said[true].mean(), (~said[~true]).mean()
        return 2 * sen * spe / (sen + spe)

    reached = [f1_sen_spe(k, t) for k, t in enumerate(chosen)]
    for k, best in enumerate(reached):
        assert best >= max(f1_sen_spe(k, t) for t in np.linspace(0.02, 0.9, 400)) - 1e-12
    found = all_scores(scores, labels, range(11), chosen)["macro"]["f1_sen_spe"]
    assert found == pytest.approx(np.mean(reached)) and found > GOLDEN["mean"]["f1_sen_spe"] + 0.02


def test_of_equal_thresholds_the_one_nearest_to_a_half():
    """At 0.75 Sen and Spe are 1/2 and 1, at 0.2 they are 1 and 1/2; 0.75 is nearer."""
    scores, labels = np.array([[0.1], [0.3], [0.6], [0.9]]), np.array([[0], [1], [0], [1]])
    assert choose_thresholds(scores, labels) == [0.75]


def test_no_threshold_where_none_can_be_chosen():
    scores = np.array([[0.5, 0.1, 0.9], [0.5, 0.2, 0.1]])
    assert choose_thresholds(scores, np.array([[1, 0, 0], [0, 0, 1]])) == [None, None, None]
    found = all_scores(scores, np.array([[1, 0, 0], [0, 1, 1]]), "ABC", [None, 0.15, None])
    assert (found["labels"]["A"]["sen"], found["labels"]["A"]["spe"]) == (1, 0)  # at 0.5
    assert (found["labels"]["B"]["sen"], found["labels"]["B"]["spe"]) == (1, 1)


# ---- eyes


def test_an_eye_has_the_maximum_of_its_images():
    scores = np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.4], [0.2, 0.95]])
    labels = np.array([[0, 0], [1, 0], [0, 1], [0, 0]])
    best, known, names = eyes(scores, labels, ["b", "a", "b", "b"])
    assert names == ["b", "a"]
    assert best.tolist() == [[0.3, 0.95], [0.8, 0.2]] and known.tolist() == [[0, 1], [1, 0]]
    with pytest.raises(UserError, match="2 names of eyes"):
        eyes(scores, labels, ["a", "b"])


@pytest.mark.parametrize("names, patients, expected", [
    (["images/p0001_OD_1.png", "images/p0001_OD_2.png", "images/p0001_OS_1.png"], "ppp",
     ("P0001_OD", "P0001_OD", "P0001_OS")),
    (["a/1221_OD_o_2.jpg", "a/1221_OI_o_1.jpg", "a/0146_od_f_1.jpg"], "ppq", ("1221_OD", "1221_OI", "0146_OD")),
    (["x/10-L-3-oct.jpg", "x/10-L-4-oct.jpg", "x/10-R-1.jpg"], "ppp", ("10-L", "10-L", "10-R")),
    (["p0001_OD_1.png", "10-L-3.png"], "pq", None),  # two patterns
    (["scan1.png", "scan2.png"], "pq", None),
    (["scan-2020-001.png", "scan-2020-002.png"], None, None),  # a date is no eye: nothing says who the patients are
    (["1221_OD_o_2.jpg", "12_21_OI_o_1.jpg"], "pq", None)])
def test_eyes_from_names(names, patients, expected):
    assert eye_names(names, patients or names) == expected


def test_names_that_contradict_the_patients_say_nothing():
    names = ["a-L-x.png", "a-R-x.png", "b-R-x.png"]
    assert eye_names(names, "ppp") is None  # three eyes
    assert eye_names(["a-L-x.png", "a-L-y.png"], "pq") is None  # one eye of two patients
    assert eye_names(names[:2], "pp") == ("A-L", "A-R")
    assert eye_names(["CNV-3001-1.jpeg", "CNV-3001-2.jpeg", "NORMAL-7-1.jpeg"], "ppq") is None  # a class is no patient


def test_the_column_comes_first():
    names = ["p0001_OD_1.png", "p0001_OD_2.png"]
    assert eye_names(names, ["p", "q"], ("left", "left")) == ("p left", "q left")


def test_a_column_says_which_eye(tmp_path):
    (tmp_path / "a.png").touch()
    rows = "filename,AMD,eye,patient_name\na.png,1,OS,p7\n"
    (tmp_path / "test.csv").write_text(rows)
    images = read_split(tmp_path, "test")
    assert images.label_names == ("AMD",) and images.eyes == ("p7 OS",)
    (tmp_path / "test.csv").write_text(rows.replace("OS", ""))
    with pytest.raises(UserError, match=r"test.csv, line 2: `eye` is empty"):
        read_split(tmp_path, "test")
