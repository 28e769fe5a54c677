"""make_tables.py: values by hand, what is refused, and how it is written."""

import copy
import csv
import json
import re

import pytest
from conftest import call_script, succeeded

from classification.report import COLUMNS, SAME_TRAINING
from core.errors import UserError
from evaluation import paper
from evaluation.results import read
from evaluation.table1 import table_1
from evaluation.table2 import table_2
from evaluation.tables import NOT_RUN, Cell, Table, in_order, mark_best, over

SETTINGS = {"backbone": "resnet50.tv_in1k", "pretrained": True, "pretrained_sha256": None, "image_size": 448,
            "epochs": 80, "steps_per_epoch": None, "early_stopping": None, "global_batch_size": 8, "optimizer": "sgd",
            "lr": 1e-3, "weight_decay": 1e-4, "augment": "geometric", "global_seed": 0}


def classified(method, ap, p=None, eye=True, **settings):
    """A results.json of classify.py: mAP of each fold (0.5, image level); the other scores are functions of it."""
    def level(value):
        macro = {"sen": value, "spe": 1.0, "auc": 0.9, "f1": 0.5, "f1_sen_spe": 0.25, "ap": value, "labels": 9}
        return {"0.5": {"macro": macro}, "validation": {"macro": {**macro, "ap": value / 2}}}

    folds = {str(k): {"fold": k, "n_train": 60 + k, "n_synthetic": 0 if method.startswith("baseline") else 300,
                      "n_val": 20, "n_test": 30,
                      "steps": 100, "sha256": {"train": f"t{k}", "val": f"v{k}", "test": "x"}, "remarks": [],
                      "levels": {"image": level(v), "eye": level(v + 0.1) if eye else None}}
             for k, v in enumerate(ap)}
    test = {"units": 12, "permutations": 9999, "permutation": {"ap": {"difference": 0.1, "p": p, "stars": "?"}}}
    return {"kind": "classification", "format_version": 1, "method": method, "data": "oct", "test_sha256": "x" * 64,
            "label_names": ["AMD", "DME"], "settings": SETTINGS | settings, "folds": folds,
            "summary": {name: None if name == "eye" and not eye else {"0.5": {}, "validation": {}}
                        for name in ("image", "eye")},
            "significance": None if p is None else {"baseline": "baseline", "unit": "patient", "updates": [100, 100],
                                                    "levels": {"image": test, "eye": test if eye else None}}}


def generated(model, kid=(0.05, 0.01), fold=0, digest=None, lpips=0.4, **more):
    """A results.json of evaluate.py with the row of one model and the noise floor."""
    def row(kind, name, mean, std):
        return {"kind": kind, "name": name, "folder": f"syn/{name}", "images": 24,
                "sha256": digest or f"{name}{fold}{mean}", "kid": {"inception": {"mean": mean, "std": std}},
                "about": {"model": name, "parameters": 13312584, "sampler": "ddpm", "steps": 250, "cfg_scale": 1.5,
                          "seed": 0} if kind == "generated" else {},
                "gg": {"gap": -1.5}, "lpips": None if lpips is None else {"mean": lpips, "std": 0.1}}
    return {"kind": "generation", "format_version": 1, "image_size": 256, "subsets": 100, "spaces": ["inception"],
            "gg_space": "dino", "networks": {"inception": {"identity": "i"}, "dino": {"identity": "d"}},
            "data": {"name": "oct", "fold": fold, "labels": ["AMD", "DME"], "validation_sha256": f"v{fold}",
                     "training_sha256": f"t{fold}"},
            "rows": [row("real", "real: test", 0.001, 0.001), row("generated", model, *kid)], **more}


def saved(folder, *results):
    for i, content in enumerate(results):
        (folder / str(i)).mkdir(parents=True, exist_ok=True)
        (folder / str(i) / "results.json").write_text(json.dumps(content))
    return read([folder])


def row(table, name):
    """head -> text of the row that starts with `name`."""
    return dict(zip(table.heads, map(str, next(r for r in table.rows if r[0] == name)), strict=True))


BASE = classified("baseline", (0.40, 0.50))


