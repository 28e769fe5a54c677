"""Checkpoints: safe to read, whole or not there, enough to rebuild the net, and readable both ways."""

import argparse
import dataclasses
import math
import os
import pickle
from pathlib import PurePosixPath

import pytest
import torch
from conftest import call_script, fill, succeeded
from helpers import message_of
from safetensors.torch import load_file, save_file

from core.errors import UserError
from generation import checkpoint as checkpoints
from models import MODELS


def small_checkpoint():
    model = MODELS["GeCA-XS"](input_size=4, num_classes=3, in_channels=2)
    raw = {key: value + 1 for key, value in model.state_dict().items()}
    return model, {
        "model": raw, "ema": model.state_dict(), "opt": {}, "scaler": {}, "step": 7, "epoch": 1,
        "best_kid": 0.5, "minutes": 1.0, "label_names": ["A", "B", "C"], "codec": "stand-in:12", "run": "000-GeCA-XS-0",
        "model_args": {"model": "GeCA-XS", "input_size": 4, "num_classes": 3, "in_channels": 2},
        "args": {"model": "GeCA-XS", "image_size": 32},
    }


def test_the_net_is_rebuilt_from_the_file(tmp_path):
    model, checkpoint = small_checkpoint()
    checkpoints.save(tmp_path / "c.pt", checkpoint)
    rebuilt = checkpoints.build(checkpoints.load(tmp_path / "c.pt"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), rebuilt.parameters(), strict=True))
    assert not any(p.requires_grad for p in rebuilt.parameters())
    raw = checkpoints.build(checkpoints.load(tmp_path / "c.pt"), "model")
    assert all(torch.equal(a + 1, b) for a, b in zip(model.parameters(), raw.parameters(), strict=True))


# ---- other layouts


@pytest.fixture(scope="module")
def geca():
    """One with other numbers of labels, and other channels than usual."""
    return fill(MODELS["GeCA-XS"](input_size=4, num_classes=7, in_channels=3))


def published(model, **more):
    """The published layout: weights saved from inside DistributedDataParallel, flags as argparse left them."""
    raw = {f"module.{key}": value + 1 for key, value in model.state_dict().items()}
    args = argparse.Namespace(model="GeCA-XS", image_size=256, vae="mse", num_classes=1000, in_channels=3,
                              image_space=False, multi_scale=False, grad_norm=False, lr=None, **more)
    return {"model": raw, "ema": model.state_dict(), "opt": {"state": {}, "param_groups": [{"lr": 1e-4}]}, "args": args}


def same_weights(state, model):
    return all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_the_published_layout_is_read(tmp_path, geca):
    torch.save(published(geca), tmp_path / "c.pt")
    found = checkpoints.load(tmp_path / "c.pt")
    assert found.model_args == {"model": "GeCA-XS", "num_classes": 7, "in_channels": 3}  # the shapes are right
    assert (found.args["image_size"], found.args["vae"], found.args["num_classes"]) == (256, "mse", 7)
    assert found.label_names is None and found.codec is None and found.step is None
    assert same_weights(checkpoints.build(found).state_dict(), geca)
    assert torch.equal(checkpoints.build(found, "model").final_layer.linear.bias, geca.final_layer.linear.bias + 1)
    text = checkpoints.summary(found)
    for words in ("GeCA-XS", "averaged and raw weights", "step not said", "256 px", "VAE mse", "7 labels: not said"):
        assert words in text


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("write, name", [(torch.save, "c.pt"), (save_file, "c.safetensors")])
def test_bare_weights_are_read(tmp_path, geca, prefix, write, name):
    write({prefix + key: value for key, value in geca.state_dict().items()}, tmp_path / name)
    found = checkpoints.load(tmp_path / name)
    assert same_weights(checkpoints.build(found).state_dict(), geca) and not found.model
    assert "averaged or raw (not said) weights" in checkpoints.summary(found)
    assert found.args["image_size"] is None and found.args["vae"] is None


@pytest.mark.parametrize("name, sizes", [("GeCA-S", {"num_classes": 2, "in_channels": 4}),
                                         ("DiT-S/4", {"num_classes": 3, "in_channels": 2, "input_size": 8})])
def test_a_model_is_known_by_its_shapes(tmp_path, name, sizes):
    torch.save(MODELS[name](**sizes).state_dict(), tmp_path / "c.pt")
    assert checkpoints.load(tmp_path / "c.pt").model_args == {"model": name, **sizes}


