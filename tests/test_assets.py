"""core/assets.py and fetch_assets.py: published weights, found without a network; collected and checked.

The network is a server in this process that answers as Hugging Face and as a plain web server do.
"""

import hashlib
import os
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import diffusers
import huggingface_hub as hub
import pytest
import timm
import torch
from conftest import call_script
from helpers import message_of
from huggingface_hub import constants
from safetensors.torch import save_file

import fetch_assets
from core import assets
from core.cli import Parser
from core.tensors import weights_hash
from dataset.vae import open_codec

TINY = "test_resnet.r160_in1k"  # timm's own model for tests, 0.5 M parameters
REVISION = "0123456789abcdef0123456789abcdef01234567"
NETWORK = ((hub, "hf_hub_download", hub.hf_hub_download), (urllib.request, "urlopen", urllib.request.urlopen))


@pytest.fixture(autouse=True)
def own_caches(monkeypatch, tmp_path):
    """Caches of this test alone, and everything that `use` sets put back after it."""
    for name in ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home" / "torch"))
    for name, value in (("HF_HOME", "home"), ("HF_HUB_CACHE", "home/hub"), ("HUGGINGFACE_HUB_CACHE", "home/hub")):
        monkeypatch.setattr(constants, name, str(tmp_path / value))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for module, name, _ in NETWORK:
        monkeypatch.setattr(module, name, no_network)


def no_network(*arguments, **options):
    raise OSError("a test asked the network")


def in_hub(folder, repository, write):
    """Put files into a folder of assets as Hugging Face's cache lays them out; `write(snapshot folder)`."""
    place = folder / assets.HUB / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(REVISION)
    snapshot = place / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    write(snapshot)
    return snapshot