# ---- Table 2


def test_table_2_by_hand(tmp_path):
    table = table_2(saved(
        tmp_path, classified("GeCA-XS", (0.7, 0.7), p=0.2), classified("GeCA-S", (0.60, 0.64), p=0.001), BASE,
        classified("baseline-without-augmentation", (0.3, 0.3), p=0.04, augment="none")), "image")
    assert [r[0] for r in table.rows] == [*paper.TABLE_2, "GeCA-XS"]
    base, best = row(table, paper.BASELINE), row(table, "GeCA-S")
    assert base["mAP ↑, ours"] == "45.00 ± 7.07" and base["mAP ↑, paper"] == "68.85 ± 1.41"
    assert best["mAP ↑, ours"] == "62.00 ± 2.83" and best["Spe ↑, ours"] == "100.00 ± 0.00"
    # Holm by hand: 0.001 x 3, 0.04 x 2, 0.2 x 1
    assert best["p, ours"] == "0.0030 **" and best["p, paper"] == "****"
    assert row(table, paper.WITHOUT)["p, ours"] == "0.0800" and row(table, "GeCA-XS")["p, ours"] == "0.2000"
    assert base["p, ours"] == base["p, paper"] == "–"
    missing = row(table, "DiT-S")
    assert {missing[f"{name} ↑, ours"] for name in COLUMNS.values()} == {NOT_RUN} == {missing["p, ours"]}
    assert missing["F1(sen/spe) ↑, paper"] == "67.13 ± 4.87" and row(table, "GeCA-XS")["mAP ↑, paper"] == "–"


def test_table_2_marks_the_best_of_each_column(tmp_path):
    table = table_2(saved(tmp_path, BASE, classified("GeCA-S", (0.60, 0.64), p=0.001)), "image")
    best = {head: [r[0] for r in table.rows if getattr(r[i], "best", False)] for i, head in enumerate(table.heads)}
    assert best["mAP ↑, ours"] == best["mAP ↑, paper"] == best["AUC ↑, paper"] == ["GeCA-S"]
    assert best["Spe ↑, paper"] == [paper.BASELINE]
    assert best["Spe ↑, ours"] == [paper.BASELINE, "GeCA-S"] and best["p, ours"] == []  # equals are all best


def test_table_2_levels_and_thresholds(tmp_path):
    results = saved(tmp_path, BASE, classified("GeCA-S", (0.6, 0.6), p=0.5))
    shown = {(level, threshold): row(table_2(results, level, threshold), paper.BASELINE)["mAP ↑, ours"]
             for level in ("image", "eye", "auto") for threshold in ("0.5", "validation")}
    assert shown["image", "0.5"] == "45.00 ± 7.07" and shown["eye", "0.5"] == "55.00 ± 7.07" == shown["auto", "0.5"]
    assert shown["eye", "validation"] == "27.50 ± 3.54"
    without = saved(tmp_path, BASE, classified("GeCA-S", (0.6, 0.6), p=0.5, eye=False))
    assert row(table_2(without), paper.BASELINE)["mAP ↑, ours"] == "45.00 ± 7.07"
    with pytest.raises(UserError, match=r"--level eye: .*--level image"):
        table_2(without, "eye")


def test_table_2_takes_seeds_together(tmp_path):
    table = table_2(saved(tmp_path, classified("GeCA-S", (0.6, 0.6), p=0.01), classified(
        "GeCA-S", (0.8, 0.8), p=0.03, global_seed=1), BASE), "image")
    ours = row(table, "GeCA-S")
    assert ours["mAP ↑, ours"] == "70.00 ± 11.55" and ours["p, ours"] == "0.0300 *"  # the larger p


def test_table_2_without_a_comparison_or_a_second_fold(tmp_path):
    table = table_2(saved(tmp_path, classified("GeCA-S", (0.6,)), classified("baseline", (0.5,))), "image")
    assert row(table, "GeCA-S")["mAP ↑, ours"] == "60.00" and row(table, "GeCA-S")["p, ours"] == NOT_RUN
    assert not any("p:" in note for note in table.notes)


