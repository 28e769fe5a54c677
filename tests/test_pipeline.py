"""The scripts end to end, as a user runs them: alone, under torchrun and under accelerate; stopped and continued.

What needs no process of its own runs in this one (`call_script`): starting Python and torch takes most of the time.
"""

import argparse
import json
import re
import shutil
import signal
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT, call_script, ctrl_c_at, refused, run_script, succeeded
from PIL import Image
from safetensors.torch import save_file
from test_checkpoint import Trap

import extract_features
from automaton import attention, engines
from core import runs
from dataset import latents
from dataset.images import load_images
from dataset.root import read_split
from dataset.vae import VaeCodec
from generation import checkpoint as checkpoints
from generation import output, sampling
from models import MODELS
from train_vae import build

SIZE = ("--image-size", 32)
RUN = "000-GeCA-XS-0"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    succeeded(call_script("prepare_data.py", "--source", "phantom", "--count", 40, "--image-size", 32,
                          "--folds", 2, "--output", folder / "data"))
    return folder


def extract(data, store, vae, *more, run=call_script, **launch):
    return run("extract_features.py", "--data-path", data, "--features_path", store, "--vae", vae, *SIZE,
               "--global-batch-size", 6, *more, **launch)


@pytest.fixture(scope="module")
def store(root, tiny_vae):
    """Extracted by one process and, into another folder, by two."""
    succeeded(extract(root / "data", root / "one", tiny_vae))
    succeeded(extract(root / "data", root / "two", tiny_vae, run=run_script, processes=2, launcher="torchrun"))
    return root


def train(store, vae, results, *more, run=call_script, data="data", cache="one", **launch):
    return run("train.py", "--model", "GeCA-XS", "--data-path", store / data, "--feature-path", store / cache,
               "--vae", vae, "--features", vae, *SIZE, "--global_batch_size", 4, "--num-sampling-steps", 2,
               "--val_samples", 4, "--log-every", 1, "--lr", "1e-3", "--results-dir", store / results, *more, **launch)


@pytest.fixture(scope="module")
def trained(store, tiny_vae):
    """Two epochs without interruption, by plain `python`."""
    succeeded(train(store, tiny_vae, "whole", "--epochs", 2, "--validate_every", 1, run=run_script))
    return store / "whole" / RUN