def test_ours_is_read_by_published_code(tmp_path, geca):
    """Its samplers take `ema` of the file as it is, and load it into a model with the published names."""
    _, checkpoint = small_checkpoint()
    checkpoints.save(tmp_path / "c.pt", {**checkpoint, "ema": geca.state_dict()})
    state = torch.load(tmp_path / "c.pt", weights_only=False)["ema"]  # find_model there
    assert type(state) in (dict, type(geca.state_dict())) and set(state) == set(geca.state_dict())
    assert same_weights(state, geca)


@pytest.mark.parametrize("kind, half", [("ema", False), ("ema", True), ("model", False)])
@pytest.mark.parametrize("name", ["out.safetensors", "out.pt"])
def test_conversion(tmp_path, kind, half, name):
    _, checkpoint = small_checkpoint()
    checkpoints.save(tmp_path / "c.pt", checkpoint)
    out = succeeded(call_script("generation/checkpoint.py", tmp_path / "c.pt", "--to", tmp_path / name,
                                "--weights", kind, *["--half"] * half))
    assert "averaged and raw weights, float32" in out and "step 7, epoch 1, best KID 500.00e-3" in out
    found = checkpoints.load(tmp_path / name)
    other = "model" if kind == "ema" else "ema"
    for key, value in checkpoint[kind].items():
        assert torch.equal(found.weights(kind)[key], value.half() if half else value)
    assert not found.weights(other) and not found.opt
    for said in ("args", "label_names", "model_args", "step", "codec", "run"):
        assert getattr(found, said) == checkpoint[said]
    if name == "out.safetensors":  # and anybody else finds the published names in it
        assert set(load_file(tmp_path / name)) == set(checkpoint[kind])


def test_conversion_says_what_a_file_lacks(tmp_path, geca):
    torch.save(geca.state_dict(), tmp_path / "c.pt")
    done = call_script("generation/checkpoint.py", tmp_path / "c.pt", "--to", tmp_path / "o.pt", "--weights", "model")
    assert done.returncode == 2 and "--weights model" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "o.pt").exists()


class Trap:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (self.file,)


def test_a_file_that_would_execute_code_is_refused_and_nothing_runs(tmp_path, geca):
    torch.save({"model": Trap(str(tmp_path / "ran"))}, tmp_path / "trap.pt")
    torch.save(published(geca, home=Trap(str(tmp_path / "ran"))), tmp_path / "trap_in_flags.pt")
    (tmp_path / "trap.pkl").write_bytes(pickle.dumps(Trap(str(tmp_path / "ran")), protocol=2))
    for name in ("trap.pt", "trap_in_flags.pt", "trap.pkl"):
        with pytest.raises(UserError, match="cannot be loaded safely") as error:
            checkpoints.load(tmp_path / name)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 half a zip"])
def test_a_damaged_file_is_one_line(tmp_path, content):
    (tmp_path / "c.pt").write_bytes(content)
    with pytest.raises(UserError, match="cannot be loaded safely") as error:
        checkpoints.load(tmp_path / "c.pt")
    assert "\n" not in str(error.value)


def test_only_the_flags_class_is_let_in(tmp_path):
    torch.save({"ema": {"a": torch.ones(1)}, "args": argparse.ArgumentTypeError("x")}, tmp_path / "c.pt")
    with pytest.raises(UserError, match="cannot be loaded safely"):
        checkpoints.load(tmp_path / "c.pt")


def says(model, **more):
    """What a file of ours says of its weights."""
    return {"model_args": {"model": model, "num_classes": 3, "in_channels": 2, **more},
            "args": {"model": model, "image_size": 32}}


@pytest.mark.parametrize("content, words", [
    ({"model": "resnet50", "state_dict": {}}, '`model` is "resnet50", expected an object or null'),
    ({"ema": [1]}, r"`ema` is \[1\], expected an object"),
    ({"model": torch.ones(2), "x": 1}, '`model` is "Tensor", expected an object'),
    ({"ema": {3: torch.ones(1)}}, "`ema` has the name 3, expected text"),
    ({3: torch.ones(1), "x": 1}, "has the name 3, expected text"),
    ({"ema": {"a": torch.ones(1)}, "args": "x"}, '`args` is "x", expected an object'),
    ({"ema": {"a": torch.ones(1)}, "model_args": {"model": "GeCA-XS"}}, "no `args`"),
    ({"ema": {"a": torch.ones(1)}, **says("GeCA-Q")}, "not those of the GeCA-Q"),
    ({"ema": {"a": torch.ones(1)}, **says("DiT-S", wings=2)}, "not those of the DiT-S"),
    ({"ema": {"a": torch.ones(1)}, **says("GeCA-XS")}, "not those of the GeCA-XS"),
    ({"pos_embed": torch.ones(1, 4, 8), "patch_embed.proj.weight": torch.ones(1)}, "2 weights fit none"),
    ({"cell_to_embedding.weight": torch.ones(2, 3)}, "1 weights fit none"),
    ({"model": {}, "ema": {}}, "not a checkpoint"), ({}, "not a checkpoint"), ([1, 2], "found list"),
    ({"format_version": 99, "ema": {"a": torch.ones(1)}}, "has format 99, expected 1"),
    ({"ema": {"a": 1}}, "not a checkpoint"), ({"a": torch.ones(1)}, "its 1 weights fit none of GeCA-S")])