def test_footnotes_of_table_2(tmp_path):
    leak = classified("GeCA-S", (0.6, 0.6), p=0.01)
    leak["folds"]["0"]["remarks"] = ["LEAK: one patient", "something else"]
    notes = table_2(saved(tmp_path, BASE, leak), "image").notes
    text = "\n".join(notes)
    assert "9 of 2 labels" in text and "folds 0 1; seeds 0" in text and "resnet50.tv_in1k from published" in text
    assert "GeCA-S: 60–61 real, 300 synthetic, 100 updates" in text and "30 for the test" in text
    assert "two-sided permutation test on mAP against baseline" in text and "Holm's correction for 1" in text
    assert notes[-2:] == ["LEAK: one patient", "something else"] and "no p can be below 0.0001." in text


@pytest.mark.parametrize("change, message", [
    (lambda r: r.update(test_sha256="y" * 64), "test.csv is yyyyyyyyyyyy, but xxxxxxxxxxxx"),
    (lambda r: r.update(label_names=["DME", "AMD"]), "the label names is DME AMD, but AMD DME"),
    (lambda r: r["folds"].pop("1"), "the folds is 0, but 0 1"),
    (lambda r: r["folds"]["1"]["sha256"].update(train="other"), "images of train.csv of fold 1 differ"),
    (lambda r: r["folds"]["0"]["sha256"].update(val="other"), "images of val.csv of fold 0 differ"),
    (lambda r: r["folds"]["1"].update(mixed_precision="bf16"), "--mixed-precision is"),
    (lambda r: r.update(method="baseline", significance=None), "is called baseline, but was trained with synthetic"),
    (lambda r: r["significance"].update(baseline="other"), "the --baseline of p is other, but baseline"),
    *((lambda r, key=key: r["settings"].update({key: "other"}), f"--{key.replace('_', '-')} is other, but")
      for key in (*SAME_TRAINING, "augment")),
])
def test_what_cannot_stand_in_table_2_is_refused(tmp_path, change, message):
    wrong = copy.deepcopy(classified("DiT-S", (0.6, 0.6), p=0.01))
    change(wrong)
    with pytest.raises(UserError, match=re.escape(message)):
        table_2(saved(tmp_path, BASE, classified("GeCA-S", (0.6, 0.6), p=0.01), wrong))


def test_a_method_twice_is_ambiguous(tmp_path):
    with pytest.raises(UserError, match=r"is GeCA-S with seed 0, and so is .*0/results\.json"):
        table_2(saved(tmp_path, *[classified("GeCA-S", (0.6, 0.6), p=0.01)] * 2))


# ---- Table 1


def test_table_1_by_hand(tmp_path):
    table = table_1(saved(
        tmp_path, generated("GeCA-S", (0.040, 0.003)), generated("GeCA-S", (0.050, 0.009), fold=1),
        generated("DiT-S", (0.0601, 0.002)), generated("DiT-S", (0.0602, 0.002), fold=1)))
    assert [r[0] for r in table.rows] == ["LDM-B", "DiT-S", "GeCA-S"]
    ours = row(table, "GeCA-S")
    assert ours["oct: KID[inception] ↓"] == "45.00 ± 7.07" and ours["Params (M)"] == "13.3"
    assert ours["paper, OCT: KID ↓"] == "49.10 ± 8.00" and ours["oct: GG[dino]"] == "-1.50 ± 0.00"
    assert row(table, "LDM-B")["oct: KID[inception] ↓"] == NOT_RUN
    assert "GeCA-S: 48 images (ddpm, 250 steps, guidance 1.5), folds 0 1, sampling seeds 0" in table.notes[1]
    column = table.heads.index("oct: KID[inception] ↓")
    assert [r[0] for r in table.rows if getattr(r[column], "best", False)] == ["GeCA-S"]


def test_one_run_has_its_own_spread(tmp_path):
    table = table_1(saved(tmp_path, generated("GeCA-S", (0.040, 0.003))))
    assert row(table, "GeCA-S")["oct: KID[inception] ↓"] == "40.00 ± 3.00"
    assert row(table, "GeCA-S")["oct: GG[dino]"] == "-1.50"