def metrics(run, name):
    """Step -> value of everything that metrics.jsonl holds under this name."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {r["step"]: r[name] for r in records if name in r}


def checkpoint(run, name="last"):
    return torch.load(run / "checkpoints" / f"{name}_ckpt.pt", weights_only=True)


# ---- extraction


def test_extraction_is_the_same_on_one_and_two_processes(store):
    one, two = (latents.load(store / name, 0) for name in ("one", "two"))
    assert len(list((store / "two" / "features_0").glob("shard-*"))) == 2
    assert one.manifest == two.manifest and torch.equal(one.labels, two.labels)
    torch.testing.assert_close(one.mean[:], two.mean[:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one.std[:], two.std[:], rtol=1e-4, atol=1e-4)
    split = read_split(store / "data", "train_0")
    assert len(one) == len(split) and np.array_equal(one.labels.numpy(), split.labels)


def test_the_cache_holds_each_image_and_then_its_mirror_image(store, tiny_vae):
    cache, split = latents.load(store / "one", 0), read_split(store / "data", "train_0")
    images = torch.tensor(load_images(split.paths[-2:], 32))
    for variant, pixels in enumerate((images, images.flip(2))):
        mean, std = VaeCodec(tiny_vae).moments(pixels)
        torch.testing.assert_close(cache.mean[-2:, variant], mean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(cache.std[-2:, variant], std, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(cache.mean[:, 0], cache.mean[:, 1])


def test_a_killed_extraction_goes_on_where_it_was(store, tiny_vae, tmp_path, monkeypatch):
    """Shards of two images; the second is lost. The result is that of an extraction that was never stopped."""
    monkeypatch.setattr(latents, "SHARD", 2)
    write, written = latents.write_shard, []

    def dies(path, first, *tensors):
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(first)
        write(path, first, *tensors)

    monkeypatch.setattr(latents, "write_shard", dies)
    out = tmp_path / "store"
    assert extract(store / "data", out, tiny_vae).returncode == 130
    assert sorted(path.name for path in out.iterdir()) == [".features_0.lock", ".features_0.tmp"]
    monkeypatch.setattr(latents, "write_shard", lambda *given: (written.append(given[1]), write(*given)))
    total = len(read_split(store / "data", "train_0"))
    assert f"continuing, 2 of {total} images are there" in succeeded(extract(store / "data", out, tiny_vae))
    assert written == list(range(0, total, 2))
    assert sorted(path.name for path in out.iterdir()) == [".features_0.lock", "features_0"]
    one, two = latents.load(store / "one", 0), latents.load(out, 0)
    assert one.manifest == two.manifest and torch.equal(one.labels, two.labels)
    torch.testing.assert_close(two.mean[:], one.mean[:], rtol=1e-4, atol=1e-4)


def test_extracting_again_finds_the_cache_complete(store, tiny_vae):
    (file,) = (store / "one" / "features_0").glob("shard-*")
    before = file.stat().st_mtime_ns
    assert "complete already" in succeeded(extract(store / "data", store / "one", tiny_vae, "--model", "LDM-B"))
    assert file.stat().st_mtime_ns == before


# ---- training


def test_a_run_leaves_what_it_promises(trained):
    last, best, kids = checkpoint(trained), checkpoint(trained, "best"), metrics(trained, "kid")
    images = len(read_split(trained.parents[1] / "data", "train_0"))
    per_epoch = images // 4
    assert (last["step"], last["epoch"]) == (2 * per_epoch, 2)
    assert list(metrics(trained, "loss")) == list(range(1, 2 * per_epoch + 1))
    assert np.isfinite(list(metrics(trained, "loss").values())).all()
    assert list(kids) == [per_epoch, 2 * per_epoch]
    assert (best["best_kid"], best["step"]) == min((kid, step) for step, kid in kids.items())
    assert last["best_kid"] == best["best_kid"]
    assert last["label_names"] == list(read_split(trained.parents[1] / "data", "val_0").label_names)
    log = (trained / "log.txt").read_text()
    for words in ("command: ", "2,255,720 parameters", f"{images} images", f"step {per_epoch}: loss",
                  f"step {per_epoch}: validation KID", "complete: epoch 2"):
        assert words in log
    grids = sorted((trained / "samples").iterdir())
    assert [p.name for p in grids] == ["epoch-00001.png", "epoch-00002.png"]
    assert all(np.asarray(Image.open(p)).std() > 10 for p in grids)
    assert any(p.name.startswith("events.out") for p in trained.iterdir())
    moved = [k for k, v in last["model"].items() if not torch.equal(v, last["ema"][k])]
    assert len(moved) == len(last["model"])  # the average is not the net, and every weight learns


class PowerCut(BaseException):
    """Nobody catches it."""


def test_stopped_and_continued_is_as_if_never_stopped(store, trained, tiny_vae, monkeypatch):
    """One epoch; the same command with more epochs, killed inside the second; the same command once more."""
    succeeded(train(store, tiny_vae, "halves", "--epochs", 1))
    steps = checkpoint(trained)["step"]
    log_metrics = runs.RunLog.metrics

    def power_cut(log, step, **values):
        log_metrics(log, step, **values)
        if step == steps - 1:
            raise PowerCut

    with monkeypatch.context() as patch:
        patch.setattr(runs.RunLog, "metrics", power_cut)
        with pytest.raises(PowerCut):
            train(store, tiny_vae, "halves", "--epochs", 2, "--ckpt-every", 2)
    halves = store / "halves" / RUN
    assert checkpoint(halves)["step"] == steps - 2
    assert f"continuing from step {steps - 2}" in succeeded(
        train(store, tiny_vae, "halves", "--epochs", 2, "--ckpt-every", 2))
    assert metrics(halves, "loss") == pytest.approx(metrics(trained, "loss"), rel=1e-6)
    a, b = checkpoint(halves), checkpoint(trained)
    assert a["step"] == b["step"] and [p.name for p in halves.parent.glob("0*")] == [RUN]
    for name in ("model", "ema"):
        for key in b[name]:
            torch.testing.assert_close(a[name][key], b[name][key], rtol=1e-5, atol=1e-7)


def test_an_interrupted_training_is_saved_and_continued(store, trained, tiny_vae):
    """Ctrl-C at step 3: it stops where the processes next ask each other, at step 5; the log is not written twice."""
    with ctrl_c_at(3):
        done = train(store, tiny_vae, "stopped", "--epochs", 2)
    run = store / "stopped" / RUN
    assert done.returncode == 130 and "stopped at step 5; the same command continues" in done.stdout
    assert checkpoint(run)["step"] == 5 and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "loss": 9.0}\n')  # as if it had been killed after a further step
    assert "continuing from step 5" in succeeded(train(store, tiny_vae, "stopped", "--epochs", 2))
    assert metrics(run, "loss") == pytest.approx(metrics(trained, "loss"), rel=1e-6)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == len(metrics(run, "loss")) + 1


def test_patients_on_both_sides_are_named(store, tiny_vae):
    shutil.copytree(store / "data", store / "leaky")
    val, train_0 = ((store / "leaky" / f"{name}_0.csv").read_text().splitlines() for name in ("val", "train"))
    *_, patient, eye = train_0[1].split(",")
    val[1] = ",".join([*val[1].split(",")[:-2], patient, eye])
    (store / "leaky" / "val_0.csv").write_text("\n".join(val))
    out = succeeded(train(store, tiny_vae, "leaks", "--epochs", 1, data="leaky"))
    assert re.search(rf"warning: LEAK: .*train_0.csv and val_0.csv: 1 patient\(s\) in both, the first is {patient}",
                     out)


def test_another_setting_is_another_run_and_a_finished_one_stays(store, trained, tiny_vae):
    before = (trained / "checkpoints" / "last_ckpt.pt").stat().st_mtime_ns
    out = succeeded(train(store, tiny_vae, "whole", "--epochs", 1))  # of which two are done
    assert "continuing from step" in out and (trained / "checkpoints" / "last_ckpt.pt").stat().st_mtime_ns == before
    succeeded(train(store, tiny_vae, "whole", "--epochs", 1, "--lr", "2e-3"))
    assert sorted(p.name for p in trained.parent.glob("0*")) == [RUN, f"001{RUN[3:]}"]


@pytest.mark.parametrize("launcher, more", [("accelerate", ()), ("torchrun", ("--multi_scale",))])
def test_two_processes_train_as_one_does(store, trained, tiny_vae, launcher, more):
    more = ("--epochs", 2, "--validate_every", 1, *more)
    succeeded(train(store, tiny_vae, launcher, *more, run=run_script, processes=2, launcher=launcher))
    two, one = store / launcher / RUN, trained
    if "--multi_scale" in more:
        succeeded(train(store, tiny_vae, "alone", *more))
        one = store / "alone" / RUN
    assert "2 process(es)" in (two / "log.txt").read_text() and "1 process(es)" in (one / "log.txt").read_text()
    assert metrics(two, "loss") == pytest.approx(metrics(one, "loss"), rel=1e-4)
    assert metrics(two, "kid") == pytest.approx(metrics(one, "kid"), rel=0.05)


def test_training_in_image_space(store, tiny_vae):
    succeeded(extract(store / "data", store / "pixels", tiny_vae, "--image_space", "--image-size", 8))
    succeeded(train(store, tiny_vae, "image_space", "--epochs", 1, "--image-space", "--image-size", 8, cache="pixels"))
    model = checkpoint(store / "image_space" / RUN)["model_args"]
    assert (model["in_channels"], model["input_size"]) == (3, 8)


def test_the_position_code_is_part_of_the_net(store, trained, tiny_vae, tmp_path):
    """A file of the published code does not name it, as before; ours is in the checkpoint and not mixed with the other.
    """
    assert "position_code" not in checkpoint(trained)["model_args"]
    succeeded(train(store, tiny_vae, "2d", "--epochs", 1, "--position-code", "2d"))
    file = store / "2d" / RUN / "checkpoints" / "last_ckpt.pt"
    net = checkpoints.build(checkpoints.load(file))
    assert net.position_code == "2d" and checkpoint(store / "2d" / RUN)["model_args"]["position_code"] == "2d"
    refused(train(store, tiny_vae, "no", "--load-from", file), "--load-from", "was trained with --position-code 2d")
    refused(train(store, tiny_vae, "no", "--position-code", "2d", "--load-from", trained / "checkpoints" /
                  "last_ckpt.pt"), "was trained with --position-code published")


def test_another_run_gives_the_start_values_and_gradients_can_be_normalised(store, trained, tiny_vae, monkeypatch):
    """At learning rate 0 the net stays what --load_from gave it; --grad_norm brings every gradient to norm 1."""
    norms, step = [], torch.optim.AdamW.step

    def spy(optimiser, *arguments):
        norms.extend(p.grad.norm().item() for group in optimiser.param_groups for p in group["params"])
        return step(optimiser, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    succeeded(train(store, tiny_vae, "again", "--epochs", 1, "--lr", 0, "--grad_norm", "--load_from",
                    trained / "checkpoints" / "best_ckpt.pt"))
    source, again = checkpoint(trained, "best")["ema"], checkpoint(store / "again" / RUN)
    assert all(torch.equal(again[name][key], source[key]) for name in ("model", "ema") for key in source)
    assert len(norms) == len(source) * again["step"] and norms == pytest.approx([1] * len(norms), rel=0.01)


def test_a_run_on_other_labels_gives_all_but_the_label_table(store, trained, tiny_vae, tmp_path):
    source = checkpoint(trained, "best")
    source["label_names"][0] = "ZZZ"
    torch.save(source, tmp_path / "other.pt")
    out = succeeded(train(store, tiny_vae, "labels", "--epochs", 1, "--lr", 0, "--load_from", tmp_path / "other.pt"))
    again = checkpoint(store / "labels" / RUN)["model"]
    changed = [key for key in again if not torch.equal(again[key], source["ema"][key])]
    assert changed == ["y_embedder.embedding_table.0.weight"] and "label table starts anew" in out


# ---- sampling


def sample(script, run, folder, *more, way=call_script, **launch):
    data = run.parents[1] / ("data" if script == "sample_ddp_val.py" else "one")
    return way(script, "--ckpt", run / "checkpoints" / "best_ckpt.pt", "--data_path", data, "--num-sampling-steps", 3,
               "--sample-dir", folder, *more, **launch)


NAME = "GeCA-XS-GS-fold-0-nstep-3-best_ckpt-size-32-vae-vae-cfg-1.5-seed-0"  # as published


def pictures(folder):
    return {p.name: np.asarray(Image.open(p), int) for p in sorted(folder.glob("*.png"))}


class Still(torch.nn.Module):
    """Predicts nothing and remembers nothing: what comes out is noise. Notes a draw of each generator it is given."""

    in_channels = 2

    def __init__(self):
        super().__init__()
        self.drawn = []

    def forward(self, x, t, y, state=None, generator=None):
        self.drawn.append(tuple(torch.rand((), generator=g).item() for g in generator))
        return torch.zeros(len(x), 4, *x.shape[2:]), None


def test_every_draw_of_an_image_is_a_function_of_seed_and_number():
    def latents_of(ids, seed=0, shared=False):
        model = Still()
        options = sampling.SamplingOptions(steps=3, seed=seed, shared_fire=shared)
        return sampling.sample_latents(model, torch.ones(len(ids), 5), ids, 4, options, "cpu"), model.drawn

    (pair, drawn), (alone, drawn_alone) = latents_of([5, 9]), latents_of([9])
    assert torch.equal(alone[0], pair[1]) and [(d[1], d[3]) for d in drawn] == drawn_alone
    assert not torch.isclose(pair[0], pair[1]).any() and not torch.isclose(alone, latents_of([9], seed=1)[0]).any()
    assert len(set(sum(drawn, ()))) == 3 * 4  # three steps, two images, conditional and unconditional: never the same
    shared, drawn_shared = latents_of([5, 9], shared=True)
    assert torch.equal(shared, pair)  # this model uses none of its draws
    assert all(d[:2] == d[2:] for d in drawn_shared) and [d[:2] for d in drawn_shared] == [d[:2] for d in drawn]


def test_samples_do_not_depend_on_processes_or_batch_size(trained, tmp_path):
    succeeded(sample("sample_ddp_val.py", trained, tmp_path / "a", "--per-proc-batch-size", 3))
    succeeded(sample("sample_ddp_val.py", trained, tmp_path / "b", "--per_proc_batch_size", 8, way=run_script,
                     processes=2, launcher="torchrun"))
    a, b = (tmp_path / x / NAME for x in "ab")
    assert (a / "val_syn_0.csv").read_text() == (b / "val_syn_0.csv").read_text()
    split = read_split(trained.parents[1] / "data", "val_0")
    made, again = pictures(a / "gen_samples_val"), pictures(b / "gen_samples_val")
    assert list(made) == list(again) == [f"{i:06d}.png" for i in range(len(split))]
    assert all(abs(made[k] - again[k]).max() <= 1 for k in made)
    assert len({image.tobytes() for image in made.values()}) == len(split)  # no two are alike
    listed = read_split(a, "val_syn_0")
    assert np.array_equal(listed.labels, split.labels) and listed.label_names == split.label_names
    assert np.array_equal(np.load(a / "val_syn_0.npy"), split.labels)


def test_a_checkpoint_of_the_published_layout_gives_the_same_images(trained, tiny_vae, tmp_path):
    """Weights from inside DistributedDataParallel, flags as a Namespace; and bare weights, which say nothing."""
    ours = checkpoint(trained, "best")
    succeeded(sample("sample_ddp_val.py", trained, tmp_path / "ours"))
    expected = pictures(tmp_path / "ours" / NAME / "gen_samples_val")
    theirs = {kind: {f"module.{k}": v for k, v in ours[kind].items()} for kind in ("model", "ema")}
    flags = argparse.Namespace(model="GeCA-XS", image_size=32, vae=tiny_vae, image_space=False, multi_scale=False)
    (tmp_path / "p").mkdir()
    torch.save({**theirs, "opt": {}, "args": flags}, tmp_path / "p" / "best_ckpt.pt")
    save_file(ours["ema"], tmp_path / "p" / "best_ckpt.safetensors")
    for name, more in (("best_ckpt.pt", ()), ("best_ckpt.safetensors", (*SIZE, "--vae", tiny_vae))):
        out = succeeded(sample("sample_ddp_val.py", trained, tmp_path / name, "--ckpt", tmp_path / "p" / name, *more))
        assert ("does not say all" in out) == (name == "best_ckpt.safetensors")
        (made,) = (tmp_path / name).glob("*/gen_samples_val")
        again = pictures(made)
        assert again.keys() == expected.keys() and all((image == again[k]).all() for k, image in expected.items())
        assert made.parent.name == NAME.replace("vae-vae", f"vae-{Path(tiny_vae).name}")  # the published name
    refused(sample("sample_ddp.py", trained, tmp_path / "n", "--ckpt", tmp_path / "p" / "best_ckpt.pt", "--vae", "ema"),
            "--vae ema")


def test_weights_that_say_nothing_must_fit_what_they_are_run_with(trained, tiny_vae, tmp_path):
    """Another autoencoder under the same folder name, a model with other channels, a grid that is not the model's."""
    save_file(checkpoint(trained, "best")["ema"], tmp_path / "best_ckpt.safetensors")
    (tmp_path / "other").mkdir()
    other_vae(tmp_path / "other" / "vae")
    flags = ("--ckpt", tmp_path / "best_ckpt.safetensors", *SIZE)
    succeeded(sample("sample_ddp_val.py", trained, tmp_path / "out", *flags, "--vae", tiny_vae))
    refused(sample("sample_ddp_val.py", trained, tmp_path / "out", *flags, "--vae", tmp_path / "other" / "vae"),
            "other settings (vae vae:")
    for name, sizes, words in (("GeCA-XS", {"in_channels": 3}, ("has 4 channels", "trained on 3")),
                               ("DiT-S/4", {"input_size": 8}, ("4 cells per side", "give --image-size 64"))):
        torch.save(MODELS[name](**sizes).state_dict(), tmp_path / "bare.pt")
        refused(sample("sample_ddp_val.py", trained, tmp_path / "no", "--ckpt", tmp_path / "bare.pt", *SIZE, "--vae",
                       tiny_vae), *words)
    assert not (tmp_path / "no").exists()


