"""evaluation/features.py and evaluation/backbones.py: feature spaces, their preprocessing, the cache on disk.

The networks have random weights, in files as they are published; where a small network shows the same, it is taken.
"""

import shutil
import sys
import weakref
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from helpers import message_of, noise_images, save_images, save_tiny_vae
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file

from dataset.images import center_crop
from dataset.root import write_split
from dataset.vae import VaeCodec, to_model_range
from evaluation import backbones
from evaluation import features as module
from evaluation.features import PUBLISHED, SPACES, channel_statistics, extract, fit, open_features, whitening

NOISE = noise_images(12, size=32)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A tiny autoencoder with its scale, measured on NOISE at 32 and 16 pixels."""
    folder = tmp_path_factory.mktemp("features") / "tiny"
    save_tiny_vae(folder)
    fit(str(folder), [save_images(NOISE, folder.parent / "images")], (32, 16), batch_size=5)
    return str(folder)


@pytest.fixture
def copy(vae, tmp_path):
    return shutil.copytree(vae, tmp_path / "copy")


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
    paths = save_images(NOISE, tmp_path)
    assert np.allclose(extract(features, paths, 32, batch_size=5), values, atol=1e-4)
    assert np.allclose(extract(features, paths[::-1], 32), values[::-1], atol=1e-4)
    assert extract(features, [], 32).shape == (0, features.dimensions)


def test_files_of_another_size_are_cropped(vae, tmp_path):
    features = open_features(vae)
    wide = np.concatenate([NOISE[:2], NOISE[2:4]], axis=2)  # 32 × 64: the centre is columns 16 to 48
    values = extract(features, save_images(wide, tmp_path), 32)
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
    assert f"python -m evaluation.features --fit {copy} --data-path" in message_of(lambda: open_features(str(copy)))


def test_scale_of_other_weights_is_refused(copy):
    save_tiny_vae(copy, seed=1)
    message = message_of(lambda: open_features(str(copy)))
    assert "made for weights" in message and "--fit" in message


def test_damaged_scale(copy):
    file = copy / module.SCALE_FILE
    file.write_bytes(file.read_bytes()[:100])
    assert "damaged" in message_of(lambda: open_features(str(copy)))


# ---- the command that measures the scale

def test_fit_command(copy, tmp_path, monkeypatch, capsys):
    """The scale comes from train_0 and val_0, never from test."""
    (copy / module.SCALE_FILE).unlink()
    names = [f"images/{p.name}" for p in save_images(NOISE, tmp_path / "root" / "images")]
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


# ---- networks of others

RESNET, VIT = "test_resnet.r160_in1k", "test_vit.r160_in1k"  # timm's own models for tests: 160 pixels, 1000 classes
PHOTO = np.random.default_rng(1).integers(0, 256, (4, 40, 40, 3), dtype=np.uint8).repeat(5, 1).repeat(5, 2)  # 200²


def timm_file(model, folder):
    """A file with random weights of a timm model."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = timm.create_model(model)
        for name, p in net.named_parameters():  # timm starts them so small that a position hardly counts
            p.data += (1.0 if name == "pos_embed" else 0.05) * torch.randn(p.shape)
    path = folder / f"{model}.safetensors"
    save_file({key: value.contiguous() for key, value in net.state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Model -> a file with its weights."""
    return {model: timm_file(model, tmp_path_factory.mktemp("weights")) for model in (RESNET, VIT)}


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Random weights of FID's network under the name of the published ones, where torch hub keeps them."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

    path = tmp_path_factory.mktemp("home") / "hub" / "checkpoints" / Path(URL_INCEPTION_V3).name
    path.parent.mkdir(parents=True)
    with torch.random.fork_rng(), pytest.MonkeyPatch.context() as patch:
        torch.manual_seed(0)
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, weights: None)  # as it is made
        net = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=saved({}, path))
    return saved(net.state_dict(), path)


def saved(weights, path):
    torch.save(weights, path)
    return path


def prepared_by_hand(images, side, size, mean, std, method="bicubic"):
    """Squares to this side, their centre, scaled: with Pillow and numpy alone -> (N, 3, size, size)."""
    edge = round((side - size) / 2)
    method = Image.Resampling[method.upper()]
    small = np.stack([np.asarray(Image.fromarray(image).resize((side, side), method)) for image in images])
    small = small[:, edge:edge + size, edge:edge + size]
    return torch.as_tensor((small / 255 - mean) / std, dtype=torch.float32).permute(0, 3, 1, 2)


IMAGENET = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))


def test_timm_features_are_those_before_the_classifier(files):
    space = open_features(f"timm:{RESNET}={files[RESNET]}")
    net = timm.create_model(RESNET, num_classes=0, pretrained=True, pretrained_cfg_overlay={"file": files[RESNET]})
    net.eval()
    config = timm.data.resolve_model_data_config(net)
    transform = timm.data.create_transform(**config)
    images = torch.stack([transform(Image.fromarray(image)) for image in PHOTO])
    values = space(PHOTO)
    assert values.dtype == np.float32 and values.shape == (4, space.dimensions)
    assert np.abs(values - net(images).detach().numpy()).max() < 1e-5 * np.abs(values).max()
    size, share = config["input_size"][1], config["crop_pct"]
    assert (space.name, size) == (f"timm:{RESNET}", 160)
    assert f"resized to {int(size / share)}, {config['interpolation']}, antialias; crop center 160 x 160" in \
        space.preprocessing
    by_hand = prepared_by_hand(PHOTO, int(size / share), 160, config["mean"], config["std"], config["interpolation"])
    assert torch.allclose(space.prepared(torch.as_tensor(PHOTO)), by_hand, atol=1e-5)


def test_batches_tensors_and_files_agree(files, tmp_path):
    space = open_features(f"timm:{RESNET}={files[RESNET]}")
    values = space(PHOTO)
    assert np.allclose(space(torch.as_tensor(PHOTO), batch_size=3), values, atol=1e-5)
    assert np.allclose(extract(space, save_images(PHOTO, tmp_path), 200, batch_size=3), values, atol=1e-5)
    assert len(np.unique(values.round(4), axis=0)) == 4


def test_real_and_generated_take_the_same_path(files, tmp_path):
    """A real image of another size is cropped first; from there on nothing tells it from a generated one."""
    space = open_features(f"timm:{RESNET}={files[RESNET]}")
    small = [Image.fromarray(image).resize((70, 50)) for image in PHOTO]
    cropped = np.stack([np.asarray(center_crop(image, 32)) for image in small])
    real = extract(space, save_images([np.asarray(image) for image in small], tmp_path / "real"), 32)
    assert np.array_equal(real, extract(space, save_images(cropped, tmp_path / "generated"), 32))


def test_dinov2_takes_the_whole_image_and_the_class_token(files, monkeypatch):
    """With a small ViT in its place, trained on 10 × 10 patches and seeing 6 × 6, as DINOv2 37 × 37 and 16 × 16."""
    assert backbones.DinoFeatures.size == 224
    monkeypatch.setattr(backbones.DinoFeatures, "model", VIT)
    monkeypatch.setattr(backbones.DinoFeatures, "size", 96)
    space = open_features(f"dinov2={files[VIT]}")
    config = timm.get_pretrained_cfg(VIT)
    prepared = prepared_by_hand(PHOTO, 96, 96, config.mean, config.std)
    assert torch.allclose(space.prepared(torch.as_tensor(PHOTO)), prepared, atol=1e-5)
    assert "resized to 96, bicubic, antialias; crop center 96 x 96; [0, 1]" in space.preprocessing
    net = timm.create_model(VIT, img_size=96, num_classes=0)
    weights = load_file(files[VIT])
    table = weights["pos_embed"]
    resampled = bicubic(table[0, 1:].reshape(10, 10, -1).double(), 6, 6.1 / 10)
    weights["pos_embed"] = torch.cat([table[0, :1], resampled.float().flatten(0, 1)])[None]
    net.load_state_dict({key: value for key, value in weights.items() if not key.startswith("head.")})
    assert np.allclose(space(PHOTO), net.eval()(prepared).detach().numpy(), atol=1e-4)
    assert space.name == "dinov2" and space.dimensions == net.num_features
    # the resampling of timm itself would have given something else
    overlay = {"file": files[VIT]}
    net.pos_embed.data = timm.create_model(VIT, img_size=96, pretrained=True, pretrained_cfg_overlay=overlay).pos_embed
    assert np.abs(space(PHOTO) - net(prepared).detach().numpy()).max() > 1e-2


def bicubic(table, size, scale):
    """(m, m, D) -> (size, size, D): Keys' cubic, a = −0.75, at (i + ½) / scale − ½, edges repeated; by the formula."""
    def weight(x):
        x, a = abs(x), -0.75
        return (a + 2) * x**3 - (a + 3) * x**2 + 1 if x <= 1 else a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0

    old = len(table)
    matrix = torch.zeros(size, old, dtype=torch.float64)
    for i in range(size):
        centre = (i + 0.5) / scale - 0.5
        for j in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            matrix[i, min(max(j, 0), old - 1)] += weight(centre - j)
    return torch.einsum("im,jn,mnd->ijd", matrix, matrix, table)


def test_clip_keeps_the_projection_and_nothing_is_cropped(files, monkeypatch):
    """`own_head`: the last layer is part of the embedding. Again with a small ViT."""
    monkeypatch.setattr(backbones.ClipFeatures, "model", VIT)
    monkeypatch.setattr(backbones.ClipFeatures, "size", 160)
    space = open_features(f"clip={files[VIT]}")
    config = timm.get_pretrained_cfg(VIT)
    prepared = prepared_by_hand(PHOTO, 160, 160, config.mean, config.std)
    assert config.crop_pct < 1  # which is not what CLIP does
    net = timm.create_model(VIT)
    net.load_state_dict(load_file(files[VIT]))
    assert space.dimensions == 1000
    assert np.allclose(space(PHOTO), net.eval()(prepared).detach().numpy(), atol=1e-4)


def test_what_timm_says_of_the_published_networks():
    """Normalisation, filter and last layer come from timm; these are DINOv2's, and CLIP's own."""
    dino = timm.get_pretrained_cfg(backbones.DinoFeatures.model)
    assert (dino.mean, dino.std, dino.interpolation, dino.num_classes) == (*map(tuple, IMAGENET), "bicubic", 0)
    clip = timm.get_pretrained_cfg(backbones.ClipFeatures.model)
    assert (clip.interpolation, clip.num_classes, clip.input_size[1]) == ("bicubic", 512, 224)
    assert np.allclose(clip.mean, (0.48145466, 0.4578275, 0.40821073))
    assert np.allclose(clip.std, (0.26862954, 0.26130258, 0.27577711))
    assert "quickgelu" in backbones.ClipFeatures.model and "quickgelu" not in str(clip.hf_hub_id)


def test_inception_is_torch_fidelitys(inception_file, monkeypatch):
    """Found where torch hub keeps it; its hash is not that of its name, which only fetch_assets.py minds."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    monkeypatch.setenv("TORCH_HOME", str(inception_file.parents[2]))
    space = open_features("inception")
    net = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(inception_file))
    images = PHOTO[:2, :150]  # not square: 150 × 200
    (expected,) = net(torch.as_tensor(images).permute(0, 3, 1, 2))
    values = space(images, batch_size=1)
    assert values.shape == (2, 2048) and space.dimensions == 2048
    assert np.abs(values - expected.numpy()).max() < 1e-4 * expected.abs().max()
    assert np.abs(values[0] - values[1]).max() > 1e-2 * np.abs(values).max()
    assert space.identity == open_features(f"inception={inception_file}").identity


def test_a_wrong_file_is_one_line(files, tmp_path):
    junk = tmp_path / "junk.pth"
    junk.write_bytes(b"junk")
    assert f"{junk} does not hold the weights" in message_of(lambda: open_features(f"inception={junk}"))
    other = saved(load_file(files[VIT]), tmp_path / "other.pth")
    assert "does not hold the weights" in message_of(lambda: open_features(f"inception={other}"))
    assert "does not hold the weights" in message_of(lambda: open_features(f"timm:{RESNET}={other}"))
    for name in ("inception", "dinov2", "clip", f"timm:{RESNET}"):
        assert f"--features {name}=absent" in message_of(lambda name=name: open_features(f"{name}=absent"))
        assert "after `=`" in message_of(lambda name=name: open_features(f"{name}="))
    assert "timm:no_net" in message_of(lambda: open_features("timm:no_net"))


class Malicious:
    """Pickled, a file that makes another file when it is read as torch-fidelity reads it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_file_of_weights_runs_no_code(tmp_path):
    file = saved(Malicious(tmp_path / "made"), tmp_path / "weights.pth")
    for name in ("inception", f"timm:{RESNET}"):
        assert "does not hold the weights" in message_of(lambda name=name: open_features(f"{name}={file}"))
    assert not (tmp_path / "made").exists()


def test_missing_weights_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name, asset in (("inception", "inception"), ("dinov2", "dinov2"), ("clip", "clip"), (f"timm:{VIT}",) * 2):
        message = message_of(lambda name=name: open_features(name))
        assert message.startswith(f"--features {name}: ") and "--features retina" in message
        assert f"python fetch_assets.py --to DIR --only {asset}`, then give --assets DIR" in message


def test_published_names():
    assert set(PUBLISHED) == {"dino", "inception", "clip"} and set(PUBLISHED.values()) <= set(SPACES)


def test_identity_follows_weights_and_preprocessing(files, tmp_path, monkeypatch):
    first = open_features(f"timm:{RESNET}={files[RESNET]}")
    renamed = shutil.copy(files[RESNET], tmp_path / "renamed.safetensors")
    assert open_features(f"timm:{RESNET}={renamed}").identity == first.identity
    weights = load_file(renamed)
    save_file(weights | {"fc.bias": weights["fc.bias"] + 1e-6}, renamed)
    other = open_features(f"timm:{RESNET}={renamed}").identity
    monkeypatch.setattr(backbones.TimmFeatures, "size", 96)
    smaller = open_features(f"timm:{RESNET}={files[RESNET]}").identity
    assert len({first.identity, other, smaller}) == 3
    assert smaller.rpartition(":")[0] == first.identity.rpartition(":")[0]


def test_every_space_says_what_it_does_with_an_image(vae, files, inception_file):
    spaces = [open_features(name) for name in (vae, f"timm:{RESNET}={files[RESNET]}", f"inception={inception_file}")]
    assert len({space.preprocessing for space in spaces}) == 3
    assert all("uint8 RGB" in space.preprocessing and "\n" not in space.preprocessing for space in spaces)


def test_checkpoint_of_a_classifier(tmp_path, monkeypatch):
    """Any FILE.pt goes through classification.network, whatever that makes of it."""
    path = tmp_path / "best.pt"
    path.write_bytes(b"")
    asked = []

    def load_classifier(name, device, flag):
        asked.append((name, device, flag))
        return SimpleNamespace(identity="abc", dimensions=3, image_size=64, features=lambda images, batch_size:
                               images.mean((1, 2)).astype(np.float32))

    stand_in = ModuleType("classification.network")
    stand_in.load_classifier = load_classifier
    monkeypatch.setitem(sys.modules, "classification.network", stand_in)
    space = open_features(str(path), "cpu")
    assert asked == [(str(path), "cpu", "--features")] and space.name == "classifier:best" and "abc" in space.identity
    assert np.allclose(space(torch.as_tensor(PHOTO)), PHOTO.mean((1, 2))) and space.dimensions == 3
    assert "64 x 64" in space.preprocessing
    assert "no such space" in message_of(lambda: open_features(str(tmp_path / "absent.pt")))


# ---- the cache on disk

class Means:
    """A feature space of three numbers: the mean of each channel."""

    identity, preprocessing, dimensions = "means:1", "none", 3

    def __call__(self, images, batch_size=32):
        return images.mean((1, 2)).astype(np.float32)


def unreadable(*arguments):
    raise AssertionError("an image was opened")


def test_a_hit_opens_no_image_and_changes_no_bit(tmp_path, monkeypatch):
    paths, cache = save_images(NOISE, tmp_path / "images"), tmp_path / "cache"
    values = extract(Means(), paths, 32, cache=cache)
    assert np.array_equal(values, extract(Means(), paths, 32)) and len(list(cache.iterdir())) == 1
    moved = save_images(NOISE, tmp_path / "elsewhere")  # the bytes count, not the names
    monkeypatch.setattr(module, "load_images", unreadable)
    assert np.array_equal(extract(Means(), moved, 32, batch_size=5, cache=cache), values)


@pytest.mark.parametrize("change", ["order", "subset", "content", "space", "size"])
def test_anything_else_is_a_miss(tmp_path, change):
    paths, cache, space, size = save_images(NOISE, tmp_path / "images"), tmp_path / "cache", Means(), 32
    extract(space, paths, size, cache=cache)
    if change == "order":
        paths = paths[::-1]
    elif change == "subset":
        paths = paths[1:]
    elif change == "content":
        Image.fromarray(255 - NOISE[3]).save(paths[3])
    elif change == "space":
        space.identity = "means:2"
    else:
        size = 16
    assert np.array_equal(extract(space, paths, size, cache=cache), extract(space, paths, size))
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("harm", ["cut", "flip", "foreign"])
def test_a_damaged_cache_is_an_error(tmp_path, harm):
    paths, cache = save_images(NOISE, tmp_path / "images"), tmp_path / "cache"
    extract(Means(), paths, 32, cache=cache)
    (file,) = cache.iterdir()
    data = file.read_bytes()
    if harm == "foreign":
        save_file({"features": torch.zeros(12, 3)}, file)
    else:
        file.write_bytes(data[:-4] if harm == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    message = message_of(lambda: extract(Means(), paths, 32, cache=cache))
    assert str(file) in message and "remove the file" in message


def test_a_failure_leaves_no_cache_file(tmp_path):
    paths, cache = save_images(NOISE, tmp_path / "images"), tmp_path / "cache"
    paths[7].write_bytes(b"no image")
    assert str(paths[7]) in message_of(lambda: extract(Means(), paths, 32, batch_size=4, cache=cache))
    assert not list(cache.iterdir())
    (tmp_path / "file").write_text("")
    assert "feature cache" in message_of(lambda: extract(Means(), paths, 32, cache=tmp_path / "file"))


def test_one_batch_of_images_at_a_time(tmp_path, monkeypatch):
    """When a batch is read, nothing of the one before is left."""
    paths, seen, real = save_images(NOISE, tmp_path), [], module.load_images

    def load(batch, size):
        assert not [reference for reference in seen if reference() is not None]
        images = real(batch, size)
        seen.append(weakref.ref(images))
        return images

    monkeypatch.setattr(module, "load_images", load)
    extract(Means(), paths, 32, batch_size=5)
    assert len(seen) == 3