def test_the_same_images_count_once(tmp_path):
    table = table_1(saved(tmp_path, *[generated("GeCA-S", (0.040, 0.003))] * 2))
    assert row(table, "GeCA-S")["oct: KID[inception] ↓"] == "40.00 ± 3.00"


@pytest.mark.parametrize("change, message", [
    (lambda r: r.update(image_size=64), "image size is 64, but 256"),
    (lambda r: r["networks"]["inception"].update(identity="other"), "feature space of KID is other, but i"),
    (lambda r: r["networks"]["dino"].update(identity="other"), "feature space of GG is other, but d"),
    (lambda r: r["data"].update(validation_sha256="other"), "the validation images of fold 0 differ"),
    (lambda r: r["data"].update(training_sha256="other"), "the training images of fold 0 differ"),
    (lambda r: r["data"].update(fold=1), "score all methods on the same folds"),
])
def test_what_cannot_stand_in_table_1_is_refused(tmp_path, change, message):
    wrong = generated("DiT-S")
    change(wrong)
    with pytest.raises(UserError, match=re.escape(message)):
        table_1(saved(tmp_path, generated("GeCA-S"), wrong))


def test_one_method_sampled_in_two_ways_is_refused(tmp_path):
    other = generated("GeCA-S", (0.03, 0.001))
    other["rows"][1]["about"]["steps"] = 20
    with pytest.raises(UserError, match=r"GeCA-S is sampled in 2 ways: .*250 steps.* and .*20 steps"):
        table_1(saved(tmp_path, generated("GeCA-S"), other))


# ---- the script, and how tables are written


def test_the_script_writes_both_tables(tmp_path):
    saved(tmp_path / "in", BASE, classified("GeCA-S", (0.60, 0.64), p=0.001), generated("GeCA-S"))
    out = succeeded(call_script("make_tables.py", tmp_path / "in", "--output", tmp_path / "out", "--level", "image"))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        f"table{n}.{kind}" for n in (1, 2) for kind in ("csv", "md", "tex")]
    lines = (tmp_path / "out" / "table2.md").read_text().splitlines()
    assert lines[2].startswith("| Training images | Sen ↑, paper | Sen ↑, ours |") and lines[3] == "|---" * 15 + "|"
    assert "**62.00 ± 2.83**" in lines[8] and lines[8].endswith(r"| \*\*\*\* | 0.0010 \*\* |") and lines[8] in out
    with open(tmp_path / "out" / "table2.csv", newline="") as file:
        first, *others = csv.DictReader(file)
    assert len(others) == 4 and first["mAP ↑, ours"] == "45.0" and first["mAP ↑, ours, spread"][:7] == "7.07106"
    assert others[0]["mAP ↑, ours"] == others[0]["mAP ↑, ours, spread"] == ""  # not run: no number
    assert (others[3]["p, ours"], others[3]["p, ours, stars"], others[3]["p, paper"]) == ("0.001", "**", "****")
    numbers = [value for row in (first, *others) for head, value in row.items()
               if head.endswith((" ↑, ours", " ↑, paper", "spread")) and value]
    assert len(numbers) == 2 * 6 * (5 + 2) and all(float(value) >= 0 for value in numbers)


def test_the_paper_can_be_left_out(tmp_path):
    saved(tmp_path / "in", BASE, classified("GeCA-S", (0.60, 0.64), p=0.001), generated("GeCA-S"))
    succeeded(call_script("make_tables.py", tmp_path / "in", "--no-paper", "--output", tmp_path / "out"))
    for name, columns, rows in (("table1", 5, 1), ("table2", 8, 2)):
        lines = (tmp_path / "out" / f"{name}.md").read_text().splitlines()
        table = [line for line in lines if line.startswith("| ")]
        assert len(table) == 1 + rows and {line.count(" | ") + 1 for line in table} == {columns}
        assert "paper" not in "".join(lines).lower()