def test_half_precision_samples_nearly_the_same_images(trained, tmp_path):
    succeeded(sample("sample_ddp_val.py", trained, tmp_path / "fp32"))
    succeeded(sample("sample_ddp_val.py", trained, tmp_path / "bf16", "--precision", "bf16"))
    exact, half = (pictures(tmp_path / name / NAME / "gen_samples_val") for name in ("fp32", "bf16"))
    differences = np.concatenate([abs(exact[k] - half[k]).ravel() for k in exact])
    assert 0 < differences.mean() < 1 and exact.keys() == half.keys()
    refused(sample("sample_ddp_val.py", trained, tmp_path / "fp32", "--precision", "bf16"), "precision fp32 (now bf16)")
    if not torch.cuda.is_available():
        refused(sample("sample_ddp_val.py", trained, tmp_path / "no", "--precision", "fp16"), "needs a GPU")


@pytest.fixture
def compiled(monkeypatch):
    """Names of what torch.compile gets; it captures but makes no code, for which not every machine has a compiler."""
    names, compile_function = [], torch.compile

    def capture(function, **options):
        names.append(function.__name__)
        return compile_function(function, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", capture)
    for kept in (engines._fused, attention._fused):
        kept.cache_clear()
    yield names
    for kept in (engines._fused, attention._fused):
        kept.cache_clear()


def test_a_compiled_denoiser_makes_the_same_images(trained, tmp_path, compiled):
    succeeded(sample("sample_ddp_val.py", trained, tmp_path / "a"))
    assert not compiled
    succeeded(sample("sample_ddp_val.py", trained, tmp_path / "b", "--compile"))
    a, b = (pictures(tmp_path / name / NAME / "gen_samples_val") for name in "ab")
    assert {"_first_cache", "_renew_", "_ask", "_answer_", "_forward_by_gathers"} <= {*compiled}
    assert a.keys() == b.keys() and all(abs(a[k] - b[k]).max() <= 1 for k in a)


@pytest.mark.parametrize(("model", "parts"), [("GeCA-XS", {"_forward_by_gathers", "_backward_by_gathers"}),
                                              ("DiT-S/2", {"forward"})])
def test_a_compiled_training_learns_the_same(store, tiny_vae, compiled, model, parts):
    """And its weights have the same names."""
    losses, names = {}, {}
    for flag in ("--no-compile", "--compile"):
        results = f"compiled-{model[:3]}{flag}"
        succeeded(train(store, tiny_vae, results, "--model", model, "--epochs", 2, flag))
        run = store / results / f"000-{model.replace('/', '-')}-0"
        losses[flag], names[flag] = metrics(run, "loss"), checkpoint(run)["model"].keys()
    assert {*compiled} == parts and names["--compile"] == names["--no-compile"]
    assert losses["--compile"] == pytest.approx(losses["--no-compile"], rel=1e-4)


@pytest.mark.parametrize("model, same", [("DiT-S", "DiT-S/2"), ("LDM-B", "LDM-B")])
def test_baselines_train_and_sample_by_the_same_commands(store, tiny_vae, tmp_path, model, same):
    succeeded(train(store, tiny_vae, model, "--model", model, "--epochs", 1, "--grad-norm", "--val_samples", 2))
    (run,) = (store / model).glob("0*")
    assert run.name == f"000-{model}-0" and np.isfinite(list(metrics(run, "loss").values())).all()
    succeeded(sample("sample_ddp_val.py", run, tmp_path, "--model", same, "--sampler", "dpmpp"))
    assert (tmp_path / f"{NAME.replace('GeCA-XS', model)}-dpmpp").is_dir()
    refused(train(store, tiny_vae, "no", "--model", model, "--multi_scale"), "--multi-scale", model)
    refused(train(store, tiny_vae, "no", "--model", model, "--position-code", "2d"), "--position-code 2d", model)
    assert not (store / "no").exists()


def test_dit_tiles_only_some_grids(store, tiny_vae):
    refused(train(store, tiny_vae, "no", "--model", "DiT-S/8"), "--model DiT-S/8", "multiple of the patch size 8")


@pytest.mark.parametrize("name", ["DiT-S/4", "LDM-B"])
def test_baselines_may_recompute_their_blocks(name):
    """The same gradients from fewer kept tensors."""
    torch.manual_seed(0)
    model, kept, grads = MODELS[name](input_size=4, num_classes=2), [], []
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    for model.checkpoint_steps in (False, True):
        kept.append(0)

        def count(tensor):
            kept[-1] += tensor.numel()
            return tensor

        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            out, _ = model(torch.ones(1, 4, 4, 4), torch.tensor([7]), torch.ones(1, 2))
        out.square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert kept[1] < 0.9 * kept[0]
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*grads, strict=True))


