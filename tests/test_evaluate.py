"""evaluate.py as the user runs it, and dataset/pictures.py."""

import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT, run_script, succeeded
from helpers import noise_images, save_alexnet, save_images, save_tiny_vae
from PIL import Image

import evaluate
import generation
from classification import network as classifier
from core.cli import run
from core.errors import UserError
from core.tensors import weights_hash
from dataset.images import load_image, load_images
from dataset.pictures import caption, grid, pairs
from dataset.root import read_split, write_split
from dataset.sets import LabelledImages
from evaluation import evaluation, names, pictures, sets
from evaluation import features as feature_spaces
from evaluation.comparison import method_of
from metrics.fid import fid
from metrics.fld import fld
from metrics.kid import kid, polynomial_mmd

LABELS = ("AMD", "DME")
SIZE = 16


def draw(n, seed, contrast=60):
    """n noisy images, uint8 (n, SIZE, SIZE, 3)."""
    values = np.random.default_rng(seed).normal(128, contrast, (n, SIZE, SIZE, 3))
    return values.clip(0, 255).astype(np.uint8)


def save(images, folder):
    """Write images -> their names as seen from the folder above."""
    return [f"{folder.name}/{path.name}" for path in save_images(images, folder)]


def combinations(n):
    """Labels (n, 2): none, AMD, DME, both, none, ..."""
    return np.array([[i & 1, i >> 1 & 1] for i in range(n)])