def tiny_vae(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return diffusers.AutoencoderKL(block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2,
                                       up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=2)


def tiny_weights(seed=0):
    """Random weights of TINY, as a state dict."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return timm.create_model(TINY).state_dict()


# ---- the registry

def test_sources_are_those_of_the_libraries():
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    from torchvision.models import AlexNet_Weights

    assert assets.ASSETS["inception"].source == URL_INCEPTION_V3
    assert assets.ASSETS["inception"].hash_prefix == "6726825d"
    assert assets.ASSETS["alexnet"].source == AlexNet_Weights.IMAGENET1K_V1.url
    assert assets.ASSETS["alexnet"].hash_prefix == "7be5be79"
    for name, model in (("dinov2", "vit_base_patch14_dinov2.lvd142m"), ("resnet50", "resnet50.tv_in1k"),
                        ("clip", "vit_base_patch32_clip_quickgelu_224.openai")):
        assert assets.timm_asset(model) is assets.ASSETS[name]
        assert timm.get_pretrained_cfg(model).hf_hub_filename is None  # so it is model.safetensors


def test_heads_of_lpips_come_with_the_package():
    import lpips

    assert (Path(lpips.__file__).parent / "weights" / "v0.1" / "alex.pth").is_file()


def test_names():
    assert assets.find("vae-mse").source == "stabilityai/sd-vae-ft-mse"
    assert assets.find(f"timm:{TINY}").source == f"timm/{TINY}"
    assert "expected vae-ema, vae-mse" in message_of(lambda: assets.find("vae"))
    assert "has no such model; it has resnet50." in message_of(lambda: assets.find("timm:resnet50.nowhere"))
    assert "has no such model" in message_of(lambda: assets.find("timm:nothing"))
    untrained = next(model for model in timm.list_models("resnet*") if not timm.is_model_pretrained(model))
    assert "timm has no weights of this model" in message_of(lambda: assets.find(f"timm:{untrained}"))


# ---- one folder for all libraries

def test_diffusers_takes_its_weights_from_the_folder(tmp_path):
    """Two VAEs of one format; each name gets its own."""
    for name, seed in (("ema", 1), ("mse", 2)):
        in_hub(tmp_path, f"stabilityai/sd-vae-ft-{name}", tiny_vae(seed).save_pretrained)
    assets.use(tmp_path)
    for name, seed in (("ema", 1), ("mse", 2)):
        assert open_codec(name).identity == f"{name}:{weights_hash(tiny_vae(seed))}:x0.18215"
    # and so does diffusers by itself, although huggingface_hub was imported long before
    assert weights_hash(diffusers.AutoencoderKL.from_pretrained("stabilityai/sd-vae-ft-mse")) == \
        weights_hash(tiny_vae(2))


def test_damaged_vae_in_the_folder(tmp_path):
    snapshot = in_hub(tmp_path, "stabilityai/sd-vae-ft-ema", tiny_vae(1).save_pretrained)
    (snapshot / assets.DIFFUSERS[1]).write_bytes(b"no tensors")
    assets.use(tmp_path)
    assert "--vae ema: not a diffusers AutoencoderKL folder" in message_of(lambda: open_codec("ema"))


def test_timm_takes_its_weights_from_the_folder(tmp_path):
    weights = tiny_weights()
    in_hub(tmp_path, f"timm/{TINY}", lambda snapshot: save_file(weights, snapshot / assets.WEIGHTS))
    assets.use(tmp_path)
    for net in (assets.open_timm(TINY), timm.create_model(TINY, pretrained=True)):  # ours, and timm by itself
        assert all(torch.equal(value, weights[key]) for key, value in net.state_dict().items())
    net = assets.open_timm(TINY)
    assert not net.training and not any(p.requires_grad for p in net.parameters())


def test_torch_hub_takes_its_weights_from_the_folder(tmp_path):
    asset = assets.ASSETS["alexnet"]
    file = tmp_path / assets.CHECKPOINTS / "alexnet-owt-7be5be79.pth"
    file.parent.mkdir(parents=True)
    torch.save({"x": torch.ones(2)}, file)
    assets.use(tmp_path)
    assert assets.weights_file(asset, "LPIPS") == file
    assert torch.hub.load_state_dict_from_url(asset.source)["x"].tolist() == [1, 1]


def test_missing_weights_are_reported_without_a_question(tmp_path):
    """With --assets nobody asks the network (the autouse fixture would raise something else)."""
    assets.use(tmp_path)
    for call, source, name in ((lambda: open_codec("ema"), "stabilityai/sd-vae-ft-ema", "vae-ema"),
                               (lambda: assets.open_timm(TINY), f"timm/{TINY}", f"timm:{TINY}"),
                               (lambda: assets.weights_file(assets.ASSETS["alexnet"], "L"), "https://", "alexnet")):
        message = message_of(call)
        assert source in message and str(tmp_path) in message and "--assets DIR" in message
        assert f"python fetch_assets.py --to DIR --only {name}" in message
    assert "--vae retina" in message_of(lambda: open_codec("ema"))


def test_files_that_do_not_fit_a_timm_model(tmp_path):
    weights = tiny_weights()
    some = tmp_path / "some.safetensors"
    save_file(dict(list(weights.items())[:-2]), some)  # without the classifier: timm would keep random numbers
    assert f"{some} does not hold the weights of timm's {TINY}" in message_of(lambda: assets.open_timm(TINY, some))
    (tmp_path / "junk.pth").write_bytes(b"junk")
    assert "does not hold" in message_of(lambda: assets.open_timm(TINY, tmp_path / "junk.pth"))
    assert "no such file" in message_of(lambda: assets.open_timm(TINY, tmp_path / "absent.pth"))
    torch.save(weights, tmp_path / "whole.pth")
    assert weights_hash(assets.open_timm(TINY, tmp_path / "whole.pth")) == weights_hash(assets.open_timm(
        TINY, save_as(weights, tmp_path / "whole.safetensors")))


def save_as(weights, path):
    save_file(weights, path)
    return path


def test_opening_draws_nothing_from_the_global_stream(tmp_path):
    file = save_as(tiny_weights(), tmp_path / "w.safetensors")
    before = torch.random.get_rng_state()
    assets.open_timm(TINY, file)
    assert torch.equal(torch.random.get_rng_state(), before)


# ---- the flag

def test_flag_acts_and_leaves_no_setting(tmp_path):
    p = Parser("text")
    p.add_argument("--a", help="h")
    assert vars(p.parse_args(["--a", "1", "--assets", str(tmp_path)])) == {"a": "1"}
    assert constants.HF_HUB_OFFLINE and str(tmp_path / "huggingface" / "hub") == constants.HF_HUB_CACHE
    assert os.environ["HF_HUB_CACHE"] == constants.HF_HUB_CACHE and os.environ["HF_HUB_OFFLINE"] == "1"
    assert torch.hub.get_dir() == str(tmp_path / "torch" / "hub")
    assert os.environ["HF_HOME"] == constants.HF_HOME == str(tmp_path / "huggingface")


def test_flag_names_no_folder(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        Parser("text").parse_args(["--assets", str(tmp_path / "absent")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and len(error.splitlines()) == 1
    assert "no such folder" in error and "fetch_assets.py --to" in error


# ---- the network

class Server(ThreadingHTTPServer):
    """Serves `files` (address -> bytes); `asked` are the addresses whose contents were sent."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.asked = {}, []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def publish(self, repository, **files):
        for name, data in files.items():
            self.files[f"/{repository}/resolve/main/{name.replace('__', '.')}"] = data


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self):
        data = self.server.files.get(self.path)
        self.send_response(404 if data is None else 200)
        self.send_header("Content-Length", str(len(data or b"")))
        if data is not None:
            self.send_header("X-Repo-Commit", REVISION)
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.end_headers()
        return data

    def do_GET(self):
        self.server.asked.append(self.path)
        self.wfile.write(self.do_HEAD() or b"")

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    for module, name, real in NETWORK:
        monkeypatch.setattr(module, name, real)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    torch_file = b"weights" * 1000
    prefix = hashlib.sha256(torch_file).hexdigest()[:8]
    server.files[f"/net-{prefix}.pth"] = torch_file
    server.publish("some/vae", config__json=b"{}", w__safetensors=b"v" * 5000)
    monkeypatch.setattr(assets, "ASSETS", {asset.name: asset for asset in (
        assets.Asset("vae", "some/vae", ("config.json", "w.safetensors"), "train.py: --vae x", "MIT", 1),
        assets.Asset("net", f"{server.url}/net-{prefix}.pth", (), "evaluate.py: --net", "MIT", 1))})
    yield server
    server.shutdown()
    server.server_close()


