"""metrics/features.py: the feature space of an autoencoder, and the scale on which it is expressed."""

import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from metrics import features as module
from metrics.features import channel_statistics, extract, fit, open_features
from pipeline.cli import UserError
from pipeline.data import center_crop, write_split
from pipeline.vae import VaeCodec, to_model_range
from train_vae import build

NOISE = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)


def save(images, folder):
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i}.png" for i in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    return paths


def save_tiny_vae(folder, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        build((4, 4, 8, 8)).save_pretrained(folder)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A tiny autoencoder with its scale, measured on NOISE at 32 and 16 pixels."""
    folder = tmp_path_factory.mktemp("features") / "tiny"
    save_tiny_vae(folder)
    fit(str(folder), save(NOISE, folder.parent / "images"), (32, 16), batch_size=5)
    return str(folder)


@pytest.fixture
def copy(vae, tmp_path):
    return shutil.copytree(vae, tmp_path / "copy")


def message_of(call):
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- the numbers

def test_statistics_of_every_block(vae):
    """Mean and std of each block's output, caught by hooks while diffusers' own encoder runs."""
    model, seen = VaeCodec(vae).vae, []
    blocks = [*model.encoder.down_blocks, model.encoder.mid_block]
    hooks = [b.register_forward_hook(lambda _, __, out: seen.append(out.double().numpy())) for b in blocks]
    model.encode(to_model_range(NOISE))
    for hook in hooks:
        hook.remove()
    assert [x.shape[1:] for x in seen] == [(4, 16, 16), (4, 8, 8), (8, 4, 4), (8, 4, 4), (8, 4, 4)]
    expected = np.concatenate([s for x in seen for s in (x.mean((2, 3)), x.std((2, 3)))], axis=1)
    assert np.allclose(channel_statistics(model, NOISE), expected, atol=1e-5)


def test_features_are_standardised(vae):
    """On the images on which the scale was measured: mean 0, std 1, both sizes together."""
    features = open_features(vae)
    small = np.stack([np.asarray(center_crop(Image.fromarray(image), 16)) for image in NOISE])
    values = np.concatenate([features(NOISE), features(small)])
    assert values.shape == (24, features.dimensions) == (24, 2 * (4 + 4 + 8 + 8 + 8))
    assert values.dtype == np.float32
    assert np.allclose(values.mean(0), 0, atol=1e-4)
    assert np.allclose(values.std(0), 1, atol=1e-3)


def test_a_feature_that_hardly_varies_is_not_blown_up(copy, tmp_path, monkeypatch):
    """A dead channel's std is raised to 1 % of the median one; the others stay as they are."""
    before = load_file(copy / module.SCALE_FILE)["std"]
    alive = torch.ones(64)
    alive[40] = 0
    monkeypatch.setattr(module, "channel_statistics", lambda vae, x: channel_statistics(vae, x) * alive)
    fit(str(copy), save(NOISE, tmp_path / "images"), (32, 16))
    std = load_file(copy / module.SCALE_FILE)["std"]
    assert std[40] == pytest.approx(0.01 * std.median().item())
    assert torch.allclose(std[alive == 1], before[alive == 1], rtol=1e-3)


def test_arrays_tensors_files_and_batches_agree(vae, tmp_path):
    features = open_features(vae)
    values = features(NOISE)
    assert np.ptp(values, axis=0).min() > 0  # every image is seen, by every feature
    assert np.allclose(features(torch.as_tensor(NOISE), batch_size=5), values, atol=1e-4)
    paths = save(NOISE, tmp_path)
    assert np.allclose(extract(features, paths, 32, batch_size=5), values, atol=1e-4)
    assert np.allclose(extract(features, paths[::-1], 32), values[::-1], atol=1e-4)
    assert extract(features, [], 32).shape == (0, 64)


def test_files_of_another_size_are_cropped(vae, tmp_path):
    features = open_features(vae)
    wide = np.concatenate([NOISE[:2], NOISE[2:4]], axis=2)  # 32 × 64: the centre is columns 16 to 48
    values = extract(features, save(wide, tmp_path), 32)
    assert np.allclose(values, features(wide[:, :, 16:48]), atol=1e-4)


# ---- which space it is

def test_identity_follows_the_weights_and_the_scale(vae, copy):
    first = open_features(vae)
    renamed = open_features(str(copy))
    assert (first.name, renamed.name) == ("tiny", "copy")
    assert first.identity.removeprefix("tiny") == renamed.identity.removeprefix("copy")
    scale = load_file(copy / module.SCALE_FILE)
    about = {"autoencoder": first.identity.split(":")[1]}
    save_file(scale | {"std": scale["std"] * 1.001}, copy / module.SCALE_FILE, about)
    assert open_features(str(copy)).identity != renamed.identity


def test_unknown_name():
    message = message_of(lambda: open_features("inception-v9"))
    assert "--features inception-v9" in message and "retina" in message


def test_no_autoencoder_in_the_folder(tmp_path):
    message = message_of(lambda: open_features(str(tmp_path)))
    assert f"--features {tmp_path}" in message and "train_vae.py" in message


def test_missing_scale_names_the_command(copy):
    (copy / module.SCALE_FILE).unlink()
    assert f"python -m metrics.features --fit {copy} --data-path" in message_of(lambda: open_features(str(copy)))


def test_scale_of_other_weights_is_refused(copy):
    save_tiny_vae(copy, seed=1)
    message = message_of(lambda: open_features(str(copy)))
    assert "made for weights" in message and "--fit" in message


def test_damaged_scale(copy):
    file = copy / module.SCALE_FILE
    file.write_bytes(file.read_bytes()[:100])
    assert "cannot be read" in message_of(lambda: open_features(str(copy)))


# ---- the command that measures the scale

def test_fit_command(copy, tmp_path, monkeypatch, capsys):
    """The scale comes from train_0 and val_0, never from test."""
    (copy / module.SCALE_FILE).unlink()
    names = [f"images/{p.name}" for p in save(NOISE, tmp_path / "root" / "images")]
    for split, part in (("train_0", slice(0, 6)), ("val_0", slice(6, 9)), ("test", slice(9, 12))):
        write_split(tmp_path / "root", split, names[part], np.ones((len(names[part]), 1)), ("A",), names[part])
    flags = ["--fit", str(copy), "--data_path", str(tmp_path / "root"), "--sizes", "32"]
    monkeypatch.setattr(sys, "argv", ["features.py", *flags])
    module.main()
    assert "from 9 images" in capsys.readouterr().out
    scale = load_file(copy / module.SCALE_FILE)
    expected = channel_statistics(VaeCodec(str(copy)).vae, NOISE[:9])
    assert torch.allclose(scale["mean"], expected.mean(0), atol=1e-4)
    open_features(str(copy))