@pytest.mark.parametrize("content, message", [
    (None, "found no results.json"), ("{", "results.json: damaged (Expecting"),
    ("[]", "found [], expected an object"), ("{}", "has no `kind`"),
    ('{"kind": "classification", "format_version": 1}', "has no `method`"),
    ('{"kind": "generation", "format_version": 2}', "in format 2, expected"),
    ('{"kind": "other", "format_version": 1}', "is other in format 1"),
])
def test_files_that_are_no_results_are_one_line(tmp_path, content, message):
    (tmp_path / "in").mkdir()
    if content:
        (tmp_path / "in" / "results.json").write_text(content)
    done = call_script("make_tables.py", tmp_path / "in", "--output", tmp_path / "out")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and message in done.stderr
    assert not (tmp_path / "out").exists()


TRICKY = Table("50 % & more_of_it", ["Method", "x ↑"], [["a_b & c|d", Cell(1.5, 0.25, best=True)], ["p*q", "**"]],
               ["100 # 1 < 2 {x} ~ ^ \\ $5 – 3 × 4"], "tab:tricky")


def test_markdown_is_escaped():
    lines = TRICKY.markdown().splitlines()
    assert lines[4] == r"| a\_b \& c\|d | **1.50 ± 0.25** |" and lines[5] == r"| p\*q | \*\* |"


def test_latex_is_escaped():
    text = TRICKY.latex()
    assert r"\caption{50 \% \& more\_of\_it}" + "\n" + r"\label{tab:tricky}" in text
    assert r"a\_b \& c$|$d & \textbf{1.50 $\pm$ 0.25} \\" in text and r"Method & x $\uparrow$ \\" in text
    assert (r"1. 100 \# 1 $<$ 2 \{x\} \textasciitilde{} \textasciicircum{} \textbackslash{} \$5 -- 3 $\times$ 4\par"
            in text)
    assert text.isascii() and text.count(r"\begin") == text.count(r"\end") == 2
    assert [text.index(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == sorted(
        text.index(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule"))
    unescaped = re.sub(r"\\[{}]", "", text)
    assert unescaped.count("{") == unescaped.count("}")


def test_latex_of_real_tables_is_ascii(tmp_path):
    """A sign that is not in core.text.LATEX would not compile."""
    results = saved(tmp_path, BASE, classified("GeCA-S", (0.60, 0.64), p=0.001), generated("GeCA-S"))
    assert table_2(results[:2], "image").latex().isascii()
    assert table_1(results[2:]).latex().isascii()


def test_cells_and_order():
    assert str(over([0.5], 0.125, scale=100)) == "50.00 ± 12.50" and str(over([1, None, 3])) == "2.00 ± 1.41"
    assert str(over([])) == NOT_RUN and in_order({"z", "b", "a"}, ("b", "c")) == ["b", "a", "z"]
    rows = [["a", Cell(1.001)], ["b", Cell(1.004)], ["c", Cell(0.5)], ["d", Cell(None)]]  # 1.00 both, as shown
    assert [r[1].best for r in mark_best(rows, 1, max)] == [True, True, False, False]
    assert not mark_best(rows[2:], 1, max)[0][1].best  # alone


def test_equals_are_marked_alike_wherever_they_are_shown():
    """Numbers that are shown as the same: in Markdown and in LaTeX, 0 and what is rounded to it, .5 and below it."""
    values = [-0.001, 0.001, 0.004, -0.0, 1.0]
    rows = mark_best([[str(i), Cell(value, 0.1)] for i, value in enumerate(values)], 1, min)
    table = Table("t", ["a", "b"], rows, [], "tab:t")
    assert [row[1].best for row in rows] == [True] * 4 + [False]
    assert table.markdown().count("**0.00 ± 0.10**") == table.latex().count(r"\textbf{0.00 $\pm$ 0.10}") == 4


def test_a_p_value_is_never_0(tmp_path):
    table = table_2(saved(tmp_path, BASE, classified("GeCA-S", (0.60, 0.64), p=2.5e-5)), "image")
    assert row(table, "GeCA-S")["p, ours"] == "< 0.0001 ****"
    assert "2.5e-05,****" in table.csv()
