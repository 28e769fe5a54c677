"""classify.py as a user runs it, on tiny phantoms with a tiny network; and the parts it is made of."""

import json
import shutil
import sys
from argparse import Namespace
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from conftest import call_script, ctrl_c_at, generators, run_script, succeeded
from PIL import Image

import classify
from classification import batches, filtering
from classification.data import Fold, read_fold
from classification.dropout import DropoutByImage
from classification.network import build, has_batch_norm, load_classifier, save, synchronise_batch_norm
from classification.report import fold_result, saved_at_level, summary
from classification.synthetic import choose
from core import claims
from core.errors import UserError
from core.files import write_json
from dataset import leaks, outside
from dataset.images import load_images
from dataset.root import fingerprint, read_split, write_split
from dataset.sets import LabelledImages
from metrics.classification import all_scores

NET = ("--backbone", "test_byobnet", "--no-pretrained", "--image-size", 32, "--lr", 0.05, "--log-every", 1,
       "--permutations", 99)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classify") / "phantom"
    succeeded(call_script("prepare_data.py", "--source", "phantom", "--count", 60, "--image-size", 32, "--folds", 2,
                          "--output", folder))
    return folder


def run(data, output, *more, way=call_script, **launch):
    return way("classify.py", "--data-path", data, "--output", output, *NET, "--epochs", 2, *more, **launch)


@pytest.fixture(scope="module")
def baseline(data):
    """Both folds, without synthetic images."""
    folder = data.parent / "baseline"
    folder.mkdir()
    (folder / "said.txt").write_text(succeeded(run(data, folder)))
    return folder


def sample_folder(place, data, fold=0, rounds=2, label_names=None, labels=None, about=None, name="train_syn"):
    """What sample_ddp.py leaves: real training images, mirrored, `rounds` times over."""
    split = read_split(data, f"train_{fold}")
    folder = place / f"GeCA-XS-GS-fold-{fold}-nstep-9"
    (folder / "gen_samples").mkdir(parents=True)
    names = [f"gen_samples/{i:06d}.png" for i in range(rounds * len(split))]
    for i, file in enumerate(names):
        Image.open(split.paths[i % len(split)]).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / file)
    labels = np.tile(split.labels if labels is None else labels, (rounds, 1))
    write_split(folder, f"{name}_{fold}", names, labels, label_names or split.label_names, names)
    said = {"model": "GeCA-XS", "trained_on_fold": fold,
            "training_images": fingerprint(read_split(data, f"train_{fold}"))}
    (folder / "settings.json").write_text(json.dumps({"about": said | (about or {})}))
    return folder


@pytest.fixture(scope="module")
def synthetic(data):
    place = data.parent / "synthetic"
    for fold in (0, 1):
        sample_folder(place, data, fold)
    return place


def results(folder):
    return json.loads((folder / "results.json").read_text())


def metrics(folder, name, fold=0):
    records = map(json.loads, (folder / f"fold-{fold}" / "metrics.jsonl").read_text().splitlines())
    return {r["step"]: r[name] for r in records if name in r}


# ---- from end to end


