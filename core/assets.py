"""Published weights: which there are, where they lie, how they are found without a network; a hash of any weights.

A folder of `fetch_assets.py` has the libraries' own layouts: huggingface/hub is a Hugging Face cache, and
torch/hub/checkpoints is torch hub's. `use(folder)` (the flag `--assets` of every command) makes all libraries look
only there. Otherwise their usual caches are used, and what is missing is fetched if there is a network.
The heads of LPIPS (7 kB) need no file of their own: the package `lpips` brings them along.
"""

import os
import re
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub as hub
import torch
from huggingface_hub import constants

from core import efficientnet_lite
from core.errors import UserError, first_line

HUB, CHECKPOINTS = Path("huggingface", "hub"), Path("torch", "hub", "checkpoints")  # inside a folder of assets
WEIGHTS = "model.safetensors"  # as timm calls them in its repositories
DIFFUSERS = ("config.json", "diffusion_pytorch_model.safetensors")


@dataclass(frozen=True)
class Asset:
    """Published weights: `files` of the Hugging Face repository `source`, or (no files) the file at the URL `source`.

    The last of the files holds the weights. `converted`: `source` is a package of the Python package index, of whose
    weights the file of this name is made (core/efficientnet_lite.py).
    """

    name: str
    source: str
    files: tuple
    needed_by: str
    licence: str
    megabytes: int | None = None  # about; None = unknown
    converted: str = ""

    @property
    def server(self):
        """The address that is asked for it; None: pip's package index, which pip's own settings name."""
        return constants.ENDPOINT if self.files else None if self.converted else self.source

    @property
    def file_name(self):
        """What its file is called in torch hub's folder (no files)."""
        return self.converted or Path(self.source).name

    @property
    def hash_prefix(self):
        """First digits of the SHA-256 of a torch hub file, which its name ends with; None where there are none."""
        digits = Path(self.source).stem.rpartition("-")[2]
        return digits if not self.files and re.fullmatch("[0-9a-f]{8,}", digits) else None


ASSETS = {asset.name: asset for asset in (
    Asset("vae-ema", "stabilityai/sd-vae-ft-ema", DIFFUSERS,
          "extract_features.py, train.py, sample_ddp.py, sample_ddp_val.py: --vae ema (default)", "MIT", 335),
    Asset("vae-mse", "stabilityai/sd-vae-ft-mse", DIFFUSERS,
          "extract_features.py, train.py, sample_ddp.py, sample_ddp_val.py: --vae mse", "MIT", 335),
    # TensorFlow's network of 2015, converted: the one that FID and KID are defined with
    Asset("inception", "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
          "weights-inception-2015-12-05-6726825d.pth", (),
          "evaluate.py: --features inception, --gg-extractor inception", "Apache-2.0", 96),
    Asset("alexnet", "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", (),
          "evaluate.py: LPIPS", "BSD-3-Clause", 244),
    Asset("dinov2", "timm/vit_base_patch14_dinov2.lvd142m", (WEIGHTS,),
          "evaluate.py: --features dinov2, --gg-extractor dino", "Apache-2.0", 346),
    Asset("clip", "timm/vit_base_patch32_clip_224.openai", (WEIGHTS,),
          "evaluate.py: --features clip, --gg-extractor clip", "MIT (OpenAI)", 352),
    # torchvision's first ImageNet weights, as in the same group's classifier of these data (FDDM, MICCAI 2023)
    Asset("resnet50", "timm/resnet50.tv_in1k", (WEIGHTS,), "classify.py: --pretrained (default)", "BSD-3-Clause", 102),
    Asset("imagenet-lite", efficientnet_lite.REQUIREMENT, (),
          f"evaluate.py, train.py: --features imagenet-lite; classify.py: --backbone {efficientnet_lite.MODEL}",
          "Apache-2.0 (a file in the package; its metadata names none)", 19, efficientnet_lite.FILE),
)}


def use(folder):
    """From now on, look for published weights only in this folder: the libraries' caches, and no network.

    Raises UserError if there is no such folder.
    """
    folder = Path(folder).resolve()
    if not folder.is_dir():
        raise UserError(f"--assets {folder}: no such folder; make it on a machine with a network: "
                        f"python fetch_assets.py --to {folder.name}")
    home, cache, torch_home = (str(folder / place) for place in (HUB.parent, HUB, CHECKPOINTS.parts[0]))
    # For libraries that are imported later, and for worker processes.
    os.environ.update(HF_HOME=home, HF_HUB_CACHE=cache, HF_HUB_OFFLINE="1", TORCH_HOME=torch_home)
    # huggingface_hub has read its environment already, when it was imported.
    constants.HF_HOME, constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = home, cache, True
    constants.HUGGINGFACE_HUB_CACHE = constants.HF_HUB_CACHE  # its older name, which diffusers has used


def find(name):
    """The asset called `name`, one of ASSETS or timm:MODEL. Raises UserError."""
    if name.startswith("timm:"):
        return timm_asset(name.removeprefix("timm:"))
    if name not in ASSETS:
        raise UserError(f"no weights are called {name}; expected {', '.join(ASSETS)} or timm:MODEL")
    return ASSETS[name]