def test_samplers_are_chosen_by_name_and_do_not_share_a_folder(trained, tmp_path):
    for more, end in ((("--sampler", "ddim", "--eta", 0.5), "-ddim-eta-0.5"), (("--cfg-interval", 100, 900), "")):
        succeeded(sample("sample_ddp_val.py", trained, tmp_path, *more))
        assert (tmp_path / f"{NAME}{end}").is_dir()
    refused(sample("sample_ddp_val.py", trained, tmp_path), "cfg_interval [100, 900] (now None)")
    refused(sample("sample_ddp_val.py", trained, tmp_path, "--eta", 1), "--eta 1.0: belongs to --sampler ddim")
    refused(sample("sample_ddp_val.py", trained, tmp_path, "--cfg-interval", 9, 3), "LOW not above HIGH")
    refused(sample("sample_ddp_val.py", trained, tmp_path, "--cfg-interval", 3, 9, "--cfg-scale", 1), "--cfg-scale")


@pytest.fixture(scope="module")
def expanded(trained, tmp_path_factory):
    """Two images for the labels of each training image."""
    folder = tmp_path_factory.mktemp("expanded")
    succeeded(sample("sample_ddp.py", trained, folder, "--expand_ratio", 2, "--model", "GeCA-XS", "--num_classes", 11))
    return folder


