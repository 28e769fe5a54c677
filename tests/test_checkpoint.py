"""Checkpoints: safe to read, whole or not there, and enough to rebuild the net."""

import os
import pickle

import pytest
import torch

from models import MODELS
from pipeline import checkpoint as checkpoints
from pipeline.cli import UserError


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


def test_a_slim_copy_is_half_precision_and_builds(tmp_path):
    model, checkpoint = small_checkpoint()
    checkpoints.save(tmp_path / "c.pt", checkpoint)
    checkpoints.save(tmp_path / "slim.pt", checkpoints.slim(checkpoint))
    assert (tmp_path / "slim.pt").stat().st_size < (tmp_path / "c.pt").stat().st_size / 3.8
    rebuilt = checkpoints.build(checkpoints.load(tmp_path / "slim.pt"))
    for a, b in zip(model.parameters(), rebuilt.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert "averaged weights; step 7" in checkpoints.summary(checkpoints.load(tmp_path / "slim.pt"))


class Trap:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (self.file,)


def test_a_file_that_would_execute_code_is_refused_and_nothing_runs(tmp_path):
    torch.save({"model": Trap(str(tmp_path / "ran"))}, tmp_path / "trap.pt")
    (tmp_path / "trap.pkl").write_bytes(pickle.dumps(Trap(str(tmp_path / "ran")), protocol=2))
    for name in ("trap.pt", "trap.pkl"):
        with pytest.raises(UserError, match="can be loaded safely") as error:
            checkpoints.load(tmp_path / name)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 half a zip"])
def test_a_damaged_file_is_one_line(tmp_path, content):
    (tmp_path / "c.pt").write_bytes(content)
    with pytest.raises(UserError, match="not a checkpoint") as error:
        checkpoints.load(tmp_path / "c.pt")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [{"model": {}, "ema": {}}, {"format_version": 99}, [1, 2]])
def test_what_train_did_not_write_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(UserError, match=r"--load-from .*c\.pt: not a checkpoint of train\.py"):
        checkpoints.load(tmp_path / "c.pt", "--load-from")


def test_a_failed_write_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    _, checkpoint = small_checkpoint()
    checkpoints.save(tmp_path / "c.pt", checkpoint)

    def die_half_way(state, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", die_half_way)
    with pytest.raises(OSError, match="disk full"):
        checkpoints.save(tmp_path / "c.pt", {**checkpoint, "step": 8})
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]
    assert checkpoints.load(tmp_path / "c.pt")["step"] == 7


def test_a_flag_that_disagrees_is_an_error():
    checkpoints.check_flag("c.pt", "model", None, "GeCA-XS")
    checkpoints.check_flag("c.pt", "model", "GeCA-XS", "GeCA-XS")
    with pytest.raises(UserError, match=r"--image-size 64: c\.pt was trained with --image-size 32"):
        checkpoints.check_flag("c.pt", "image_size", 64, 32)