def test_a_run_leaves_what_it_promises(data, baseline):
    found, said = results(baseline), (baseline / "said.txt").read_text()
    split = read_split(data, "test")
    assert (found["kind"], found["method"], found["data"]) == ("classification", "baseline", "phantom")
    assert found["test_sha256"] == fingerprint(split) and found["label_names"] == list(split.label_names)
    assert list(found["folds"]) == ["0", "1"] and found["significance"] is None
    for k, fold in found["folds"].items():
        sizes = [len(read_split(data, name)) for name in (f"train_{k}", f"val_{k}", "test")]
        assert [fold["n_train"], fold["n_val"], fold["n_test"], fold["n_synthetic"]] == [*sizes, 0]
        assert fold["epochs"] == 2 and fold["steps"] == 2 * (sizes[0] // 8) and fold["best_epoch"] in (1, 2)
        with np.load(baseline / f"predictions_{k}.npz") as file:
            saved = dict(file)
        assert saved["filenames"].tolist() == list(split.filenames) and np.array_equal(saved["labels"], split.labels)
        best = load_classifier(baseline / f"fold-{k}" / "checkpoints" / "best_ckpt.pt")
        scores = best.scores(load_images(split.paths, 32))
        np.testing.assert_allclose(saved["scores"], scores, rtol=1e-4, atol=1e-5)
        expected = all_scores(saved["scores"].astype(float), split.labels, split.label_names)
        image = fold["levels"]["image"]
        assert image["0.5"]["labels"] == expected["labels"] and image["0.5"]["macro"] == expected["macro"]
        low, high = image["0.5"]["intervals"]["ap"]
        assert low < expected["macro"]["ap"] < high and low < high
        assert fold["validation_map"] == max(metrics(baseline, "validation_map", k).values())
        assert fold["levels"]["eye"]["0.5"]["macro"]["ap"] is not None
        chosen = [t for t in saved["image_thresholds"] if np.isfinite(t)]
        assert chosen and chosen == [t for t in image["validation"]["thresholds"].values() if t is not None]
        log = (baseline / f"fold-{k}" / "log.txt").read_text()
        assert "images/s" in log and "mixed precision no" in log and "tested the network of epoch" in log
        assert list(metrics(baseline, "loss", k)) == list(range(1, fold["steps"] + 1))
        assert any(p.name.startswith("events.out") for p in (baseline / f"fold-{k}").iterdir())
    values = [fold["levels"]["image"]["0.5"]["macro"]["ap"] for fold in found["folds"].values()]
    assert found["summary"]["image"]["0.5"]["ap"] == pytest.approx(
        {"mean": sum(values) / 2, "std": abs(values[0] - values[1]) / 2**0.5, "folds": 2})
    assert f"{50 * sum(values):.2f} ± {abs(values[0] - values[1]) * 50 * 2**0.5:.2f}" in said
    assert said.rstrip().endswith(f"{baseline}: results.json")


def test_a_finished_fold_stays_and_others_join_it(data, baseline, tmp_path):
    succeeded(run(data, tmp_path / "out", "--fold", 1))
    assert list(results(tmp_path / "out")["folds"]) == ["1"]
    file = tmp_path / "out" / "fold-1" / "checkpoints" / "last_ckpt.pt"
    before = file.stat().st_mtime_ns
    succeeded(run(data, tmp_path / "out"))
    assert file.stat().st_mtime_ns == before
    ours, theirs = results(tmp_path / "out")["folds"], results(baseline)["folds"]
    assert ours["0"]["levels"] == theirs["0"]["levels"] and ours["1"]["levels"] == theirs["1"]["levels"]
    done = run(data, tmp_path / "out", "--augment", "none")
    assert done.returncode == 2 and "other settings (augment geometric (now none)" in done.stderr


def test_the_default_output_is_a_numbered_folder_found_again(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ("classify.py", "--data-path", data, *NET, "--fold", 0, "--epochs", 1)
    for _ in range(2):
        succeeded(call_script(*command))
    succeeded(call_script(*command, "--augment", "none"))
    assert sorted(p.name for p in (tmp_path / "results_classify").glob("0*")) == [
        "000-baseline", "001-baseline-without-augmentation"]


def test_synthetic_images_join_and_are_compared(data, baseline, synthetic, tmp_path):
    out = succeeded(run(data, tmp_path / "out", "--synthetic", synthetic, "--baseline", baseline))
    found = results(tmp_path / "out")
    assert found["method"] == "GeCA-XS" and "against baseline" in out
    for k, fold in found["folds"].items():
        real = fold["n_train"]
        assert fold["n_synthetic"] == 2 * real and fold["steps_per_epoch"] == 3 * real // 8 and not fold["remarks"]
        assert fold["synthetic"][0]["folder"].endswith(f"fold-{k}-nstep-9")
    block = found["significance"]
    assert block["baseline"] == "baseline" and block["updates"][0] > block["updates"][1]
    image = block["levels"]["image"]
    tested = read_split(data, "test")
    assert image["units"] == len(set(tested.patients)) and image["permutations"] == 99
    difference = [f["summary"]["image"]["0.5"]["ap"]["mean"] for f in (found, results(baseline))]
    assert image["permutation"]["ap"]["difference"] == pytest.approx(difference[0] - difference[1])
    for level, threshold in ((level, threshold) for level in ("image", "eye") for threshold in ("0.5", "validation")):
        ours, theirs = (f["summary"][level][threshold]["f1_sen_spe"]["mean"] for f in (found, results(baseline)))
        test = block["levels"][level]["permutation"][f"f1_sen_spe@{threshold}"]
        assert test["difference"] == pytest.approx(ours - theirs)
    assert 0.01 <= image["permutation"]["ap"]["p"] <= 1
    assert block["levels"]["eye"]["units"] == image["units"]

    assert call_script("classify.py", "--data-path", data, "--output", tmp_path / "x", *NET, "--fold", 0, "--baseline",
                       baseline).stderr.endswith("compare runs on the same data and folds\n")


def test_equal_updates_with_and_without_synthetic_images(data, synthetic, tmp_path):
    """--steps-per-epoch: as many steps and validations, whatever there is to train with; and --synthetic-ratio."""
    steps = []
    for name, more in (("a", ()), ("b", ("--synthetic", synthetic, "--synthetic-ratio", 1.5))):
        succeeded(run(data, tmp_path / name, "--fold", 0, "--steps-per-epoch", 3, *more))
        steps.append((list(metrics(tmp_path / name, "loss")), list(metrics(tmp_path / name, "validation_map"))))
    assert steps[0] == steps[1] == ([1, 2, 3, 4, 5, 6], [3, 6])
    fold = results(tmp_path / "b")["folds"]["0"]
    assert fold["n_synthetic"] == int(1.5 * fold["n_train"])


def test_a_filter_leaves_out_what_does_not_show_its_labels(data, baseline, tmp_path):
    """Real images, mirrored, with their labels, and again with those of other images: these go, and it is said.

    The judge knows the labels of the images that it sees; for the run it is a trained one, which knows little.
    """
    split = read_split(data, "train_0")
    folder, n = sample_folder(tmp_path, data), len(split)
    wrong = np.roll(split.labels, 1, axis=0)
    names = [f"gen_samples/{i:06d}.png" for i in range(2 * n)]
    write_split(folder, "train_syn_0", names, np.concatenate([split.labels, wrong]), split.label_names, names)
    fold = read_fold(data, 0, synthetic=[folder], judge=baseline)
    truth = {image.tobytes(): y for part in (split, fold.validation, fold.pools[0][0].take(range(n)))
             for image, y in zip(load_images(part.paths, 32), part.labels, strict=True)}
    judge = SimpleNamespace(image_size=32, identity="all-knowing", features=lambda images: images.mean((1, 2)),
                            scores=lambda images: np.array([truth[image.tobytes()] for image in images]))
    (kept,), report = filtering.sift(judge, fold, 0.0, 8)
    same = np.flatnonzero((split.labels == wrong).all(1))
    near = {*range(2 * n)} if not report["folders"][0]["far"] else {*kept}
    assert {*kept} == ({*range(n)} | {*(same + n).tolist()}) & near and len(kept) > n // 2
    assert report["folders"][0]["unlikely"] == n - len(same)
    assert sum(ours for ours, _ in report["folders"][0]["kept_of_label"].values()) == fold.pools[0][1][kept].sum()

    out = tmp_path / "out"
    told = succeeded(run(data, out, "--fold", 0, "--synthetic", folder, "--filter", baseline, "--filter-quantile", 0.5))
    found = results(out)["folds"]["0"]
    said = found["filter"]["folders"][0]
    assert found["n_synthetic"] == said["kept"] < said["images"] == 2 * n
    assert f"filter: {said['kept']} of {2 * n} generated images kept" in told
    other = run(data, out, "--fold", 0, "--synthetic", folder, "--filter-quantile", 0.5)
    assert other.returncode == 2 and "filter" in other.stderr


def test_limits_are_those_of_validation_images():
    likelihood = filtering.label_likelihood([[0.5, 1.0], [0.25, 0.0]], np.array([[1, 1], [0.5, 1]]))
    assert likelihood == pytest.approx([np.log(0.5) / 2, (np.log(0.25 * 0.75) / 2 + np.log(1e-7)) / 2], abs=1e-6)
    bounds = filtering.limits(np.arange(11.0), np.arange(11.0), 0.1)
    assert (bounds.likelihood, bounds.distance) == (1, 9)


def test_filters_that_may_not_judge_are_refused(data, baseline, synthetic, tmp_path):
    def said(*more):
        ended = run(data, tmp_path / "out", "--synthetic", synthetic, "--fold", 0, *more)
        assert ended.returncode == 2 and not (tmp_path / "out").exists()
        return ended.stderr

    assert "expected the output of classify.py on real images" in said("--filter", tmp_path)
    assert "needs --synthetic" in run(data, tmp_path / "out", "--filter", baseline).stderr
    seen = leaks.identities(read_split(data, "test"))
    for other, words in (({"seen": None}, "does not say which images"), ({"synthetic": 3}, "expected real ones alone"),
                         ({"label_names": ["x"] * 11}, "knows the labels x"),
                         ({"seen": seen}, "images of test.csv, expected none")):
        file = tmp_path / "other" / "fold-0" / "checkpoints" / "best_ckpt.pt"
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(torch.load(filtering.classifier_file(baseline, 0), weights_only=True) | other, file)
        assert words in said("--filter", tmp_path / "other")


def test_the_older_spelling_of_the_ratio_goes_on_in_the_same_folder(data, synthetic, tmp_path):
    """--real-to-synthetic was the flag, and the name of the setting in folders of then."""
    out = tmp_path / "out"
    succeeded(run(data, out, "--fold", 0, "--epochs", 1, "--synthetic", synthetic, "--synthetic-ratio", 1))
    for file in (out / "settings.json", out / "fold-0" / "settings.json"):
        stored = claims.read_settings(file.parent)
        assert stored["synthetic_ratio"] == 1
        stored["real_to_synthetic"] = stored.pop("synthetic_ratio")
        write_json(file, stored)
    before = (out / "fold-0" / "result.json").stat().st_mtime_ns
    for spelling in ("--synthetic-ratio", "--real-to-synthetic"):
        succeeded(run(data, out, "--fold", 0, "--epochs", 1, "--synthetic", synthetic, spelling, 1))
    assert (out / "fold-0" / "result.json").stat().st_mtime_ns == before
    assert "real_to_synthetic" not in claims.read_settings(out)
    other = run(data, out, "--fold", 0, "--epochs", 1, "--synthetic", synthetic, "--synthetic-ratio", 2)
    assert other.returncode == 2 and "synthetic_ratio 1" in other.stderr and "(now 2" in other.stderr


def test_a_subset_of_the_labels(data, synthetic, tmp_path):
    succeeded(run(data, tmp_path / "out", "--fold", 0, "--labels", "AMD", "NOR", "--synthetic", synthetic))
    assert results(tmp_path / "out")["label_names"] == ["NOR", "AMD"]
    assert load_classifier(tmp_path / "out/fold-0/checkpoints/best_ckpt.pt").label_names == ("NOR", "AMD")
    with np.load(tmp_path / "out" / "predictions_0.npz") as file:
        assert np.array_equal(file["labels"], read_split(data, "test").labels[:, :2])


def test_test_images_are_opened_once_and_last(data, tmp_path, monkeypatch):
    opened, load = [], batches.load_image
    monkeypatch.setattr(batches, "load_image", lambda path, size: (opened.append(path.name), load(path, size))[1])
    succeeded(run(data, tmp_path / "out", "--fold", 0, "--cache-gb", 0))
    names = [p.name for p in read_split(data, "test").paths]
    assert sorted(opened[-len(names):]) == sorted(names) and not {*opened[:-len(names)]} & {*names}


# ---- stopping, processes


def test_early_stopping_ends_training_for_good(data, tmp_path):
    """After the first epoch that is no better; and the same command, before the fold was tested, trains no further."""
    more = ("--fold", 0, "--epochs", 50, "--early-stopping", 1, "--steps-per-epoch", 2)
    succeeded(run(data, tmp_path / "out", *more))
    fold, losses = results(tmp_path / "out")["folds"]["0"], metrics(tmp_path / "out", "loss")
    assert 2 <= fold["epochs"] < 50 and fold["best_epoch"] == fold["epochs"] - 1 and len(losses) == 2 * fold["epochs"]
    (tmp_path / "out" / "fold-0" / "result.json").unlink()
    succeeded(run(data, tmp_path / "out", *more))
    assert results(tmp_path / "out")["folds"]["0"] == fold and metrics(tmp_path / "out", "loss") == losses


def equal_runs(a, b, rtol):
    assert metrics(a, "loss") == pytest.approx(metrics(b, "loss"), rel=rtol)
    assert metrics(a, "validation_map") == pytest.approx(metrics(b, "validation_map"), rel=rtol)
    files = [np.load(folder / "predictions_0.npz")["scores"] for folder in (a, b)]
    np.testing.assert_allclose(*files, rtol=rtol, atol=rtol / 10)


def test_stopped_and_continued_is_as_if_never_stopped(data, baseline, tmp_path):
    """Ctrl-C at step 1 stops at step 5, inside an epoch or at its end; the same command goes on."""
    more = ("--fold", 0, "--steps-per-epoch", 7)
    succeeded(run(data, tmp_path / "whole", *more))
    with ctrl_c_at(1):
        done = run(data, tmp_path / "halves", *more)
    assert done.returncode == 130 and "stopped at step 5; the same command continues" in done.stdout
    assert not (tmp_path / "halves" / "results.json").exists()
    assert "continuing from step 5" in succeeded(run(data, tmp_path / "halves", *more))
    equal_runs(tmp_path / "halves", tmp_path / "whole", 1e-5)


DROPPING = """
import functools, runpy, sys, timm
timm.create_model = functools.partial(timm.create_model, drop_rate=0.3, drop_path_rate=0.3)
sys.argv, sys.path[0] = sys.argv[1:], "."
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_two_processes_train_as_one_does(data, tmp_path):
    """Also where their shares are unequal: of a batch of 7 images 4 and 3; and with dropout and stochastic depth."""
    more = ("--fold", 0, "--epochs", 10, "--global-batch-size", 7, "--backbone", "test_convnext")  # has no batch norm
    (tmp_path / "dropping.py").write_text(DROPPING)

    def way(*arguments, **launch):
        return run_script(tmp_path / "dropping.py", *arguments, **launch)

    succeeded(run(data, tmp_path / "one", *more, way=way))
    succeeded(run(data, tmp_path / "two", *more, way=way, processes=2, launcher="torchrun"))
    assert "2 process(es)" in (tmp_path / "two" / "fold-0" / "log.txt").read_text()
    equal_runs(tmp_path / "two", tmp_path / "one", 1e-5)
    assert len(metrics(tmp_path / "one", "loss")) == 10 * (len(read_split(data, "train_0")) // 7) >= 30
    one, two = ((tmp_path / name / "fold-0" / "metrics.jsonl").read_text() for name in ("one", "two"))
    assert two.count("\n") == one.count("\n")  # only the first process writes


@pytest.mark.parametrize("backbone, rates", [
    ("test_convnext", {"drop_rate": 0.3, "drop_path_rate": 0.3}),
    ("test_vit", {"drop_rate": 0.3, "proj_drop_rate": 0.2, "attn_drop_rate": 0.2, "pos_drop_rate": 0.1})])
def test_what_is_dropped_of_an_image_depends_on_its_place_alone(backbone, rates):
    x = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    net = timm.create_model(backbone, **rates, **({"img_size": 32} if backbone == "test_vit" else {})).train()

    def logits(places, seed=0):
        with DropoutByImage(generators(5, seed)[places]) as dropout, torch.no_grad():
            return net(x[places]), dropout.drew

    (whole, drew), again = logits(slice(None)), logits(slice(None))[0]
    assert drew and torch.equal(whole, again) and not torch.allclose(whole, logits(slice(None), seed=1)[0])
    for places in (slice(0, None, 2), slice(1, None, 2)):
        torch.testing.assert_close(logits(places)[0], whole[places], rtol=1e-4, atol=1e-5)
    before = torch.get_rng_state()
    logits(slice(None))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("p", [0.25, 0.5])
@pytest.mark.parametrize("drop", [torch.nn.functional.dropout, torch.native_dropout])  # as on a CPU, as on a GPU
def test_dropout_keeps_the_share_and_the_mean(drop, p):
    x = torch.ones(4, 50, 50, requires_grad=True)
    with DropoutByImage(generators(2)):  # two rows of each of two images
        y = drop(x, p, True)
    y = y if isinstance(y, torch.Tensor) else y[0]
    y.sum().backward()
    assert torch.equal(x.grad, y) and y.unique().tolist() == [0, pytest.approx(1 / (1 - p))]
    assert (y > 0).float().mean().item() == pytest.approx(1 - p, abs=0.03)
    assert len({row.numpy().tobytes() for row in y.detach()}) == 4


def test_a_mask_that_is_not_of_images_is_refused():
    with pytest.raises(UserError, match="3 rows for 2 images"), DropoutByImage(generators(2)):
        torch.nn.functional.dropout(torch.ones(3, 4), 0.5)


def test_batch_norm_is_refused_in_several_processes_on_a_cpu(data, tmp_path, monkeypatch):
    two = SimpleNamespace(num_processes=2, device=torch.device("cpu"))
    monkeypatch.setattr("core.runtime.start", lambda: two)
    done = run(data, tmp_path / "out", "--fold", 0)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    for part in ("--backbone test_byobnet", "batch norm", "2 processes on a CPU", "start one process", "use GPUs"):
        assert part in done.stderr
    assert not (tmp_path / "out").exists()


def test_synchronised_batch_norm_has_the_same_weights_and_activations():
    x = torch.randint(256, (4, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    one, several = build("test_byobnet", 2, 32), synchronise_batch_norm(build("test_byobnet", 2, 32))
    norms = [m for m in several.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(m, torch.nn.SyncBatchNorm) for m in norms)
    assert has_batch_norm(one) and has_batch_norm(several) and not has_batch_norm(build("test_convnext", 2, 32))
    weights = one.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in several.state_dict().items())
    several.load_state_dict(weights)  # the names are the same
    with torch.inference_mode():
        assert torch.equal(one.eval()(x), several.eval()(x))


# ---- leaks and other mistakes: one line, exit code 2, nothing written


def shared_patient(place, data):
    rows, others = ((data / f"{name}.csv").read_text().splitlines() for name in ("test", "train_0"))
    assert rows[0].endswith(",patient_name,eye")
    rows[1] = ",".join([*rows[1].split(",")[:-2], *others[1].split(",")[-2:]])
    (data / "test.csv").write_text("\n".join(rows))


def validation_samples(place, data):
    sample_folder(place, data, name="val_syn")


def labels_of_the_test_set(place, data):
    labels = read_split(data, "test").labels
    folder = sample_folder(place, data)
    names = [f"gen_samples/{i:06d}.png" for i in range(len(labels))]
    write_split(folder, "train_syn_0", names, labels, read_split(data, "test").label_names, names)


def the_test_images(place, data):
    """Shuffled, and with labels of their own: only the files tell."""
    folder, test = sample_folder(place, data), read_split(data, "test")
    names = [str(path.resolve()) for path in test.paths[::-1]]
    write_split(folder, "train_syn_0", names, 1 - test.labels, test.label_names, names)


def patients_of_the_test_set(place, data):
    folder, test = sample_folder(place, data), read_split(data, "test")
    made = read_split(folder, "train_syn_0")
    patients = [*made.patients[:-1], test.patients[0]]
    write_split(folder, "train_syn_0", made.filenames, made.labels, made.label_names, patients)


def foreign_settings(place, data):
    (sample_folder(place, data) / "settings.json").write_text('{"about": 3}')


def other_generator(place, data):
    other = fingerprint(read_split(data, "train_1"))
    sample_folder(place, data, about={"training_images": other, "trained_on_fold": 1})


def unknown_generator(place, data):
    sample_folder(place, data, about={"training_images": "0" * 64})


def generator_that_saw_test_images(place, data):
    folder = sample_folder(place, data)
    seen = leaks.identities(read_split(data, "train_0")) + leaks.identities(read_split(data, "test"))[:2]
    (folder / "seen.txt").write_text("\n".join(seen))


def generator_of_another_fold(place, data):
    sample_folder(place, data, about={"training_images": None, "trained_on_fold": 1})


def other_fold(place, data):
    sample_folder(place, data, fold=1)


def two_folders(place, data):
    sample_folder(place, data)
    shutil.copytree(place / "GeCA-XS-GS-fold-0-nstep-9", place / "again")


def other_labels(place, data):
    sample_folder(place, data, label_names=[*"ABCDEFGHIJK"])


def unfinished(place, data):
    (sample_folder(place, data) / "train_syn_0.csv").rename(place / "GeCA-XS-GS-fold-0-nstep-9" / "train_syn_0.npy")


def no_folder(place, data):
    pass


@pytest.mark.parametrize("damage, inside, parts", [
    (shared_patient, None, ["train_0.csv and test.csv: 1 patient(s)", "--allow-leaks"]),
    (validation_samples, True, ["val_syn_0.csv", "train_syn_0.csv", "validation images"]),
    (labels_of_the_test_set, False, ["train_syn_0.csv", "test.csv"]),
    (the_test_images, False, ["train_syn_0.csv and test.csv: ", " identical image(s) in both, the first is "]),
    (patients_of_the_test_set, False, ["train_syn_0.csv and test.csv: 1 patient(s) in both, the first is "]),
    (foreign_settings, False, ["settings.json", "damaged"]),
    (other_generator, False, ["trained on train_1.csv", "expected train_0.csv"]),
    (unknown_generator, False, ["does not list"]),
    (generator_that_saw_test_images, False, ["was trained on 2 of the ", "images of test.csv"]),
    (generator_of_another_fold, False, ["trained on fold 1", "fold 0"]),
    (other_fold, True, ["train_syn_1", "another fold", "train_syn_0.csv"]),
    (other_fold, False, ["neither it nor a folder in it", "train_syn_0.csv"]),
    (two_folders, False, ["2 folders", "again", "GeCA-XS-GS-fold-0-nstep-9"]),
    (other_labels, False, ["A B C", "NOR AMD"]),
    (unfinished, True, ["unfinished"]), (unfinished, False, ["is unfinished"]),
    (no_folder, False, ["no such folder"])])
def test_leaks_and_wrong_samples_are_refused(data, tmp_path, damage, inside, parts, monkeypatch):
    monkeypatch.setattr(outside, "_allowed", False)  # given for one case, in this very process
    data = shutil.copytree(data, tmp_path / "data")
    place = tmp_path / "synthetic"
    damage(place, data)
    more = () if inside is None else ("--synthetic", next(place.iterdir()) if inside else place)
    more += ("--allow-outside",) if damage is the_test_images else ()
    done = run(data, tmp_path / "out", "--fold", 0, *more)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("classify.py: error: ") and not done.stdout
    for part in parts:
        assert part in done.stderr
    assert not (tmp_path / "out").exists()


def test_leaks_can_be_allowed_and_stay_in_the_results(data, tmp_path):
    data = shutil.copytree(data, tmp_path / "data")
    shared_patient(None, data)
    out = succeeded(run(data, tmp_path / "out", "--fold", 0, "--epochs", 1, "--allow-leaks"))
    assert "warning: LEAK: " in out and "1 patient(s)" in results(tmp_path / "out")["folds"]["0"]["remarks"][0]


def test_labels_are_joined_by_name(data, tmp_path):
    """Columns in reverse order; and samples of which nothing is known: allowed, with a remark."""
    split = read_split(data, "train_0")
    folder = sample_folder(tmp_path, data, rounds=1, label_names=split.label_names[::-1], labels=split.labels[:, ::-1])
    (folder / "settings.json").unlink()
    fold = read_fold(data, 0, synthetic=[folder])
    assert np.array_equal(fold.training.labels, np.tile(split.labels, (2, 1)))
    assert len(fold.remarks) == 1 and "does not say which images" in fold.remarks[0]
    assert fold.training.paths[len(split)].parent.parent == folder


def test_labels_made_by_hand_are_remarked(data, tmp_path):
    """Shuffled labels, as in the check that images without meaning do not help."""
    split = read_split(data, "train_0")
    sample_folder(tmp_path, data, labels=split.labels[::-1])
    fold = read_fold(data, 0, synthetic=[tmp_path])
    assert len(fold.remarks) == 1 and "row by row" in fold.remarks[0]


def test_which_synthetic_images():
    assert choose(20, 30, 10, 0) == list(range(20))
    chosen = choose(50, 25, 10, 0)
    assert chosen[:20] == list(range(20)) and len(chosen) == 25 and {*chosen[20:]} < {*range(20, 30)}
    assert chosen != choose(50, 25, 10, 1)


@pytest.mark.parametrize("more, parts", [
    (["--labels", "XYZ"], ["--labels XYZ", "NOR AMD"]),
    (["--fold", "7"], ["train_7.csv"]),
    (["--pretrained"], ["--backbone test_byobnet", "fetch_assets.py --to DIR", "--assets DIR", "--pretrained-file",
                        "--no-pretrained"]),
    (["--pretrained", "--pretrained-file", "nowhere.pt"], ["nowhere.pt", "no such file"]),
    (["--pretrained-file", "x.pt"], ["contradicts --no-pretrained"]),
    (["--backbone", "resnet51"], ["--backbone", "no such model"]),
    (["--synthetic-ratio", "2"], ["needs --synthetic"]),
    (["--mixed-precision", "fp16"], ["fp16 needs a GPU"]),
    (["--global-batch-size", "1"], ["--global-batch-size", "1 image(s)"]),
    (["--baseline", "nowhere"], ["--baseline", "no such file"]),
    (["--lr", "0"], ["expected a number of at least"]),
    (["--output", __file__], ["is a file"])])
def test_mistakes(data, tmp_path, monkeypatch, more, parts):
    monkeypatch.setattr("core.assets.reachable", lambda url: False)
    done = run(data, tmp_path / "out", "--fold", 0, *more)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    for part in parts:
        assert part in done.stderr
    assert not (tmp_path / "out").exists()


# ---- the parts


def test_the_learning_rate_is_halved_when_validation_stalls(data, tmp_path):
    """The same scores after every epoch: progress at epoch 5, where counting begins; halved 5 epochs later, twice.

    Stopped and continued at epoch 8, where three of the five have passed.
    """
    argv = ["classify.py", "--data-path", data, *NET, "--epochs", 20, "--early-stopping", 18]
    with mock.patch.object(sys, "argv", [*map(str, argv)]):
        recipe = classify.recipe_of(classify.parse_args())
    fold = read_fold(data, 0)
    scores = np.random.default_rng(0).random(fold.validation.labels.shape)

    def begun():
        training = classify.Training(recipe, Accelerator(cpu=True), fold)
        training.predict = lambda *_: scores
        return training

    training, rates, best = begun(), [], []
    while not training.finished:
        if training.epoch == 8:
            training.save(tmp_path / "last.pt", "method", training=training.state())
            training = begun()
            training.restore(tmp_path / "last.pt")
        training.step += training.steps_per_epoch
        best.append(training.validate()[1])
        rates.append(round(0.05 / training.lr))
    assert rates == 9 * [1] + 5 * [2] + 5 * [4]
    assert best == [True] + 18 * [False]  # the first of equal ones; then --early-stopping
    training.optimiser.param_groups[0]["lr"], training.best_epoch = 0.9e-7, training.epoch
    assert training.finished


def test_augmentation_is_a_function_of_seed_epoch_and_image(data):
    paths = read_split(data, "train_0").paths
    made = batches.Batches(batches.ImageStore(paths, 32, 1e9), 4, "geometric", 0, 0)
    indices, pixels = made.share(3)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = batches.Batches(batches.ImageStore(paths, 32, 0), 4, "geometric", 0, 0)
    shares = [again.share(3, rank, 2) for rank in (0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    for rank, (mine, part) in enumerate(shares):
        assert mine == indices[rank::2] and torch.equal(part, pixels[rank::2])
    plain = batches.Batches(batches.ImageStore(paths, 32, 0), 4, "none", 0, 0).share(3)
    assert plain[0] == indices and np.array_equal(plain[1], load_images([paths[i] for i in indices], 32))
    assert all((a != b).any() for a, b in zip(plain[1], pixels, strict=True))
    steps = len(paths) // 4  # of an epoch
    first = [made.images_of_step(s)[1] for s in range(steps)]
    assert len({i for batch in first for i in batch}) == 4 * steps  # each at most once
    assert made.images_of_step(steps) != (1, first[0]) and made.images_of_step(steps)[0] == 1


def test_every_image_and_epoch_is_augmented_in_its_own_way(data):
    one = read_split(data, "train_0").paths[:1]
    made = batches.Batches(batches.ImageStore(8 * one, 32, 1e9), 4, "geometric", 0, 0)
    assert len({image.numpy().tobytes() for step in range(4) for image in made.share(step)[1]}) == 16


def test_augmentation_changes_what_it_says():
    """A white square on grey stays one and in the middle third, wherever it turns; brightness differs by no more."""
    image = np.full((64, 64, 3), 100, np.uint8)
    image[28:36, 28:36] = 180
    made = [batches.geometric(image, torch.Generator().manual_seed(i)) for i in range(60)]
    assert all(m.shape == image.shape and m.dtype == np.uint8 for m in made)
    levels = [float(np.median(m)) for m in made]
    assert min(levels) < 92 and max(levels) > 108 and min(levels) > 60 and max(levels) < 145
    for m in made:
        bright = np.argwhere(m[..., 0] > np.median(m) + 25)
        assert 40 < len(bright) < 130 and (abs(bright.mean(0) - 31.5) < 12).all()


def test_images_are_kept_up_to_the_limit(data, monkeypatch):
    opened, load = [], batches.load_image
    monkeypatch.setattr(batches, "load_image", lambda path, size: (opened.append(path), load(path, size))[1])
    store = batches.ImageStore(read_split(data, "train_0").paths[:4], 16, 2 * 3 * 16 * 16 + 5)
    for _ in range(2):
        store.stack([0, 1, 2, 3])
    assert len(store.kept) == 2 and len(opened) == 4 + 2


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    file = tmp_path_factory.mktemp("classifier") / "c.pt"
    save(file, build("test_byobnet", 2, 32, seed=3), "test_byobnet", ["A", "B"])
    return file


def test_a_classifier_prepares_its_images(classifier):
    loaded = load_classifier(classifier)
    assert (loaded.label_names, loaded.image_size, loaded.dimensions) == (("A", "B"), 32, 256)
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    scores = loaded.scores(images, batch_size=2)
    assert scores.shape == (5, 2) and scores.dtype == np.float32
    config = loaded.network.backbone.pretrained_cfg
    x = (images / 255 - config["mean"]) / config["std"]
    with torch.inference_mode():
        expected = loaded.network.backbone(torch.tensor(x).permute(0, 3, 1, 2).float()).sigmoid()
        features = loaded.network.backbone.forward_features(torch.tensor(x).permute(0, 3, 1, 2).float())
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    np.testing.assert_allclose(loaded.features(images), features.mean((2, 3)), rtol=1e-3, atol=1e-4)
    padded = np.pad(images, ((0, 0), (0, 0), (7, 7), (0, 0)))
    np.testing.assert_allclose(loaded.scores(padded), scores, atol=1e-6)  # the central crop
    assert loaded.scores(images[:, ::2, ::2]).shape == (5, 2)


def test_the_identity_changes_with_the_weights(classifier, tmp_path):
    def identity(**changes):
        save(tmp_path / "x.pt", build("test_byobnet", 2, changes.get("size", 32), changes.get("seed", 3)),
             "test_byobnet", ["A", "B"])
        return load_classifier(tmp_path / "x.pt").identity

    assert identity() == load_classifier(classifier).identity
    assert len({identity(), identity(seed=4), identity(size=24)}) == 3


def test_files_that_are_no_classifier(classifier, tmp_path):
    state = torch.load(classifier, weights_only=True)
    torch.save({**state, "kind": "other"}, tmp_path / "other.pt")
    torch.save({**state, "backbone": "test_resnet"}, tmp_path / "weights.pt")
    torch.save({**state, "model": Namespace(a=1)}, tmp_path / "unsafe.pt")
    torch.save({**state, "format_version": 99}, tmp_path / "future.pt")
    (tmp_path / "damaged.pt").write_bytes(classifier.read_bytes()[:-500])
    for name, part in (("nowhere", "no such file"), ("other", "not a classifier"), ("weights", "weights are not"),
                       ("unsafe", "safely"), ("future", "format 99"), ("damaged", "safely")):
        with pytest.raises(UserError, match=part) as error:
            load_classifier(tmp_path / f"{name}.pt")
        assert "\n" not in str(error.value) and f"{name}.pt" in str(error.value)


def test_published_weights_come_from_a_file(data, tmp_path):
    """A file of timm's layout, 1000 classes: everything but the last layer is taken from it."""
    import timm

    source = timm.create_model("test_byobnet")
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    made = build("test_byobnet", 3, 32, pretrained=True, file=tmp_path / "weights.pt").backbone
    other = [k for k, v in made.state_dict().items() if not torch.equal(v, source.state_dict()[k])]
    assert made.num_classes == 3 and {k.rpartition(".")[0] for k in other} == {made.pretrained_cfg["classifier"]}
    assert all(p.requires_grad for p in made.parameters())
    again = build("test_byobnet", 3, 32, pretrained=True, file=tmp_path / "weights.pt").backbone
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in made.state_dict().items())


def labelled(*eyes):
    """Four images of one label, which the first two have."""
    labels, names = np.array([[1], [1], [0], [0]], np.float32), tuple("abcd")
    return LabelledImages(names, labels, ("A",), names, ("p", "p", "p", "q"), tuple(eyes) or None)


def test_eyes_are_scored_where_they_are_known():
    """By hand. Images: 0.9 and 0.3 have the label, 0.6 and 0.1 do not. Eyes: 0.9 has it (0.3 is the same eye's)."""
    scores = np.array([[0.9], [0.3], [0.6], [0.1]], np.float32)
    known, unknown = labelled("x", "x", "y", "z"), labelled()
    results = {}
    for name, validation, test in (("both", known, known), ("validation", known, unknown), ("test", unknown, known)):
        fold = Fold(0, ("A",), test, validation, test, 4, [], [], {}, [], [])
        result, arrays = fold_result(fold, scores, scores, {}, 0)
        results[name] = result["levels"] | {"arrays": arrays}
    image, eye = results["both"]["image"]["0.5"], results["both"]["eye"]["0.5"]
    assert (image["macro"]["sen"], image["macro"]["spe"], image["macro"]["ap"]) == pytest.approx((1 / 2, 1 / 2, 5 / 6))
    assert (eye["macro"]["sen"], eye["macro"]["spe"], eye["macro"]["ap"]) == (1, 1 / 2, 1)
    assert eye["labels"]["A"]["positives"] == 1 and eye["labels"]["A"]["negatives"] == 2
    assert results["both"]["eye"]["validation"]["thresholds"]["A"] == pytest.approx(0.75)
    assert results["both"]["eye"]["validation"]["macro"]["spe"] == 1
    saved = saved_at_level("eye", results["both"]["arrays"])
    assert saved.patients == ["p", "p", "q"] and saved.scores == pytest.approx(np.array([[0.9], [0.6], [0.1]]))
    assert results["validation"]["eye"] is None and saved_at_level("eye", results["validation"]["arrays"]) is None
    assert list(results["test"]["eye"]) == ["0.5"] and list(results["test"]["image"]) == ["0.5", "validation"]
    assert np.isnan(results["test"]["arrays"]["eye_thresholds"]).all()


def test_a_level_that_some_fold_lacks_has_no_mean():
    levels = {"image": {"0.5": {"macro": dict.fromkeys(("sen", "spe", "auc", "f1", "f1_sen_spe"), 0.5) | {"ap": None}}},
              "eye": None}
    found = summary([{"levels": levels}])
    assert found["eye"] is None and found["image"]["0.5"]["ap"] == {"mean": None, "std": None, "folds": 0}
    assert found["image"]["0.5"]["sen"] == {"mean": 0.5, "std": None, "folds": 1}