def fetched(folder):
    """name -> the weights file of each asset in a folder."""
    entries = fetch_assets.read_checksums(folder)
    return {name: [folder / path for path in entry["files"]] for name, entry in entries.items()}


def test_fetch_then_check(server, tmp_path, capsys):
    folder = tmp_path / "w"
    assert call_script("fetch_assets.py", "--check", tmp_path).returncode == 1
    fetch_assets.fetch(folder)
    entries = fetch_assets.read_checksums(folder)
    snapshot = f"huggingface/hub/models--some--vae/snapshots/{REVISION}"
    assert entries["vae"]["revision"] == REVISION and entries["vae"]["source"] == "some/vae"
    assert entries["vae"]["files"][f"{snapshot}/w.safetensors"] == {
        "sha256": hashlib.sha256(b"v" * 5000).hexdigest(), "bytes": 5000}
    assert set(entries["vae"]["files"]) == {f"{snapshot}/w.safetensors", f"{snapshot}/config.json",
                                            "huggingface/hub/models--some--vae/refs/main"}
    (name,) = entries["net"]["files"]
    assert name == "torch/hub/checkpoints/" + assets.ASSETS["net"].source.rpartition("/")[2]
    capsys.readouterr()
    assert fetch_assets.check(folder) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "complete"
    assets.use(folder)
    fetch_assets.fetch(folder)  # nothing is left to do, so it needs no network
    assert [assets.cached(asset) for asset in assets.ASSETS.values()] == [
        folder / snapshot / "w.safetensors", folder / name]