def test_the_expansion_repeats_the_training_labels(trained, expanded):
    labels = read_split(trained.parents[1] / "data", "train_0").labels
    listed = read_split(expanded / NAME, "train_syn_0")
    assert np.array_equal(listed.labels, np.concatenate([labels, labels]))
    made = pictures(expanded / NAME / "gen_samples")
    assert (made["000000.png"] != made[f"{len(labels):06d}.png"]).any()  # the same labels, another image


def test_a_stopped_sampler_makes_what_is_missing_and_keeps_the_rest(trained, expanded):
    folder = expanded / NAME / "gen_samples"
    before, lost = pictures(folder), ("000001.png", "000003.png")
    written = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    for name in lost:
        (folder / name).unlink()
    succeeded(sample("sample_ddp.py", trained, expanded, "--expand-ratio", 2))
    assert {p.name for p in folder.iterdir() if p.stat().st_mtime_ns != written[p.name]} == set(lost)
    after = pictures(folder)
    assert list(after) == list(before) and all(abs(after[k] - before[k]).max() <= 1 for k in before)


def test_a_sampler_that_is_asked_to_stop_ends_after_its_batch(trained, expanded, tmp_path, monkeypatch):
    """SIGTERM in the first batch of two; the same command goes on, and the images are those of one go."""
    write, written = output.write_image, []

    def asked(path, picture):
        if not written:
            signal.raise_signal(signal.SIGTERM)
        written.append(path.name)
        write(path, picture)

    class Now:  # signals reach the main thread alone
        def __init__(self, *_):
            pass

        __enter__, __exit__ = lambda self: self, lambda self, *_: None

        def submit(self, call, *arguments):
            call(*arguments)
            return mock.Mock()

    with monkeypatch.context() as patch:
        patch.setattr(output, "write_image", asked)
        patch.setattr(output, "ThreadPoolExecutor", Now)
        done = sample("sample_ddp.py", trained, tmp_path, "--per-proc-batch-size", 2)
    assert done.returncode == 75 and "stopped after a batch; the same command continues" in done.stdout
    assert written == ["000000.png", "000001.png"] and not (tmp_path / NAME / "train_syn_0.csv").exists()
    succeeded(sample("sample_ddp.py", trained, tmp_path, "--per-proc-batch-size", 2))
    made, whole = pictures(tmp_path / NAME / "gen_samples"), pictures(expanded / NAME / "gen_samples")
    assert len(made) > 2 and all(abs(made[name] - whole[name]).max() <= 1 for name in made)