def timm_asset(model):
    """Where the weights of a timm model are published: a row of ASSETS, or one like it. Raises UserError.

    `tf_efficientnet_lite0` are those of the package index, which more machines reach; with its tag,
    `tf_efficientnet_lite0.in1k`, those that timm publishes.
    """
    config = timm_config(model)
    if model == efficientnet_lite.MODEL:
        return ASSETS["imagenet-lite"]
    source, files = config.hf_hub_id, (config.hf_hub_filename or WEIGHTS,)
    if not source:
        source, files = config.url, ()
    if not source:
        raise UserError(f"timm:{model}: timm has no weights of this model; choose another or name a file of weights")
    known = [asset for asset in ASSETS.values() if asset.source == source]
    return known[0] if known else Asset(f"timm:{model}", source, files, f"--features or --backbone {model}",
                                        config.license or "unknown")


def timm_config(model):
    """timm's description of the pretrained weights of a model. Raises UserError for one that it does not have."""
    import timm  # here, see open_timm

    try:
        config = timm.is_model(model) and timm.get_pretrained_cfg(model)
    except (RuntimeError, ValueError):  # the model exists, but not with these weights
        config = None
    if not config:
        like = ", ".join(timm.list_models(f"{model.partition('.')[0]}*", pretrained=True)[:5])
        raise UserError(f"timm:{model}: timm {timm.__version__} has no such model"
                        f"{f'; it has {like}' if like else ''}")
    return config


def open_timm(model, file=None, flag="--features", instead="", **options):
    """A timm model with its published weights, in eval mode on the CPU, classifier and all.

    `file`: weights to take instead of the published ones; `options` are timm.create_model's. Raises UserError,
    also where the file lacks some of the weights. For another number of classes call `reset_classifier` afterwards:
    asked for here, timm would leave random weights in the classifier.
    """
    timm_config(model)  # there is such a model
    file = existing(file, flag) if file else weights_file(timm_asset(model), flag, instead)
    import timm  # here, so that those who do without it do not wait for it

    try:
        with torch.random.fork_rng(devices=[]):  # the initialisation, which the weights replace, draws from there
            net = timm.create_model(model, pretrained=True, pretrained_cfg_overlay={"file": str(file)}, **options)
    except Exception as error:  # whatever a pickle, safetensors or the model's own loader finds wrong
        raise UserError(f"{flag}: {file} does not hold the weights of timm's {model} ({first_line(error)}); "
                        "fetch or name another file") from None
    return net.eval().requires_grad_(False)


def existing(file, flag):
    """The path of a file of weights that a flag names. Raises UserError."""
    if not Path(file).is_file():
        raise UserError(f"{flag}: {file}: no such file, expected weights")
    return Path(file)


def weights_file(asset, flag, instead=""):
    """The path of the weights of an asset: from the cache, or else from the network into the cache.

    `flag` names in the error what asked for it, `instead` (", or ...") a way to do without. Raises UserError at
    once if it is not there and the network is off or does not answer: the libraries would ask for a minute.
    """
    file = cached(asset)
    if file is not None:
        return file
    place = constants.HF_HUB_CACHE if asset.files else checkpoints()
    missing = (f"{flag}: {asset.source} is not in {place}, and the network is off or does not answer; on a machine "
               f"with a network run `python fetch_assets.py --to DIR --only {asset.name}`, then give --assets DIR "
               f"here{instead}")
    if not reachable(asset.server):
        raise UserError(missing)
    return download(asset, constants.HF_HUB_CACHE, checkpoints())


def cached(asset):
    """The path of the weights of an asset if all its files are in the cache; else None."""
    if not asset.files:
        file = checkpoints() / asset.file_name
        return file if file.is_file() else None
    paths = [hub.try_to_load_from_cache(asset.source, name, cache_dir=constants.HF_HUB_CACHE)
             for name in asset.files]
    return Path(paths[-1]) if all(isinstance(path, str) for path in paths) else None


def checkpoints():
    """Torch hub's folder of weights."""
    return Path(torch.hub.get_dir()) / CHECKPOINTS.name


def reachable(url):
    """Whether the network may be used and this address answers: one request, of at most 10 seconds.

    None is the package index: only pip knows where it is, so pip is left to find out.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    if url is None:
        return True
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=10).close()
    except urllib.error.HTTPError:
        return True  # it answered
    except OSError:
        return False
    return True


def download(asset, hub_cache, checkpoint_folder):
    """Fetch the files of an asset that are not there yet; each appears when it is whole -> path of the weights.

    An interrupted download from Hugging Face goes on where it stopped; one from another server starts again.
    """
    try:
        if asset.files:
            paths = [hub.hf_hub_download(asset.source, name, cache_dir=hub_cache) for name in asset.files]
            return Path(paths[-1])
        file = Path(checkpoint_folder) / asset.file_name
        if not file.is_file() and asset.converted:
            efficientnet_lite.fetch(file)
        elif not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(asset.source, str(file), asset.hash_prefix)
        return file
    except UserError:  # of efficientnet_lite, which says what is wrong and what to do
        raise
    except Exception as error:  # of urllib, httpx, requests or Hugging Face, depending on its version
        raise UserError(f"{asset.source}: cannot be fetched ({first_line(error)}); try again") from None