@pytest.mark.parametrize("asset, place, command", [("vae", 1, "train.py: --vae x"), ("net", 0, "evaluate.py: --net")])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_check_finds_what_is_damaged_and_fetch_mends_it(server, tmp_path, capsys, asset, place, command, harm):
    fetch_assets.fetch(tmp_path)
    file = fetched(tmp_path)[asset][place]
    data = file.read_bytes()
    if harm == "remove":
        file.unlink()
    else:
        file.write_bytes(b"x" + data[1:] if harm == "flip" else data[:-1])
    capsys.readouterr()
    assert fetch_assets.check(tmp_path) == 1
    out = capsys.readouterr().out
    state = "missing" if harm == "remove" else "damaged"
    assert f"{state}: {file.relative_to(tmp_path)}" in out
    assert f"without {asset}, what does not work: {command}" in out
    assert out.splitlines()[-1] == f"get it: python fetch_assets.py --to {tmp_path} --only {asset}"
    other = next(name for name in assets.ASSETS if name != asset)
    assert fetch_assets.check(tmp_path, [other]) == 0
    fetch_assets.fetch(tmp_path, [asset])
    assert file.read_bytes() == data and fetch_assets.check(tmp_path) == 0


def test_fetch_goes_on_after_a_failure(server, tmp_path):
    """The second file fails; the first is entered, and is not fetched again."""
    address, data = next((a, d) for a, d in server.files.items() if a.startswith("/net"))
    server.files[address] = b"something else"  # does not have the hash of its name
    message = message_of(lambda: fetch_assets.fetch(tmp_path))
    assert assets.ASSETS["net"].source in message and "invalid hash value" in message
    assert set(fetched(tmp_path)) == {"vae"}
    assert not list((tmp_path / assets.CHECKPOINTS).iterdir())
    server.files[address], asked = data, len(server.asked)
    fetch_assets.fetch(tmp_path)
    assert server.asked[asked:] == [address] and set(fetched(tmp_path)) == {"vae", "net"}


def test_a_file_that_is_not_what_its_name_says_is_not_entered(server, tmp_path):
    file = tmp_path / assets.CHECKPOINTS / assets.ASSETS["net"].source.rpartition("/")[2]
    file.parent.mkdir(parents=True)
    file.write_bytes(b"left by another program")
    assert "damaged" in message_of(lambda: fetch_assets.fetch(tmp_path, ["net"]))
    assert not (tmp_path / "checksums.json").exists()


def test_no_network_is_one_line_and_no_folder(server, tmp_path):
    server.shutdown()
    server.server_close()
    message = message_of(lambda: fetch_assets.fetch(tmp_path / "w"))
    assert f"--to {tmp_path / 'w'}: {server.url}" in message and "does not answer" in message
    assert not (tmp_path / "w").exists()


def test_weights_come_from_the_network_into_the_cache(server, tmp_path):
    for asset, data in ((assets.ASSETS["vae"], b"v" * 5000), (assets.ASSETS["net"], b"weights" * 1000)):
        file = assets.weights_file(asset, "--flag")
        assert file.read_bytes() == data and file.is_relative_to(tmp_path)
        assert (file.parent / "config.json").is_file() == (asset.name == "vae")
        asked = len(server.asked)
        assert assets.weights_file(asset, "--flag") == file and len(server.asked) == asked


def test_a_server_that_answers_is_reached(server, monkeypatch):
    assert assets.reachable(f"{server.url}/nothing/here")  # 404 is an answer
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not assets.reachable(server.url)


def test_damaged_checksums(tmp_path):
    (tmp_path / "checksums.json").write_text("{")
    assert "checksums.json: damaged" in message_of(lambda: fetch_assets.check(tmp_path))


def test_extra_weights_are_checked_too(server, tmp_path, capsys):
    name = f"timm:{TINY}"
    server.publish(f"timm/{TINY}", model__safetensors=b"t" * 100)
    fetch_assets.fetch(tmp_path, ["vae", "net", name])
    assert fetch_assets.check(tmp_path) == 0 and name in capsys.readouterr().out
    fetched(tmp_path)[name][0].write_bytes(b"u" * 100)
    assert fetch_assets.check(tmp_path) == 1


def test_scripts_exit_codes(tmp_path):
    done = call_script("fetch_assets.py", "--check", tmp_path)
    assert done.returncode == 1 and "without dinov2, what does not work: evaluate.py" in done.stdout
    done = call_script("fetch_assets.py", "--check", tmp_path / "absent")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    done = call_script("fetch_assets.py", "--to", tmp_path / "w", "--assets", tmp_path)
    assert done.returncode == 2 and "network is off" in done.stderr and not (tmp_path / "w").exists()