def test_what_is_no_checkpoint_is_refused(tmp_path, content, words):
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(UserError, match=rf"--load-from .*c\.pt: .*{words}") as error:
        checkpoints.load(tmp_path / "c.pt", "--load-from")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("where, value, words", [
    ("step", "5", '`step` is "5", expected a whole number of at least 0'), ("step", -1, "`step` is -1"),
    ("step", torch.tensor(5), '`step` is "Tensor", expected'), ("step", True, "`step` is true"),
    ("epoch", 1.5, "`epoch` is 1.5"),
    ("best_kid", math.nan, "`best_kid` is NaN, expected a number or null"), ("minutes", -1.0, "`minutes` is"),
    ("minutes", [], "`minutes` is"), ("codec", 7, "`codec` is 7, expected text"), ("run", {}, "`run` is {}"),
    ("features", 1, "`features` is 1"), ("training_images", [], "`training_images` is"),
    ("label_names", [1, 2, 3], "`label_names.0` is 1, expected text"), ("label_names", "ABC", "`label_names` is"),
    ("seen", [None], "`seen.0` is null"), ("opt", [], "`opt` is"), ("scaler", 1, "`scaler` is 1"),
    ("validated", [1], '`validated.0` is 1, expected a Tensor'), ("format_version", "1", '`format_version` is "1"'),
    ("args", {}, "`args` has no `model`"), ("args.image_size", "64", '`args.image_size` is "64", expected a whole'),
    ("args.image_size", -64, "`args.image_size` is -64"), ("args.image_size", 10**9, "from 8 to 2048"),
    ("args.vae", 7, "`args.vae` is 7, expected text or null"), ("args.fold", "0", "`args.fold` is"),
    ("args.multi_scale", "no", "`args.multi_scale` is"), ("args.image_space", 0, "`args.image_space` is 0"),
    ("model_args.num_classes", -1, "`model_args.num_classes` is -1"), ("model_args.model", [], "`model_args.model` is"),
    ("model_args.in_channels", 2.0, "`model_args.in_channels` is 2.0"),
    ("model_args.input_size", 10**6, "`model_args.input_size` is 1000000"),
    ("model.alpha", 1, "`model.alpha` is 1, expected a Tensor"),
    ("averages.0.9", torch.ones(1), '`averages.0.9` is "Tensor", expected an object'),
], ids=str)
def test_every_value_of_a_checkpoint_has_its_type(tmp_path, where, value, words):
    """A file that is safe to load may say anything."""
    _, checkpoint = small_checkpoint()
    name, _, inner = where.partition(".")
    checkpoint[name] = {**checkpoint.get(name, {}), inner: value} if inner else value
    torch.save({"format_version": 1, **checkpoint}, tmp_path / "c.pt")
    said = message_of(lambda: checkpoints.load(tmp_path / "c.pt"))
    assert said.startswith(f"--ckpt {tmp_path / 'c.pt'}: not a checkpoint (") and words in said and len(said) < 350


@pytest.mark.parametrize("weight", [torch.ones(1, 2).to_sparse(), torch.ones(1, device="meta")])
def test_weights_that_are_not_computed_with_are_refused(tmp_path, weight):
    _, checkpoint = small_checkpoint()
    key, value = next(iter(checkpoint["ema"].items()))
    strange = value.to_sparse() if weight.is_sparse else value.to(weight.device)
    torch.save({**checkpoint, "ema": {**checkpoint["ema"], key: strange}}, tmp_path / "c.pt")
    assert "damaged (" in message_of(lambda: checkpoints.load(tmp_path / "c.pt"))