def test_an_extraction_that_is_asked_to_stop_keeps_what_it_has(store, tiny_vae, tmp_path, monkeypatch):
    moments, seen = extract_features.moments, []

    def asked(*arguments):
        seen.append(1)
        if len(seen) == 3:
            signal.raise_signal(signal.SIGUSR1)
        return moments(*arguments)

    monkeypatch.setattr(extract_features, "moments", asked)
    with pytest.raises(SystemExit) as stop:
        call_main(extract_features, "--data-path", store / "data", "--features-path", tmp_path, "--fold", 0, *SIZE,
                  "--vae", tiny_vae, "--global-batch-size", 2)
    assert stop.value.code == 75
    total = len(read_split(store / "data", "train_0"))
    assert f"continuing, 6 of {total} images are there" in succeeded(extract(store / "data", tmp_path, tiny_vae))
    torch.testing.assert_close(latents.load(tmp_path, 0).mean[:], latents.load(store / "one", 0).mean[:], rtol=1e-4,
                               atol=1e-4)


def call_main(module, *arguments):
    with mock.patch.object(sys, "argv", [module.__name__, *map(str, arguments)]):
        module.main()


def test_samples_of_a_model_that_diverged_are_not_written(trained, tmp_path):
    """Its weights are finite, what they make is not."""
    content = checkpoint(trained, "best")
    content["ema"] = {key: value * 1e30 for key, value in content["ema"].items()}
    (tmp_path / "checkpoints").mkdir()
    torch.save(content, tmp_path / "checkpoints" / "best_ckpt.pt")
    done = call_script("sample_ddp.py", "--ckpt", tmp_path / "checkpoints" / "best_ckpt.pt", "--labels", "null",
                       "--count", 1, "--num-sampling-steps", 3, "--sample-dir", tmp_path / "out")
    assert done.returncode == 2
    assert "error: the samples are not finite: nothing is written;" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.glob("out/*/*/*.png"))


def test_weights_that_diverge_replace_no_checkpoint(store, tiny_vae):
    """--ckpt-every is more often than --log-every, where the loss is looked at."""
    done = train(store, tiny_vae, "diverges", "--epochs", 2, "--lr", "1e30", "--log-every", 1000, "--ckpt-every", 1)
    assert done.returncode == 2
    assert re.search(r"error: the weights are not finite at step 2; the last checkpoint stays; lower --lr",
                     done.stderr.splitlines()[-1])
    assert checkpoint(store / "diverges" / RUN)["step"] == 1


# ---- mistakes: one line, exit code 2, nothing left behind


@pytest.fixture
def spoiled(root, tmp_path):
    """A copy of the data root, to be damaged."""
    return shutil.copytree(root / "data", tmp_path / "data")


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])


def make_jpeg(file):
    Image.open(file).save(file, format="JPEG", quality=95)


def keep_header(table):
    table.write_text(table.read_text().splitlines()[0] + "\n")


