"""The latent cache: what is written is read, and what does not belong is refused."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import generators

from core.errors import UserError
from core.tensors import write_tensors
from dataset import latents
from dataset.root import read_split, write_split

NAMES = ("A", "B")


class Codec:
    channels, identity = 4, "stand-in:1234"


@pytest.fixture
def split(tmp_path):
    root = tmp_path / "root"
    (root / "images").mkdir(parents=True)
    files = [f"images/{i}.png" for i in range(5)]
    for name in files:
        (root / name).touch()
    labels = np.array([[0, 1], [1, 0], [1, 1], [0, 0], [1, 0]])
    write_split(root, "train_0", files, labels, NAMES, files)
    return read_split(root, "train_0")


@pytest.fixture
def store(tmp_path, split):
    """Five images, written by two processes in the wrong order."""
    folder = latents.folder(tmp_path / "store", 0)
    folder.mkdir(parents=True)
    g = torch.Generator().manual_seed(0)
    mean, std = torch.randn(5, 2, 4, 3, 3, generator=g), torch.rand(5, 2, 4, 3, 3, generator=g) + 0.5
    labels = torch.tensor(split.labels)
    for first, last in ((2, 5), (0, 2)):
        latents.write_shard(folder, first, mean[first:last], std[first:last], labels[first:last])
    latents.write_manifest(folder, latents.manifest_of(split, Codec, 24))
    return tmp_path / "store", mean, std


def test_round_trip_over_two_shards(store, split):
    path, mean, std = store
    cache = latents.load(path, 0)
    assert torch.equal(cache.mean[:], mean) and torch.equal(cache.std[:], std)
    assert torch.equal(cache.mean[3, 1], mean[3, 1]) and torch.equal(cache.mean[-5], mean[-5])
    assert torch.equal(cache.mean[1:4, 0], mean[1:4, 0]) and cache.mean.shape == mean.shape
    with pytest.raises(IndexError):
        cache.mean[5]
    assert torch.equal(cache.labels, torch.tensor(split.labels))
    latents.check(cache, latents.manifest_of(split, Codec, 24), split.labels, Codec, 3)


def test_what_is_finished_is_known_and_damage_is_not(store):
    """Of five images the last three lie in a shard that was cut off."""
    folder = store[0] / "features_0"
    assert latents.finished(folder, 5).tolist() == [True] * 5
    (folder / "shard-00002.safetensors").write_bytes(b"cut off")
    assert latents.finished(folder, 6).tolist() == [True] * 2 + [False] * 4
    latents.remove_damaged(folder)
    assert [path.name for path in folder.glob("shard-*")] == ["shard-00000.safetensors"]


def test_a_draw_is_a_mirror_by_coin_and_a_posterior_sample(store):
    """Within five standard errors of 4,000 draws."""
    path, mean, std = store
    cache = latents.load(path, 0)
    mean[3, 1] = mean[3, 0] + 1000  # so far apart that every draw says which of the two it is
    cache = dataclasses.replace(cache, mean=mean)
    draws = torch.stack([cache.draw(3, g) for g in generators(4000)])
    mirrored = draws[:, 0, 0, 0] > mean[3, 0, 0, 0, 0] + 500
    assert abs(mirrored.float().mean() - 0.5) < 5 * 0.5 / 4000**0.5
    for variant, drawn in enumerate((draws[~mirrored], draws[mirrored])):
        z = (drawn - mean[3, variant]) / std[3, variant]
        assert z.mean(0).abs().max() < 5 / len(z) ** 0.5
        assert (z.std(0) - 1).abs().max() < 5 / (2 * len(z)) ** 0.5


@pytest.mark.parametrize("change, named", [
    ({"vae": "other:5678"}, "vae"), ({"image_size": 32}, "image_size"), ({"label_names": ["A", "C"]}, "label_names"),
    ({"filenames": [f"{i}.png" for i in range(5)]}, "train_0.csv has changed since extraction"),
    ({"contents": ["0"] * 5}, "images have changed since extraction"), ({"format": 0}, "format")])
def test_a_foreign_or_stale_cache_is_refused(store, split, change, named):
    cache = latents.load(store[0], 0)
    with pytest.raises(UserError, match=named if " " in named else f"{named} is"):
        latents.check(cache, latents.manifest_of(split, Codec, 24) | change, split.labels, Codec, 3)


@pytest.mark.parametrize("old, new, message", [
    (",0,1,", ",1,1,", "train_0.csv has changed since extraction"),  # one label of one image
    ("4,images/4.png,1,0,images/4.png\n", "", r"5 latents with 2 labels, but train_0.csv has 4 images"),
])
def test_a_table_that_was_changed_makes_the_cache_stale(store, split, old, new, message):
    text = split.csv.read_text()
    split.csv.write_text(text.replace(old, new))
    assert split.csv.read_text() != text
    changed = latents.manifest_of(read_split(split.folder, "train_0"), Codec, 24)
    with pytest.raises(UserError, match=message):
        latents.check(latents.load(store[0], 0), changed, split.labels, Codec, 3)


def test_an_exchanged_image_is_noticed(store, split):
    """By its contents; the published layout keeps no manifest, and its labels must be those of the table."""
    split.paths[2].write_bytes(b"another image")
    with pytest.raises(UserError, match="images have changed"):
        latents.check(latents.load(store[0], 0), latents.manifest_of(split, Codec, 24), split.labels, Codec, 3)
    published = dataclasses.replace(latents.load(store[0], 0), manifest={})
    latents.check(published, latents.manifest_of(split, Codec, 24), split.labels[::-1].copy(), Codec, 3)
    with pytest.raises(UserError, match="labels are not those of train_0"):
        latents.check(published, latents.manifest_of(split, Codec, 24), 1 - split.labels, Codec, 3)


def test_the_same_weights_under_another_folder_name_are_no_foreigner(store, split):
    cache = latents.load(store[0], 0)
    latents.check(cache, latents.manifest_of(split, Codec, 24) | {"vae": "renamed:1234"}, split.labels, Codec, 3)


def test_a_lost_shard_is_noticed(store):
    (store[0] / "features_0" / "shard-00002.safetensors").unlink()
    with pytest.raises(UserError, match="holds 2 latents, its manifest says 5"):
        latents.load(store[0], 0)


@pytest.mark.parametrize("name", ["manifest.json", "shard-00000.safetensors"])
def test_a_damaged_file_is_named_in_one_line(store, name):
    file = store[0] / "features_0" / name
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=f"{name}: damaged .*extract again") as error:
        latents.load(store[0], 0)
    assert "\n" not in str(error.value)


def test_a_foreign_file_is_no_traceback(store):
    write_tensors(store[0] / "features_0" / "shard-00000.safetensors", {"other": torch.zeros(2)})
    with pytest.raises(UserError, match=r"00.safetensors: damaged .found tensors .*remove .* and extract again"):
        latents.load(store[0], 0)


def test_a_missing_fold_names_those_that_are_there(store):
    with pytest.raises(UserError, match=r"--fold 8: .*found: features_0"):
        latents.load(store[0], 8)


def test_wrong_grid_is_refused(store, split):
    cache = latents.load(store[0], 0)
    with pytest.raises(UserError, match="shape"):
        latents.check(cache, latents.manifest_of(split, Codec, 24), split.labels, Codec, 4)


def test_the_published_layout_is_read(tmp_path):
    rows = np.random.default_rng(0).standard_normal((11, 1, 4, 3, 3)).astype(np.float32)
    labels = np.eye(11, dtype=np.float32)
    for kind, values in (("features_0", rows), ("labels_0", labels[:, None])):
        (tmp_path / kind).mkdir()
        for i, value in enumerate(values):
            np.save(tmp_path / kind / f"{i}.npy", value)
    cache = latents.load(tmp_path, 0)
    assert np.array_equal(cache.mean[:, 0].numpy(), rows[:, 0])  # image 10 after image 9, not after image 1
    assert np.array_equal(cache.labels.numpy(), labels)
    assert torch.equal(cache.draw(4, *generators(1)), cache.mean[4, 0])
    (tmp_path / "labels_0" / "3.npy").unlink()
    with pytest.raises(UserError, match=r"3\.npy is in only one"):
        latents.load(tmp_path, 0)
    half = tmp_path / "features_0" / "7.npy"
    half.write_bytes(half.read_bytes()[:150])
    (tmp_path / "features_0" / "3.npy").unlink()
    with pytest.raises(UserError, match=r"7\.npy: damaged"):
        latents.load(tmp_path, 0)


@pytest.mark.parametrize("images, classes", [(4, 2), (5, 3)])
def test_the_published_layout_is_measured_against_the_table(tmp_path, split, images, classes):
    """It has no manifest: that the numbers of images and labels agree is all that can be asked."""
    for kind, shape in (("features_0", (1, 4, 3, 3)), ("labels_0", (1, classes))):
        (tmp_path / kind).mkdir()
        for i in range(images):
            np.save(tmp_path / kind / f"{i}.npy", np.zeros(shape, np.float32))
    with pytest.raises(UserError, match=f"{images} latents with {classes} labels, but train_0.csv has 5 images with 2"):
        latents.check(latents.load(tmp_path, 0), latents.manifest_of(split, Codec, 24), split.labels, Codec, 3)


def test_a_folder_without_manifest_is_no_cache(store):
    (store[0] / "features_0" / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"neither manifest\.json nor"):
        latents.load(store[0], 0)