@pytest.mark.parametrize("header", ["[1]", '"a"', "null", '{"kind": [1]}', '{"ema": "x"}', '{"args": "x"}', "{"])
def test_a_safetensors_header_that_makes_no_sense_is_one_line(tmp_path, geca, header):
    save_file(geca.state_dict(), tmp_path / "c.safetensors", {"checkpoint": header})
    with pytest.raises(UserError, match=r"c\.safetensors") as error:
        checkpoints.load(tmp_path / "c.safetensors")
    assert "\n" not in str(error.value)


def test_what_is_unsafe_is_named_and_no_advice_to_load_it_is_given(tmp_path, geca):
    torch.save(published(geca, home=PurePosixPath("a")), tmp_path / "c.pt")
    with pytest.raises(UserError, match=r"\(it holds a pathlib\S*\); give a checkpoint of train.py, or weights$"):
        checkpoints.load(tmp_path / "c.pt")


def test_a_folder_that_does_not_exist_and_a_run_before_its_first_validation(tmp_path):
    _, checkpoint = small_checkpoint()
    checkpoints.save(tmp_path / "c.pt", {**checkpoint, "best_kid": math.inf, "validated": [torch.ones(3)]})
    done = call_script("generation/checkpoint.py", tmp_path / "c.pt", "--to", tmp_path / "no" / "o.pt")
    assert done.returncode == 2 and "no such folder" in done.stderr
    for name in ("o.pt", "o.safetensors"):
        out = succeeded(call_script("generation/checkpoint.py", tmp_path / "c.pt", "--to", tmp_path / name))
        assert "best KID not said" in out
        assert checkpoints.load(tmp_path / name).validated == []


def test_a_damaged_safetensors_file_is_one_line(tmp_path):
    (tmp_path / "c.safetensors").write_bytes(b"\x10" * 40)
    with pytest.raises(UserError, match="damaged") as error:
        checkpoints.load(tmp_path / "c.safetensors")
    assert "\n" not in str(error.value)


def test_a_failed_write_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    _, checkpoint = small_checkpoint()
    checkpoints.save(tmp_path / "c.pt", checkpoint)

    def die_half_way(state, file):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", die_half_way)
    with pytest.raises(UserError, match=r"c\.pt: cannot be written \(disk full\); make room"):
        checkpoints.save(tmp_path / "c.pt", {**checkpoint, "step": 8})
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]
    assert checkpoints.load(tmp_path / "c.pt").step == 7


def test_a_flag_that_disagrees_is_an_error():
    checkpoints.check_flag("c.pt", "model", "DiT-S", "DiT-S/2")  # two names of one model
    checkpoints.check_flag("c.pt", "vae", "mse", None)  # a file that does not say
    checkpoints.check_flag("c.pt", "model", None, "GeCA-XS")
    checkpoints.check_flag("c.pt", "model", "GeCA-XS", "GeCA-XS")
    with pytest.raises(UserError, match=r"--image-size 64: c\.pt was trained with --image-size 32"):
        checkpoints.check_flag("c.pt", "image_size", 64, 32)


def test_a_checkpoint_cannot_be_changed_after_loading(tmp_path):
    _, checkpoint = small_checkpoint()
    checkpoints.save(tmp_path / "c.pt", checkpoint)
    with pytest.raises(dataclasses.FrozenInstanceError):
        checkpoints.load(tmp_path / "c.pt").step = 8


def test_further_averages_are_named_by_their_decay(tmp_path):
    """Kept in the file, found under ema:DECAY, converted alone, checked like the other weights."""
    model, checkpoint = small_checkpoint()
    long = {key: value + 2 for key, value in model.state_dict().items()}
    checkpoints.save(tmp_path / "c.pt", {**checkpoint, "averages": {"0.99": long}})
    loaded = checkpoints.load(tmp_path / "c.pt")
    assert loaded.kinds == ["ema", "model", "ema:0.99"] and loaded.weights("ema:0.5") == {}
    assert same_weights(long, checkpoints.build(loaded, "ema:0.99"))
    succeeded(call_script("generation/checkpoint.py", tmp_path / "c.pt", "--to", tmp_path / "long.pt", "--weights",
                          "ema:0.99"))
    assert same_weights(long, checkpoints.build(checkpoints.load(tmp_path / "long.pt")))
    checkpoints.save(tmp_path / "odd.pt", {**checkpoint, "averages": {"0.99": {"a": torch.ones(1)}}})
    with pytest.raises(UserError, match="not those of the GeCA-XS"):
        checkpoints.load(tmp_path / "odd.pt")
    checkpoints.save(tmp_path / "odd.pt", {**checkpoint, "averages": [1]})
    with pytest.raises(UserError, match=r"`averages` is \[1\], expected an object"):
        checkpoints.load(tmp_path / "odd.pt")