@pytest.mark.parametrize("spoil, words", [
    (lambda image, table: image.unlink(), ("train_0.csv", "1 missing file")),
    (lambda image, table: cut(image), ("cannot be read as an image",)),
    (lambda image, table: (make_jpeg(image), cut(image)), ("cannot be read as an image", "truncated")),
    (lambda image, table: table.unlink(), ("train_0.csv", "no such file", "train_1.csv")),
    (lambda image, table: keep_header(table), ("train_0.csv", "holds no image")),
], ids=["missing image", "half a PNG", "half a JPEG", "no CSV", "empty CSV"])
def test_extraction_refuses_a_spoiled_root(spoiled, tiny_vae, tmp_path, spoil, words):
    spoil(read_split(spoiled, "train_0").paths[-1], spoiled / "train_0.csv")
    refused(extract(spoiled, tmp_path / "out", tiny_vae), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("more, words", [
    (("--num_classes", 5), ("--num-classes 5", "11 labels")),
    (("--image-size", 36), ("--image-size 36", "multiple of 8")),
    (("--vae", "nowhere"), ("--vae nowhere", "no such folder")),
])
def test_extraction_refuses_wrong_flags(root, tiny_vae, tmp_path, more, words):
    refused(extract(root / "data", tmp_path / "out", tiny_vae, *more), *words)
    assert not (tmp_path / "out").exists()


def test_extraction_leaves_other_features_alone(store, spoiled, tiny_vae):
    table = spoiled / "train_0.csv"
    table.write_text("\n".join(table.read_text().splitlines()[:-1]) + "\n")
    refused(extract(spoiled, store / "one", tiny_vae), "holds other features", "csv_sha256")
    assert len(latents.load(store / "one", 0)) == len(read_split(store / "data", "train_0"))


def test_a_file_in_place_of_a_folder(store, trained, tiny_vae, tmp_path):
    (tmp_path / "file").touch()
    refused(extract(store / "data", tmp_path / "file", tiny_vae), "--features-path", "File exists")
    refused(train(store, tiny_vae, tmp_path / "file", "--epochs", 1), "--results-dir", "file")
    refused(sample("sample_ddp_val.py", trained, tmp_path / "file"), "Not a directory", "file")


def test_one_line_is_all_that_a_process_prints(root, tiny_vae, tmp_path):
    """Not in this process, whose warnings pytest collects."""
    refused(train(root, tiny_vae, tmp_path / "out", "--epochs", 1, "--fold", 1, cache="nowhere", run=run_script),
            "--fold 1", "no features at all", "extract_features.py --fold 1")
    assert not (tmp_path / "out").exists()


def other_vae(folder):
    build((4, 4, 8, 8)).save_pretrained(folder)
    return str(folder)


def test_training_refuses_wrong_flags_and_caches(store, trained, tiny_vae, tmp_path):
    best = trained / "checkpoints" / "best_ckpt.pt"
    shutil.copy(best, tmp_path / "half.pt")
    cut(tmp_path / "half.pt")
    torch.save({**checkpoint(trained, "best"), "codec": "other:1234"}, tmp_path / "codec.pt")
    shutil.copytree(store / "one", tmp_path / "cut")
    cut(next((tmp_path / "cut" / "features_0").glob("shard-*")))
    cases = [
        (("--num-classes", 5), ("--num-classes 5", "11 labels")),
        (("--fold", 7), ("val_7.csv", "no such file")),
        (("--fold", 1), ("--fold 1", "features_0")),
        (("--vae", other_vae(tmp_path / "vae")), ("features_0", "vae is", "extract again")),
        (("--image-size", 64), ("shape (4, 4, 4)", "expected (4, 8, 8)")),
        (("--in_channels", 3), ("--in-channels 3", "has 4")),
        (("--load_from", tmp_path / "half.pt"), ("--load-from", "half.pt", "loaded safely")),
        (("--load-from", best, "--model", "GeCA-S"), ("--load-from", "holds a GeCA-XS")),
        (("--load-from", tmp_path / "codec.pt"), ("--load-from", "latents of other:1234")),
        (("--feature-path", tmp_path / "cut"), ("shard-00000", "damaged")),
    ]
    for more, words in cases:
        refused(train(store, tiny_vae, tmp_path / "results", "--epochs", 1, *more), *words)
    assert not (tmp_path / "results").exists()


def rename_label(table):
    table.write_text(table.read_text().replace(",NOR,", ",ZZZ,", 1))


@pytest.mark.parametrize("spoil, words", [
    (lambda root: keep_header(root / "val_0.csv"), ("val_0.csv", "holds no image")),
    (lambda root: rename_label(root / "val_0.csv"), ("val_0.csv", "ZZZ", "expected those of train_0.csv")),
    (lambda root: shutil.copy(root / "train_1.csv", root / "train_0.csv"), ("features_0",)),
], ids=["no validation image", "other labels", "another fold's images"])
def test_training_refuses_a_root_that_is_not_the_caches(store, spoiled, tiny_vae, tmp_path, spoil, words):
    spoil(spoiled)
    refused(train(store, tiny_vae, tmp_path / "results", "--epochs", 1, data=spoiled), *words)
    assert not (tmp_path / "results").exists()


def test_a_damaged_last_checkpoint_is_not_trained_over(store, trained, tiny_vae, tmp_path):
    shutil.copytree(trained.parent, tmp_path / "results")
    last = tmp_path / "results" / RUN / "checkpoints" / "last_ckpt.pt"
    cut(last)
    size = last.stat().st_size
    refused(train(store, tiny_vae, tmp_path / "results", "--epochs", 3), "last_ckpt.pt", "loaded safely")
    assert last.stat().st_size == size


@pytest.mark.parametrize("lacks", ["opt", "step", "minutes", "model"])
def test_a_last_checkpoint_without_its_training_is_not_trained_over(store, trained, tiny_vae, tmp_path, lacks):
    """As one that was made of bare weights."""
    shutil.copytree(trained.parent, tmp_path / "results")
    last = tmp_path / "results" / RUN / "checkpoints" / "last_ckpt.pt"
    torch.save({key: value for key, value in torch.load(last, weights_only=True).items() if key != lacks}, last)
    refused(train(store, tiny_vae, tmp_path / "results", "--epochs", 3), "last_ckpt.pt: damaged (", "train anew")


def test_samplers_refuse_other_checkpoints(trained, tmp_path):
    best = trained / "checkpoints" / "best_ckpt.pt"
    shutil.copy(best, tmp_path / "half.pt")
    cut(tmp_path / "half.pt")
    torch.save({"ema": Trap(str(tmp_path / "ran"))}, tmp_path / "trap.pt")
    torch.save({"model": {}, "ema": {}}, tmp_path / "foreign.pt")
    cases = [
        (("--model", "GeCA-S"), ("--model GeCA-S", "--model GeCA-XS")),
        (("--num_classes", 5), ("--num-classes 5", "--num-classes 11")),
        (("--image-size", 64), ("--image-size 64", "--image-size 32")),
        (("--ckpt", tmp_path / "nowhere.pt"), ("nowhere.pt", "no such file")),
        (("--ckpt", tmp_path / "half.pt"), ("half.pt", "loaded safely")),
        (("--ckpt", tmp_path / "trap.pt"), ("trap.pt", "loaded safely")),
        (("--ckpt", tmp_path / "foreign.pt"), ("foreign.pt", "not a checkpoint")),
        (("--fold", 7), ("--fold 7", "was trained with --fold 0")),
    ]
    for more, words in cases:
        refused(sample("sample_ddp_val.py", trained, tmp_path / "out", *more), *words)
    assert not (tmp_path / "out").exists() and not (tmp_path / "ran").exists()


def test_samplers_refuse_an_exchanged_autoencoder(trained, tiny_vae, tmp_path):
    moved = shutil.copytree(tiny_vae, tmp_path / "kept")
    shutil.rmtree(tiny_vae)
    try:
        other_vae(tiny_vae)
        refused(sample("sample_ddp_val.py", trained, tmp_path / "out"), "was trained with", "restore that VAE")
    finally:
        shutil.rmtree(tiny_vae)
        shutil.copytree(moved, tiny_vae)
    assert not (tmp_path / "out").exists()


def test_samplers_do_not_mix_images_of_other_weights_or_labels(store, trained, tiny_vae, expanded, spoiled):
    """Another run may have the same name and step, another data root the same fold."""
    folder = expanded / NAME
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    twin = store / "twin" / RUN
    (twin / "checkpoints").mkdir(parents=True)
    changed = checkpoint(trained, "best")
    changed["ema"]["final_layer.linear.bias"] += 0.1
    torch.save(changed, twin / "checkpoints" / "best_ckpt.pt")
    refused(sample("sample_ddp.py", twin, expanded), "made with other settings", "--sample-dir")
    table = spoiled / "train_0.csv"
    header, *rows = table.read_text().splitlines()
    table.write_text("\n".join([header, *reversed(rows)]) + "\n")
    refused(sample("sample_ddp.py", trained, expanded, "--data-path", spoiled), "other labels", "--sample-dir")
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before


@pytest.mark.parametrize("script, flags", [
    ("prepare_data.py", ("--source", "phantom", "--output", "OUT")), ("evaluate.py", ("--real", "OUT", "--gen", "OUT")),
    ("train_vae.py", ("--data-path", "OUT", "--output", "OUT"))])
def test_scripts_for_one_process_refuse_to_be_several(monkeypatch, tmp_path, script, flags):
    """Else each of them would write the same files; and the line says which process it is from."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    refused(call_script(script, *(tmp_path / f if f == "OUT" else f for f in flags)), "[rank 1]", script, "`python`")
    assert not list(tmp_path.iterdir())


def test_as_released_from_end_to_end(store, tiny_vae, tmp_path):
    """One frozen draw per image, raw weights validated without labels or guidance, the whole state inherited."""
    succeeded(train(store, tiny_vae, tmp_path, "--as-released", "--epochs", 2, "--validate-every", 1))
    run = tmp_path / RUN
    assert "raw weights" in (run / "log.txt").read_text()
    last = checkpoint(run)
    flags = last["args"]
    assert flags["frozen_latents"] and not flags["ema_warmup"] and flags["heredity"] == "whole"
    assert flags["cfg_scale"] == 1 and flags["validation_labels"] == "null" and len(last["validated"]) == 2
    for scale in (1, 1.5):
        out = succeeded(sample("sample_ddp_val.py", run, tmp_path / "s", "--as-released", "--cfg-scale", scale,
                               "--data-path", store / "data", "--weights", "model"))
        assert "heredity whole" in out
        (folder,) = (tmp_path / "s").glob(f"*-cfg-{float(scale)}-seed-0")  # the published name
        assert json.loads((folder / "settings.json").read_text())["heredity"] == "whole"


@pytest.mark.parametrize("file", sorted((ROOT / "assets").glob("geca-*/*.pt")), ids=lambda file: file.stem)
def test_bundled_weights_load_and_sample(file):
    loaded = checkpoints.load(file)
    model = checkpoints.build(loaded, loaded.default_kind)
    options = sampling.SamplingOptions(steps=2)
    labels = torch.eye(loaded.model_args["num_classes"])[:1]
    cells = loaded.model_args["input_size"]
    latents = sampling.sample_latents(model, labels, [0], cells, options, "cpu")
    assert latents.shape == (1, model.in_channels, cells, cells) and latents.isfinite().all()
    assert loaded.label_names and loaded.codec.startswith("retina:")


# ---- asking for images


def test_labels_are_asked_for_by_name(trained, tmp_path):
    """Without any data: two kinds of images, the grid, and the same pixels as under another request at their number."""
    command = ("--ckpt", trained / "checkpoints" / "best_ckpt.pt", "--num-sampling-steps", 2, "--sample-dir", tmp_path)
    succeeded(call_script("sample_ddp.py", *command, "--labels", "DR,FLD", "--labels", "null", "--count", 3, 2))
    (folder,) = tmp_path.iterdir()
    assert folder.name.endswith("-labels-DR+FLD_null")
    split = read_split(folder, "asked")
    wanted = [[float(name in ("DR", "FLD")) for name in split.label_names]] * 3 + [[0.0] * len(split.label_names)] * 2
    assert split.labels.tolist() == wanted and Image.open(folder / "grid.png").width > 3 * 128
    before = (folder / "asked" / "000000.png").stat().st_mtime_ns
    succeeded(call_script("sample_ddp.py", *command, "--labels", "DR,FLD", "--labels", "null", "--count", 3, 2))
    assert (folder / "asked" / "000000.png").stat().st_mtime_ns == before
    for flags, words in ((("--labels", "XYZ"), ("knows no 'XYZ'", "NOR AMD")), ((), ("either --data-path",)),
                         (("--labels", "DR", "--count", 1, 2), ("--count: found 2 numbers for 1 --labels",)),
                         (("--labels", "DR", "--data-path", tmp_path), ("either --data-path",))):
        refused(call_script("sample_ddp.py", *command, *flags), *words)
