"""metrics/features.py: the feature space of an autoencoder, and the scale on which it is expressed."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from metrics import features as module
from metrics.features import channel_statistics, extract, fit, open_features, whitening
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
    fit(str(folder), [save(NOISE, folder.parent / "images")], (32, 16), batch_size=5)
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


def normal(n, columns, seed=0):
    return torch.as_tensor(np.random.default_rng(seed).standard_normal((n, columns)))


def test_whitening():
    """Three columns of very different size, two correlated, one dead: two axes, uncorrelated, of variance 1."""
    values = normal(500, 2) @ torch.tensor([[1000.0, 1, 0], [500, 0.1, 0]]).double() + torch.tensor([5, 6, 7])
    mean, axes = whitening([values])
    assert torch.allclose(mean, values.mean(0))
    assert axes.shape == (3, 2)
    white = (values - mean) @ axes
    assert torch.allclose(white.T @ white / 500, torch.eye(2).double(), atol=1e-6)


def test_what_sets_two_kinds_apart_stays_large():
    """Two kinds, of different size, 50 deviations apart in one column: within each the variance is 1."""
    apart = torch.tensor([50.0, 0, 0, 0])
    groups = [normal(300, 4, seed=1), normal(700, 4, seed=2) + apart]
    mean, axes = whitening(groups)
    first, second = ((group - mean) @ axes for group in groups)
    assert (second.mean(0) - first.mean(0)).norm() == pytest.approx(50, rel=0.05)
    pooled = torch.cat([first - first.mean(0), second - second.mean(0)])
    assert torch.allclose(pooled.T @ pooled / 1000, torch.eye(4).double(), atol=1e-6)


def test_whitening_keeps_the_largest_axes(monkeypatch):
    """Of 20 columns two are the same: what they share is the largest principal axis."""
    monkeypatch.setattr(module, "COMPONENTS", 3)
    values = normal(2000, 20)
    values[:, 7] = values[:, 3]
    axes = whitening([values])[1]
    assert axes.shape == (20, 3)
    first = axes[:, 0].abs() / axes[:, 0].abs().max()
    assert first[[3, 7]].min() > 0.9
    assert first[[i for i in range(20) if i not in (3, 7)]].max() < 0.4


def test_a_column_that_hardly_varies_is_not_blown_up():
    """A nearly dead column of independent noise would be an axis like any other: it is none."""
    values = normal(2000, 20)
    values[:, 4] *= 1e-6
    axes = whitening([values])[1]
    assert axes.shape == (20, 19)
    assert axes[4].norm() < 1  # to move by 1 takes a million of its deviations, not one


def test_features_lie_on_a_sphere(vae):
    """Centred on the images on which the axes were measured; x·y / d is the cosine."""
    features = open_features(vae)
    values = features(NOISE)
    assert values.dtype == np.float32 and values.shape == (12, features.dimensions)
    assert 12 <= features.dimensions <= 22  # 2 × 12 images, centred within each size
    assert np.allclose((values**2).sum(1), features.dimensions, rtol=1e-4)
    scale = load_file(Path(vae) / module.SCALE_FILE)
    white = ((channel_statistics(VaeCodec(vae).vae, NOISE) - scale["mean"]) @ scale["axes"]).numpy()
    assert np.allclose(values, white * np.sqrt(features.dimensions) / np.linalg.norm(white, axis=1)[:, None],
                       atol=1e-3)


def test_axes_are_measured_on_all_images_and_sizes(vae):
    """The images at 32 and at 16 pixels, as two kinds, have mean 0 together and variance 1 within."""
    scale = load_file(Path(vae) / module.SCALE_FILE)
    small = np.stack([np.asarray(center_crop(Image.fromarray(image), 16)) for image in NOISE])
    model = VaeCodec(vae).vae
    white = [((channel_statistics(model, images) - scale["mean"]) @ scale["axes"]).double()
             for images in (NOISE, small)]
    assert torch.cat(white).mean(0).abs().max() < 0.02
    within = torch.cat([w - w.mean(0) for w in white])
    assert torch.allclose(within.T @ within / 24, torch.eye(within.shape[1]).double(), atol=0.05)


def test_arrays_tensors_files_and_batches_agree(vae, tmp_path):
    features = open_features(vae)
    values = features(NOISE)
    assert len(np.unique(values.round(3), axis=0)) == 12  # every image is seen
    assert np.allclose(features(torch.as_tensor(NOISE), batch_size=5), values, atol=1e-4)
    paths = save(NOISE, tmp_path)
    assert np.allclose(extract(features, paths, 32, batch_size=5), values, atol=1e-4)
    assert np.allclose(extract(features, paths[::-1], 32), values[::-1], atol=1e-4)
    assert extract(features, [], 32).shape == (0, features.dimensions)


def test_files_of_another_size_are_cropped(vae, tmp_path):
    features = open_features(vae)
    wide = np.concatenate([NOISE[:2], NOISE[2:4]], axis=2)  # 32 × 64: the centre is columns 16 to 48
    values = extract(features, save(wide, tmp_path), 32)
    assert np.allclose(values, features(wide[:, :, 16:48]), atol=1e-4)


# ---- which space it is

def test_identity_follows_the_weights_and_the_scale(vae, copy):
    first = open_features(vae)
    renamed = open_features(str(copy))
    assert (first.name, renamed.name) == ("vae:tiny", "vae:copy")
    assert first.identity.removeprefix("vae:tiny") == renamed.identity.removeprefix("vae:copy")
    scale = load_file(copy / module.SCALE_FILE)
    about = {"autoencoder": first.identity.split(":")[2]}
    save_file(scale | {"axes": scale["axes"] * 1.001}, copy / module.SCALE_FILE, about)
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
