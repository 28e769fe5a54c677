"""The scripts end to end, as a user runs them: alone, under torchrun and under accelerate; stopped and continued."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import run_script, succeeded
from PIL import Image

from pipeline import latents
from pipeline.data import read_split

SIZE = ("--image-size", 32)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    succeeded(run_script("prepare_data.py", "--source", "phantom", "--count", 40, "--image-size", 32,
                         "--folds", 2, "--output", folder / "data"))
    return folder


@pytest.fixture(scope="module")
def store(root, tiny_vae):
    """Extracted by one process and, into another folder, by two."""
    for name, processes, launcher in (("one", 1, "plain"), ("two", 2, "torchrun")):
        succeeded(run_script("extract_features.py", "--data-path", root / "data", "--features_path", root / name,
                             "--vae", tiny_vae, *SIZE, "--global-batch-size", 6, processes=processes,
                             launcher=launcher))
    return root


def train(store, tiny_vae, results, *more, **launch):
    return run_script(
        "train.py", "--model", "GeCA-XS", "--data-path", store / "data", "--feature-path", store / "one",
        "--vae", tiny_vae, "--features", tiny_vae, *SIZE, "--global_batch_size", 4, "--num-sampling-steps", 2,
        "--val_samples", 4, "--log-every", 1, "--lr", "1e-3", "--results-dir", store / results, *more, **launch)


@pytest.fixture(scope="module")
def trained(store, tiny_vae):
    """Two epochs without interruption."""
    succeeded(train(store, tiny_vae, "whole", "--epochs", 2, "--validate-every", 1))
    return store / "whole" / "000-GeCA-XS-0"


def losses(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [r["loss"] for r in records if "loss" in r]


def best(run):
    return run / "checkpoints" / "best_ckpt.pt"


def weights(run):
    return torch.load(run / "checkpoints" / "last_ckpt.pt", weights_only=True)


# ---- extraction


def test_extraction_is_the_same_on_one_and_two_processes(store, tiny_vae):
    one, two = (latents.load(store / name, 0) for name in ("one", "two"))
    assert len(list((store / "two" / "features_0").glob("shard-*"))) == 2
    assert one.manifest == two.manifest and torch.equal(one.labels, two.labels)
    torch.testing.assert_close(one.mean, two.mean, rtol=1e-4, atol=1e-4)
    split = read_split(store / "data", "train_0")
    assert len(one) == len(split) and np.array_equal(one.labels.numpy(), split.labels)


def test_the_second_variant_is_the_mirror_image(store, tiny_vae):
    from pipeline.data import load_images
    from pipeline.vae import VaeCodec

    cache, split = latents.load(store / "one", 0), read_split(store / "data", "train_0")
    images = torch.tensor(load_images(split.image_paths[:2], 32))
    mean, std = VaeCodec(tiny_vae).moments(images.flip(2))
    torch.testing.assert_close(cache.mean[:2, 1], mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cache.std[:2, 1], std, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(cache.mean[:2, 0], cache.mean[:2, 1])


def test_extracting_again_finds_the_cache_complete(store, tiny_vae):
    done = run_script("extract_features.py", "--data-path", store / "data", "--features-path", store / "one",
                      "--vae", tiny_vae, *SIZE)
    assert "complete already" in succeeded(done)


# ---- training


def test_a_run_leaves_what_it_promises(trained):
    checkpoint = weights(trained)
    steps = checkpoint["step"]
    assert checkpoint["epoch"] == 2 and len(losses(trained)) == steps
    assert best(trained).is_file() and "best KID" in (trained / "log.txt").read_text()
    assert sorted(p.name for p in (trained / "samples").iterdir()) == ["epoch-00001.png", "epoch-00002.png"]
    assert checkpoint["label_names"] == list(read_split(trained.parents[1] / "data", "val_0").label_names)
    assert any(p.name.startswith("events.out") for p in trained.iterdir())
    moved = [k for k, v in checkpoint["model"].items() if not torch.equal(v, checkpoint["ema"][k])]
    assert len(moved) == len(checkpoint["model"])  # the average is not the net, and every weight learns


def test_stopped_and_continued_is_as_if_never_stopped(store, trained, tiny_vae):
    succeeded(train(store, tiny_vae, "halves", "--epochs", 1, "--validate-every", 1))
    out = succeeded(train(store, tiny_vae, "halves", "--epochs", 2, "--validate-every", 1))
    halves = store / "halves" / "000-GeCA-XS-0"
    assert "continuing from step" in out and losses(halves) == losses(trained)
    a, b = weights(halves), weights(trained)
    for name in ("model", "ema"):
        assert all(torch.equal(a[name][key], b[name][key]) for key in b[name])


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_processes_train_as_one_does(store, trained, tiny_vae, launcher):
    succeeded(train(store, tiny_vae, launcher, "--epochs", 2, "--validate-every", 1, processes=2, launcher=launcher))
    run = store / launcher / "000-GeCA-XS-0"
    np.testing.assert_allclose(losses(run), losses(trained), rtol=1e-3)
    kids = [[json.loads(line).get("kid") for line in (r / "metrics.jsonl").read_text().splitlines()]
            for r in (run, trained)]
    np.testing.assert_allclose(*[[k for k in ks if k is not None] for ks in kids], rtol=0.05)


def test_other_ways_of_training(store, trained, tiny_vae):
    """Pixels instead of latents; several grids; normalised gradients, from the weights of another run."""
    succeeded(run_script("extract_features.py", "--data-path", store / "data", "--features-path", store / "pixels",
                         "--image_space", "--image-size", 8))
    common = ("--model", "GeCA-XS", "--data-path", store / "data", "--features", tiny_vae, "--num-sampling-steps", 2,
              "--val-samples", 2, "--epochs", 1, "--global-batch-size", 8, "--log-every", 1)
    succeeded(run_script("train.py", *common, "--feature-path", store / "pixels", "--image-space", "--image-size", 8,
                         "--results-dir", store / "image_space"))
    pixels = weights(store / "image_space" / "000-GeCA-XS-0")
    assert pixels["model_args"]["in_channels"] == 3 and pixels["model_args"]["input_size"] == 8
    out = succeeded(run_script(
        "train.py", *common, "--feature-path", store / "one", "--vae", tiny_vae, *SIZE, "--multi_scale", "--grad_norm",
        "--load_from", best(trained), "--results-dir", store / "scales"))
    assert "complete: epoch 1" in out


# ---- sampling


def sample(script, run, folder, *more, **launch):
    data = run.parents[1] / ("data" if script == "sample_ddp_val.py" else "one")
    return run_script(script, "--ckpt", best(run), "--data_path", data, "--num-sampling-steps", 3,
                      "--sample-dir", folder, *more, **launch)


def name_of(tiny_vae):
    return f"GeCA-XS-GS-fold-0-nstep-3-best_ckpt-size-32-vae-{tiny_vae.rpartition('/')[2]}-cfg-1.5-seed-0"


def pixels(folder):
    return {p.name: np.asarray(Image.open(p), int) for p in sorted(folder.glob("*.png"))}


def test_samples_do_not_depend_on_processes_or_batch_size(trained, tiny_vae, tmp_path):
    succeeded(sample("sample_ddp_val.py", trained, tmp_path / "a", "--per-proc-batch-size", 3))
    succeeded(sample("sample_ddp_val.py", trained, tmp_path / "b", "--per-proc-batch-size", 8, processes=2,
                     launcher="torchrun"))
    a, b = (tmp_path / x / name_of(tiny_vae) for x in "ab")
    assert (a / "val_syn_0.csv").read_text() == (b / "val_syn_0.csv").read_text()
    split = read_split(trained.parents[1] / "data", "val_0")
    made, again = pixels(a / "gen_samples_val"), pixels(b / "gen_samples_val")
    assert list(made) == list(again) == [f"{i:06d}.png" for i in range(len(split))]
    assert all(abs(made[k] - again[k]).max() <= 1 for k in made)
    listed = read_split(a, "val_syn_0")
    assert np.array_equal(listed.labels, split.labels) and listed.label_names == split.label_names
    assert np.array_equal(np.load(a / "val_syn_0.npy"), split.labels)


def test_expansion_repeats_the_training_labels_and_continues(trained, tiny_vae, tmp_path):
    out = succeeded(sample("sample_ddp.py", trained, tmp_path, "--expand_ratio", 2))
    folder = tmp_path / name_of(tiny_vae)
    labels = read_split(trained.parents[1] / "data", "train_0").labels
    listed = read_split(folder, "train_syn_0")
    assert np.array_equal(listed.labels, np.concatenate([labels, labels])) and f"{len(listed)} images" in out
    before = pixels(folder / "gen_samples")
    assert (before["000000.png"] != before[f"{len(labels):06d}.png"]).any()  # same labels, another image
    for name in ("000001.png", "000003.png"):
        (folder / "gen_samples" / name).unlink()
    succeeded(sample("sample_ddp.py", trained, tmp_path, "--expand-ratio", 2))
    after = pixels(folder / "gen_samples")
    assert list(after) == list(before) and all((after[k] == before[k]).all() for k in before)


# ---- mistakes: one line, exit code 2, nothing left behind


def refused(done, *words):
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and all(word in lines[0] for word in words), done.stderr


@pytest.fixture
def spoiled(root, tmp_path):
    return shutil.copytree(root / "data", tmp_path / "data")


def extract(data, out, tiny_vae, *more):
    return run_script("extract_features.py", "--data-path", data, "--features-path", out, "--vae", tiny_vae,
                      *SIZE, *more)


def test_wrong_number_of_labels(root, tiny_vae, tmp_path):
    refused(extract(root / "data", tmp_path / "out", tiny_vae, "--num-classes", 5), "--num-classes 5", "11 labels")
    assert not (tmp_path / "out").exists()


def test_damaged_and_missing_images(spoiled, tiny_vae, tmp_path):
    last = read_split(spoiled, "train_0").image_paths[-1]
    last.write_bytes(last.read_bytes()[:200])
    refused(extract(spoiled, tmp_path / "out", tiny_vae), last.name, "cannot be read")
    last.unlink()
    refused(extract(spoiled, tmp_path / "out", tiny_vae), last.name, "missing")
    assert not (tmp_path / "out").exists()


def test_empty_fold(store, spoiled, tiny_vae, tmp_path):
    header = (spoiled / "val_0.csv").read_text().splitlines()[0]
    (spoiled / "val_0.csv").write_text(header + "\n")
    done = run_script("train.py", "--data-path", spoiled, "--feature-path", store / "one", "--vae", tiny_vae, *SIZE,
                      "--results-dir", tmp_path / "results")
    refused(done, "val_0.csv", "holds no image")
    assert not (tmp_path / "results").exists()


def test_cache_of_another_autoencoder(store, tiny_vae, tmp_path):
    from train_vae import build

    build((4, 4, 8, 8)).save_pretrained(tmp_path / "vae")
    refused(train(store, str(tmp_path / "vae"), tmp_path / "results", "--epochs", 1), "features_0", "vae is")
    assert not (tmp_path / "results").exists()


def test_checkpoint_of_another_model(trained, tmp_path):
    refused(sample("sample_ddp_val.py", trained, tmp_path / "out", "--model", "GeCA-S"), "--model GeCA-S", "GeCA-XS")
    assert not (tmp_path / "out").exists()