def save_generated(folder, images, fold=0, label_names=LABELS):
    names = save(images, folder / "gen_samples_val")
    write_split(folder, f"val_syn_{fold}", names, combinations(len(names)), label_names, names)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A data root, two sample folders (one like the real images, one of low contrast) and a feature space."""
    folder = tmp_path_factory.mktemp("world")
    names = save(draw(80, 0), folder / "root" / "images")
    for split, part in (("train_0", slice(0, 40)), ("val_0", slice(40, 60)), ("test", slice(60, 80))):
        labels = combinations(80)[part]
        write_split(folder / "root", split, names[part], labels, LABELS, names[part])
    save_generated(folder / "good", draw(16, 1))
    save_generated(folder / "bad", draw(24, 2, contrast=30))
    save_tiny_vae(folder / "vae")
    feature_spaces.fit(str(folder / "vae"), [read_split(folder / "root", "train_0").paths], (SIZE,))
    return folder


@pytest.fixture
def copy(world, tmp_path):
    return shutil.copytree(world, tmp_path / "world")


def flags(world, *more, gen=("good",)):
    """The command line; a flag in `more` that is there already overrides it."""
    return [str(a) for a in ("--fold", 0, "--image-size", SIZE, "--real", world / "root", "--features",
                             world / "vae", "--device_list", "cpu", "--lpips", "none", "--resamples", 200, "--cache",
                             world / "cache", *more, "--gen", *(world / g for g in gen))]


@pytest.fixture
def in_process(monkeypatch, capsys):
    """Run evaluate.py in this process (an import less) -> exit code, stdout, stderr."""
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
        code = 0
        try:
            run(evaluate.main)
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return call


def report(folder):
    return json.loads((folder / "results.json").read_text())


FILES = {"results.json", "results.txt", "report.html", "real_vs_generated.png"}

# ---- from end to end


def test_end_to_end(world, tmp_path):
    command = flags(world, "--output", tmp_path / "out", "--cache", tmp_path / "cache", "--global_seed", 3,
                    gen=("good", "bad"))
    result = run_script("evaluate.py", *command)
    succeeded(result)
    assert {p.name for p in (tmp_path / "out").iterdir()} == FILES

    found = report(tmp_path / "out")
    rows, space = found["rows"], "vae:vae"
    assert [(r["name"], r["kind"], r["images"], r["kid"][space]["subset_size"]) for r in rows] == [
        ("real: test", "real", 20, 5), ("good", "generated", 16, 4), ("bad", "generated", 24, 6)]
    features = feature_spaces.open_features(str(world / "vae"))
    train, real = (features(load_images(read_split(world / "root", name).paths, SIZE))
                   for name in ("train_0", "val_0"))
    for row, images in ((rows[1], draw(16, 1)), (rows[2], draw(24, 2, contrast=30))):
        made, score = features(images), row["kid"][space]
        assert (score["mean"], score["std"]) == pytest.approx(kid(real, made, score["subset_size"], 100, seed=3),
                                                              rel=1e-3, abs=1e-4)
        assert score["interval"][0] < score["value"] < score["interval"][1]
        assert row["fid"][space] == pytest.approx(fid(real, made), rel=1e-3)
        assert row["gg"]["gap"] == pytest.approx(fld(train, real, made, seed=3).gap, rel=1e-2, abs=0.05)
        assert row["label_share"] == {"AMD": 0.5, "DME": 0.5}
        assert len(row["memorisation"]["closest"]) == 16 and row["lpips"] is row["conditioning"] is None
        assert row["memorisation"]["closest"][0]["lpips"] is None
    assert found["networks"][space]["identity"] == features.identity
    assert found["data"]["training_images"] == 40 and found["data"]["labels"] == list(LABELS)
    scores = [r["kid"][space]["mean"] for r in rows]
    assert max(map(abs, scores[:2])) < 0.1 * scores[2]  # like the real ones: near the noise floor

    text = (tmp_path / "out" / "results.txt").read_text()
    assert text in result.stdout
    header, *lines = text.splitlines()[1:]
    assert f"KID[{space}] ×1e-3" in header and "GG[vae:vae]" in header and "LPIPS" not in header
    assert f"{1e3 * scores[2]:.2f} ± {1e3 * rows[2]['kid'][space]['std']:.2f}" in lines[2]
    page = (tmp_path / "out" / "report.html").read_text()
    shown = 3 * 8 + 2 * 2 * 16  # rows of real and generated images; the nearest pairs of two folders
    assert page.count("data:image/png;base64,") == shown and "http" not in page  # it needs no other file
    assert "asked for the same labels." in page and "its checkpoint was not found" in page
    assert f"{rows[2]['fid'][space]:.2f}" in page
    warnings = [line for line in result.stderr.splitlines() if line.startswith("warning")]
    assert len(warnings) == 3 and "KID[vae:vae] cannot be told from the noise floor: good;" in warnings[0]
    assert "few images" in warnings[1] and "real ones: bad " in warnings[1]
    assert "name no patient" in warnings[2]
    assert rows[2]["fid_interval"][space][0] < rows[2]["fid"][space] < rows[2]["fid_interval"][space][1]
    assert rows[2]["gg"]["gap_interval"][0] < rows[2]["gg"]["gap_interval"][1]


def test_copies_of_training_images_are_found(copy, in_process):
    names = save(draw(80, 0)[:16], copy / "copied" / "gen_samples_val")
    write_split(copy / "copied", "val_syn_0", names, combinations(16), LABELS, names)
    assert in_process(*flags(copy, gen=("copied",)))[0] == 0
    row = report(copy / "copied")["rows"][1]
    assert row["gg"]["gap"] < -100 < report(copy / "copied")["rows"][0]["gg"]["gap"]
    found = row["memorisation"]
    assert found["close"]["value"] == 1 and found["authentic_percent"] == 0
    assert found["exact_duplicates"]["copies"] == [[i, i] for i in range(16)]
    assert "16 exact" in (copy / "copied" / "results.txt").read_text()


def test_lpips_of_samples_and_of_their_copies(tmp_path, in_process):
    """With AlexNet (random weights): diversity, and the pairs of the picture."""
    images = noise_images(36, size=32)
    names = save(images, tmp_path / "root" / "images")
    for split, part in (("train_0", slice(0, 12)), ("val_0", slice(12, 24)), ("test", slice(24, 36))):
        write_split(tmp_path / "root", split, names[part], combinations(12), LABELS, names[part])
    save_generated(tmp_path / "copied", images[:12])
    save_alexnet(tmp_path / "alexnet.pth", seed=0)
    code, _, err = in_process("--real", str(tmp_path / "root"), "--gen", str(tmp_path / "copied"), "--image-size", "32",
                              "--features", "retina", "--lpips", f"alex={tmp_path / 'alexnet.pth'}", "--cache",
                              str(tmp_path / "cache"), "--resamples", "20", "--subset-size", "4")
    assert code == 0, err
    floor, row = report(tmp_path / "copied")["rows"]
    assert row["lpips"]["pairs"] == 11 and row["lpips"]["mean"] > 0 and row["lpips"]["within_label"]["pairs"] > 0
    assert all(pair["lpips"] == pytest.approx(0, abs=1e-6) for pair in row["memorisation"]["closest"])
    assert all(pair["lpips"] > 0.01 for pair in floor["memorisation"]["closest"])
    assert "LPIPS" in (tmp_path / "copied" / "results.txt").read_text()


def test_two_generators_on_the_same_labels_are_compared(copy, in_process):
    save_generated(copy / "other", draw(16, 9, contrast=30))
    code, out, _ = in_process(*flags(copy, gen=("good", "other")))
    (pair,) = report(copy / "good")["paired"]
    assert code == 0 and (pair["a"], pair["b"], pair["images"]) == ("good", "other", 16)
    low, high = pair["interval"]
    assert low < pair["difference"] < high < 0 < pair["p"] < 0.05 and f"p = {pair['p']:.4f}" in out
    assert "good is nearer" in (copy / "good" / "report.html").read_text()
    assert in_process(*flags(copy, gen=("good", "bad")))[0] == 0
    assert report(copy / "good")["paired"] == []  # 16 and 24 images: other labels


def test_folders_that_differ_in_their_seed_are_averaged(copy, in_process):
    about = {"model": "GeCA-XS", "steps": 5}
    for seed in (0, 1):
        folder = copy / f"GeCA-XS-GS-seed-{seed}"
        save_generated(folder, draw(16, 11 + seed))
        (folder / "settings.json").write_text(json.dumps({"about": {**about, "seed": seed}}))
    assert in_process(*flags(copy, gen=("GeCA-XS-GS-seed-0", "GeCA-XS-GS-seed-1", "bad")))[0] == 0
    found = report(copy / "GeCA-XS-GS-seed-0")
    (group,) = found["over_seeds"]
    values = [row["kid"]["vae:vae"]["mean"] for row in found["rows"][1:3]]
    assert group["runs"] == 2 and group["values"]["KID[vae:vae]"]["mean"] == pytest.approx(np.mean(values))
    assert group["values"]["KID[vae:vae]"]["std"] == pytest.approx(np.std(values, ddof=1))
    assert [row["name"] for row in found["rows"]][1:] == ["GeCA-XS, seed 0", "GeCA-XS, seed 1", "bad"]


def test_averaged_and_raw_weights_of_one_run_are_no_seeds(copy, in_process):
    """They are two methods: nothing is averaged, and their names tell them apart. A parent folder means both."""
    for weights, about in (("ema", {"model": "GeCA-XS", "seed": 0}),
                           ("model", {"model": "GeCA-XS", "seed": 0, "weights": "model"})):
        folder = copy / "both" / weights
        save_generated(folder, draw(16, 11 + len(weights)))
        (folder / "settings.json").write_text(json.dumps({"weights": weights, "about": about}))
    assert in_process(*flags(copy, gen=("both",)))[0] == 0
    results = report(copy / "both")
    assert results["over_seeds"] == []
    assert [row["name"] for row in results["rows"]][1:] == ["GeCA-XS, averaged", "GeCA-XS, raw"]


RUN = {"model": "GeCA-XS", "run": "000-GeCA-XS-0", "step": 720, "weights": "ema", "weights_hash": "a",
       "sampler": "ddim", "steps": 25, "cfg_scale": 1.5, "seed": 0}
TRAINED = {**RUN, "training": {"lr": 1e-3}, "training_seed": 0}


@pytest.mark.parametrize("about, change, same", [
    (RUN, {"seed": 1}, True), (RUN, {"weights": "model"}, False), (RUN, {"steps": 50}, False),
    (RUN, {"sampler": "ddpm"}, False), (RUN, {"cfg_scale": 2.0}, False), (RUN, {"step": 1440}, False),
    (RUN, {"run": "001-GeCA-XS-0"}, False), (RUN, {"weights_hash": "b"}, False),  # who knows what differs
    (TRAINED, {"run": "001-GeCA-XS-0", "weights_hash": "b", "training_seed": 1}, True),
    (TRAINED, {"run": "001-GeCA-XS-0", "weights_hash": "b", "training": {"lr": 2e-3}}, False),
    (TRAINED, {"weights": "model"}, False)])
def test_runs_of_a_method_differ_in_seeds_alone(about, change, same):
    assert (method_of("a", about) == method_of("b", {**about, **change})) == same


def test_folders_that_say_nothing_are_one_method_where_their_names_differ_in_the_seed():
    assert method_of("x/GeCA-S-GS-seed-0", {}) == method_of("y/GeCA-S-GS-seed-13", {})
    assert method_of("x/GeCA-S-GS-seed-0", {}) != method_of("x/DiT-S-GS-seed-0", {})


@pytest.mark.parametrize("sets, expected", [
    ([("a", {"model": "GeCA-S"}), ("b", {"model": "DiT-S"})], ["GeCA-S", "DiT-S"]),
    ([("a", RUN), ("b", {**RUN, "seed": 1}), ("c", {"model": "DiT-S", "seed": 0})],
     ["GeCA-XS, seed 0", "GeCA-XS, seed 1", "DiT-S"]),
    ([("a", RUN), ("b", {**RUN, "steps": 250, "sampler": "ddpm"})], ["GeCA-XS, ddim 25", "GeCA-XS, ddpm 250"]),
    ([("a", RUN), ("b", {**RUN, "weights": "model"}), ("c", {**RUN, "seed": 1})],
     ["GeCA-XS, averaged, seed 0", "GeCA-XS, raw, seed 0", "GeCA-XS, averaged, seed 1"]),
    ([("DiT-S-GS-fold-0-cfg-1.5-seed-0", {}), ("DiT-S-GS-fold-0-cfg-1.5-seed-1", {})],
     ["DiT-S, seed 0", "DiT-S, seed 1"]),
    ([("a", RUN), ("b", RUN)], ["GeCA-XS (1)", "GeCA-XS (2)"]),
    ([("x" * 60, {})], ["x" * 28 + "…"])])
def test_names_are_short_and_tell_sets_apart(sets, expected):
    assert names.distinct([LabelledImages((), name=name, about=about) for name, about in sets]) == expected


def test_what_names_share():
    assert names.shared(["GeCA-XS, raw, seed 0", "GeCA-XS, raw, seed 1"]) == "GeCA-XS, raw"
    assert names.shared(["DiT-S (1)", "DiT-S (2)"]) == "DiT-S"


def test_the_kid_of_a_label(copy, in_process):
    """Of the images that have it against the real ones that have it; no number for a handful of images."""
    code, _, err = in_process(*flags(copy, "--resamples", 20, gen=("bad",)))
    assert code == 0, err
    scores = report(copy / "bad")["rows"][1]["kid_of_labels"]
    features = feature_spaces.open_features(str(copy / "vae"))
    real = features(draw(80, 0)[40:60][combinations(80)[40:60, 1] == 1])
    made = features(draw(24, 2, contrast=30)[combinations(24)[:, 1] == 1])
    assert scores["DME"]["images"] == len(made) == 12 and scores["DME"]["real_images"] == len(real) == 10
    assert scores["DME"]["kid"]["value"] == pytest.approx(polynomial_mmd(real, made), rel=1e-3)
    assert in_process(*flags(copy, "--resamples", 20))[0] == 0
    assert report(copy / "good")["rows"][1]["kid_of_labels"]["DME"]["kid"] is None  # 8 images


def test_a_floor_of_too_few_test_images_is_left_out(copy, in_process):
    lines = (copy / "root" / "test.csv").read_text().splitlines()
    (copy / "root" / "test.csv").write_text("\n".join(lines[:6]) + "\n")
    code, _, err = in_process(*flags(copy))
    found = report(copy / "good")
    assert code == 0 and [row["name"] for row in found["rows"]] == ["good"]
    assert "test.csv: 5 images, too few to be scored" in err and "is left out" in found["warnings"][0]
    assert "noise floor)" not in (copy / "good" / "report.html").read_text()  # no row, no explanation of it


def test_what_labels_were_asked_for_is_said_as_it_is(copy, in_process):
    save(draw(16, 1), copy / "flat")
    assert in_process(*flags(copy, gen=("flat",)))[0] == 0
    page = (copy / "flat" / "report.html").read_text()
    assert "asked for the same labels." not in page and "labels unknown" in page


def test_the_checkpoint_that_made_the_images_is_found(tmp_path):
    """From the sample folder back to its run, and an image grows again; other weights at its place are noticed."""
    file = tmp_path / "000-GeCA-XS-0" / "checkpoints" / "last_ckpt.pt"
    file.parent.mkdir(parents=True)
    shutil.copy(ROOT / "assets" / "geca-xs-phantom" / "geca-xs-phantom.pt", file)
    trained = generation.load(file)
    about = {"model": "GeCA-XS", "run": "000-GeCA-XS-0", "weights": "ema", "sampler": "ddim", "steps": 2, "seed": 0,
             "checkpoint": "../000-GeCA-XS-0/checkpoints/last_ckpt.pt", "weights_hash": weights_hash(trained.net)}
    images = LabelledImages((tmp_path / "samples" / "000000.png", tmp_path / "samples" / "000001.png"),
                            np.eye(len(trained.labels), dtype=np.float32)[:2] * [[0], [1]], tuple(trained.labels),
                            folder=tmp_path / "samples", name="GeCA-XS", about=about)
    found = evaluate.trained_of(images, [], "cpu")
    assert found.path == file
    said, strip = evaluate.life_of(found, images)
    assert said == f"image 1, asked for {trained.labels[1]}, over the 2 steps of ddim" and strip.width == 1660
    moved = replace(images, about={**about, "checkpoint": "gone.pt"})
    with pytest.raises(UserError, match=r"not found .gone.pt.*--runs says where"):
        evaluate.trained_of(moved, [], "cpu")
    assert evaluate.trained_of(moved, [tmp_path], "cpu").path == file
    with pytest.raises(UserError, match="holds other weights"):
        evaluate.trained_of(replace(images, about={**about, "weights_hash": "0" * 16}), [], "cpu")


def test_curves_are_drawn_where_there_are_some():
    def curve(*values):
        return np.array([range(len(values)), values], float)

    logged = {"a": {"loss": curve(2, 1), "kid": curve(0.1)}, "b": {"loss": curve(3, 2)}}
    (picture,) = evaluate.drawn_curves(logged, {"a": "#112233", "b": "#445566"})  # one point of KID is no curve
    pixels = {tuple(p) for p in np.asarray(picture.convert("RGB")).reshape(-1, 3)}
    assert {(0x11, 0x22, 0x33), (0x44, 0x55, 0x66)} <= pixels


def test_a_classifier_is_asked_whether_labels_show(copy, in_process):
    network = classifier.build("test_resnet.r160_in1k", 2, SIZE)
    classifier.save(copy / "classifier.pt", network, "test_resnet.r160_in1k", LABELS)
    assert in_process(*flags(copy, "--classifier", copy / "classifier.pt"))[0] == 0
    rows = report(copy / "good")["rows"]
    scores = classifier.load_classifier(copy / "classifier.pt").scores(draw(16, 1))
    positive = combinations(16)[:, 0] == 1
    higher = scores[positive, 0][:, None] > scores[~positive, 0]  # AUC: how often a positive image scores higher
    assert rows[1]["conditioning"]["labels"]["AMD"]["auc"] == pytest.approx(higher.mean(), abs=1e-6)
    assert rows[0]["conditioning"]["macro"]["labels"] == 2
    classifier.save(copy / "classifier.pt", network, "test_resnet.r160_in1k", ("AMD", "CNV"))
    code, _, err = in_process(*flags(copy, "--classifier", copy / "classifier.pt"))
    assert code == 2 and "knows AMD CNV" in err and "AMD DME" in err


def test_without_test_images_the_floor_is_made_of_training_images(copy, in_process):
    assert in_process(*flags(copy))[0] == 0
    before = report(copy / "good")["rows"][1]
    (copy / "root" / "test.csv").unlink()
    code, _, err = in_process(*flags(copy))
    floor, row = report(copy / "good")["rows"]
    assert code == 0 and "has no test.csv" in err
    assert floor["name"] == "real: train_0, a part" and floor["gg"] is None and floor["memorisation"] is None
    assert row == before  # all training images still count, not those of the floor alone


def test_a_generator_that_may_have_seen_the_validation_images(copy, in_process):
    (copy / "good" / "settings.json").write_text(json.dumps({"about": {"model": "GeCA-S", "trained_on_fold": 3}}))
    code, _, err = in_process(*flags(copy))
    assert code == 0 and "GeCA-S: its generator was trained on another fold" in err
    assert report(copy / "good")["warnings"][0].startswith("LEAK: GeCA-S")


def test_results_go_to_the_first_folder_and_repeat(copy, in_process):
    """Run twice, the second time on two devices and from the cache: the same numbers; a picture is no sample."""
    flat = copy / "flat"
    save(draw(16, 1), flat)
    code, out, _ = in_process(*flags(copy, gen=("flat",)))
    assert code == 0 and "taking 16 PNG files" in out
    first = report(flat)["rows"]
    code, out, _ = in_process(*flags(copy, "--device-list", "cpu", "cpu", gen=("flat", "bad")))
    assert code == 0 and "taking 16 PNG files" in out
    second = report(flat)["rows"]
    for a, b in ((first[0], second[0]), (first[1], second[1])):
        assert a["kid"]["vae:vae"]["mean"] == pytest.approx(b["kid"]["vae:vae"]["mean"], abs=1e-4)


def test_the_same_images_twice_are_refused(copy, in_process):
    shutil.copytree(copy / "good", copy / "again")
    code, _, err = in_process(*flags(copy, gen=("good", "again")))
    assert code == 2 and "good and again hold the same images" in err


def test_cached_features_are_used(copy, in_process, monkeypatch):
    assert in_process(*flags(copy))[0] == 0
    monkeypatch.setattr(feature_spaces, "load_images", None)  # no image is opened for features again
    assert in_process(*flags(copy))[0] == 0


def test_another_seed_draws_others(copy, in_process):
    assert in_process(*flags(copy))[0] == 0
    first = report(copy / "good")
    assert in_process(*flags(copy, "--global-seed", 1))[0] == 0
    second = report(copy / "good")
    assert second["seed"] == 1
    for a, b in zip(first["rows"], second["rows"], strict=True):
        assert a["kid"] != b["kid"]


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "P", "1"])
def test_images_of_other_modes_are_read_as_rgb(copy, in_process, mode):
    """Grey images are grey in three channels, transparency is dropped: the pixels of the RGB image stay."""
    file = copy / "good" / "gen_samples_val" / "000003.png"
    Image.open(file).convert(mode).save(file)
    assert load_image(file).shape == (SIZE, SIZE, 3)
    if mode == "RGBA":
        assert np.array_equal(load_image(file), draw(16, 1)[3])
    assert in_process(*flags(copy))[0] == 0


def test_images_without_csv(copy, in_process):
    """gen_samples_val is taken, gen_samples beside it never is."""
    (copy / "good" / "val_syn_0.csv").unlink()
    save(draw(30, 5), copy / "good" / "gen_samples")
    code, out, _ = in_process(*flags(copy))
    assert code == 0 and "no val_syn_0.csv; taking 16 PNG files" in out and "gen_samples_val" in out
    row = report(copy / "good")["rows"][1]
    assert row["images"] == 16 and row["label_share"] is None


def test_subset_size_flag(copy, in_process):
    assert in_process(*flags(copy, "--subset-size", 9))[0] == 0
    assert {r["kid"]["vae:vae"]["subset_size"] for r in report(copy / "good")["rows"]} == {9}


def test_spaces_have_their_own_columns(copy, in_process):
    shutil.copytree(copy / "vae", copy / "vae2")
    code, out, _ = in_process(*flags(copy, "--features", copy / "vae", copy / "vae2"))
    assert code == 0
    assert list(report(copy / "good")["rows"][0]["kid"]) == ["vae:vae", "vae:vae2"]
    assert "KID[vae:vae] ×1e-3" in out and "KID[vae:vae2] ×1e-3" in out
    shutil.copytree(copy / "vae", copy / "other" / "vae")
    code, _, err = in_process(*flags(copy, "--features", copy / "vae", copy / "other" / "vae"))
    assert code == 2 and "two spaces" in err


# ---- mistakes: one line, exit code 2, nothing computed, nothing written

def wrong_size(copy):
    Image.new("RGB", (24, 16)).save(copy / "good" / "gen_samples_val" / "000007.png")


def unreadable(copy):
    file = copy / "good" / "gen_samples_val" / "000015.png"
    file.write_bytes(file.read_bytes()[:-40])


def unreadable_real(copy):
    (copy / "root" / "images" / "000050.png").write_bytes(b"not an image")


def no_images(copy):
    shutil.rmtree(copy / "good")
    save(draw(16, 1), copy / "good" / "gen_samples")


def other_fold(copy):
    (copy / "good" / "val_syn_0.csv").rename(copy / "good" / "val_syn_1.csv")


def other_labels(copy):
    save_generated(copy / "good", draw(16, 1), label_names=("AMD", "CNV"))


def few_images(copy):
    save_generated(copy / "good", draw(7, 1))


def many_images(copy):
    save_generated(copy / "good", draw(84, 1))


def floating_point(copy):
    Image.fromarray(np.full((SIZE, SIZE), 0.5, np.float32)).save(copy / "good" / "gen_samples_val" / "000004.png",
                                                                    "TIFF")


def absent(copy):
    (copy / "good" / "gen_samples_val" / "000009.png").unlink()


def empty(copy):
    shutil.rmtree(copy / "good")
    (copy / "good").mkdir()


def foreign_settings(copy):
    (copy / "good" / "settings.json").write_text('{"about": "hello"}')


def damaged_settings(copy):
    (copy / "good" / "settings.json").write_text("{")


def no_scale(copy):
    (copy / "vae" / feature_spaces.SCALE_FILE).unlink()


def nothing(copy):
    pass


@pytest.mark.parametrize("noted, given, side", [((64, 64), None, 64), ((None, 64), None, 64), ((None, None), None, 256),
                                                ((64, 128), 64, 64), ((64, 128), None, None)])
def test_the_side_of_the_images_is_what_the_sampler_noted(noted, given, side):
    generated = [LabelledImages((), name=f"set-{number}", about={"image_size": size} if size else {})
                 for number, size in enumerate(noted)]
    found = sets.Sets(None, None, None, generated, LABELS, [])
    if side:
        assert found.image_size(given) == side
    else:
        with pytest.raises(UserError, match=r"set-0 has images of 64 pixels, set-1 .* 128 pixels"):
            found.image_size(given)


@pytest.mark.parametrize("damage, more, parts", [
    (nothing, ["--fold", "8"], ["val_8.csv", "val_0.csv"]),
    (nothing, ["--image-size", "32"], ["16 × 16 pixels", "expected 32 × 32", "--image-size"]),
    (wrong_size, [], ["000007.png", "24 × 16 pixels", "expected 16 × 16"]),
    (unreadable, [], ["000015.png", "cannot be read"]),
    (unreadable_real, [], ["000050.png", "cannot be read"]),
    (no_images, [], ["--gen", "no image in it", "sample_ddp_val.py"]),
    (shutil.rmtree, [], ["val_0.csv"]),
    (other_fold, [], ["val_syn_0.csv", "val_syn_1.csv"]),
    (other_labels, [], ["AMD CNV", "AMD DME"]),
    (few_images, [], ["subsets of 1", "7 generated", "generate 8"]),
    (many_images, [], ["subsets of 21", "20 real", "--subset-size 20"]),
    (no_scale, [], ["feature_scale", "python -m evaluation.features --fit"]),
    (floating_point, [], ["000004.png", "expected 8 or 16 bits"]),
    (absent, [], ["val_syn_0.csv", "1 missing file", "000009.png"]),
    (empty, [], ["--gen", "no image in it"]),
    (damaged_settings, [], ["settings.json", "damaged"]),
    (foreign_settings, [], ["settings.json", "hello"]),
    (nothing, ["--features", "dinov9"], ["--features dinov9", "retina"]),
    (nothing, ["--lpips", "vgg"], ["--lpips vgg", "alex=FILE or none"]),
    (nothing, ["--lpips", "alex"], ["--image-size 16", "--lpips none"]),
    (nothing, ["--classifier", "none.pt"], ["--classifier none.pt", "classify.py"]),
    (nothing, ["--gg-extractor", "vgg"], ["--gg-extractor vgg", "retina"]),
    (nothing, ["--device-list", "cuda:99"], ["cuda:99", "--device-list"]),
    (nothing, ["--device-list", "gpu"], ["gpu", "cuda:N"]),
    (nothing, ["--output", __file__], ["--output", "is a file"]),
])
def test_mistakes(copy, in_process, monkeypatch, damage, more, parts):
    def slow(*_):
        raise AssertionError("slow work began")

    monkeypatch.setattr(evaluation, "extract", slow)
    damage(copy)
    before = sorted(copy.rglob("*"))
    code, out, err = in_process(*flags(copy, *more))
    assert code == 2
    assert err.startswith("evaluate.py: error: ") and err.count("\n") == 1, err
    assert not out
    for part in parts:
        assert part in err
    assert sorted(copy.rglob("*")) == before


# ---- which images are shown

def test_every_label_combination_is_shown_before_any_twice():
    labels = np.array([[0, 0]] * 6 + [[1, 0]] * 2 + [[1, 1]])
    order = pictures.different(labels, [5, 3, 7, 0, 8, 1, 2, 6, 4])
    assert order == [5, 7, 8, 3, 0, 1, 2, 6, 4]


def test_generated_images_are_matched_by_labels():
    wanted = np.array([[1, 0], [0, 0], [1, 0], [1, 1]])
    labels = np.array([[0, 1], [1, 1], [0, 0], [1, 0], [0, 1]])
    assert pictures.match(wanted, labels, [4, 3, 2, 1, 0]) == [3, 2, 4, 1]  # the second [1, 0]: any that is left
    assert pictures.match(wanted, None, [2, 0, 1]) == [2, 0, 1, None]


# ---- pictures

def flat(*colours, size=10):
    return np.stack([np.full((size, size, 3), c, np.uint8) for c in colours])


def test_grid_enlarges_by_a_whole_factor():
    image = draw(1, 0)[0]
    tile = np.asarray(grid([image], tile=100))  # 16 pixels × 7 = 112
    left = (tile.shape[1] - 112) // 2
    assert np.array_equal(tile[left:left + 112:7, left:left + 112:7], image)
    assert np.array_equal(tile[left + 6:left + 112:7, left + 6:left + 112:7], image)
    assert grid(flat(0, size=200), tile=100).size == (212, 212)  # larger ones stay as they are


def tiles(picture, size, below):
    """Grey value at the centre of every place of a grid without titles."""
    pixels = np.asarray(picture)[:, :, 0]
    return pixels[6 + size // 2::size + 6 + below, 6 + size // 2::size + 6].tolist()


def test_grid_places():
    images = [*flat(10, 20, 30, 40), None, *flat(60)]
    assert tiles(grid(images, columns=4, tile=20), 20, 0) == [[10, 20, 30, 40], [255, 60, 255, 255]]


def test_captions_stand_below_their_image_and_wrap():
    plain = np.asarray(grid(flat(200, 200), tile=60))
    written = np.asarray(grid(flat(200, 200), ["", "AMD, DME, CNV, MEM, FLD"], tile=60))
    added = written.shape[0] - plain.shape[0]
    assert added > 25  # more than two lines of at least 10 pixels, since 60 pixels hold two names
    below = written[66:66 + added]
    assert below[:, :70].min() == 255  # nothing under the first
    assert below[:, 72:].min() < 100
    assert below[:, -6:].min() == 255  # nothing beyond the second
    assert np.array_equal(written[:66], plain[:66])


def test_pairs_put_real_above_generated():
    """Three pairs in two columns: two pairs, then, below, one."""
    picture = np.asarray(pairs(flat(10, 20, 30), flat(110, 120, 130), ["a", "b", "c"], columns=2))[:, :, 0]

    def colours(x):
        return [v for v in dict.fromkeys(picture[:, x].tolist()) if v != 255]

    assert colours(-71) == [20, 120]  # tiles of 130 pixels and a gap of 6: the centre of the last column
    assert colours(-71 - 136) == [10, 110, 30, 130]


def test_caption_names_what_is_there():
    assert caption(np.array([1, 0, 1]), ("AMD", "DME", "CNV")) == "AMD, CNV"
    assert caption(np.array([0, 0, 0]), ("AMD", "DME", "CNV")) == "no label"
