"""What several test modules need: made images and features, small networks, and the commands of the documentation."""

import importlib
import json
import re
import shlex
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from core.cli import Parser
from core.errors import UserError

GOLDEN_METRICS = json.loads((Path(__file__).parent / "reference_metrics.json").read_text())


# ---- errors


def message_of(call):
    """The message, one line, of the UserError that `call()` raises."""
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- images and features


def noise_images(n, seed=0, size=16):
    """uint8 (n, size, size, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def save_images(images, folder):
    """Write images as FOLDER/000000.png, ... -> their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:06d}.png" for i in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    return paths


def gaussian(seed, n, d=8, shift=0.0):
    """Features (n, d) of a normal distribution, float32."""
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32) + np.float32(shift)


def classified_set():
    """Probabilities and labels (n, K) of the reference values of classification (computed once, by other code)."""
    golden = GOLDEN_METRICS["classification"]
    r = np.random.RandomState(golden["seed"])
    shape = golden["n"], golden["classes"]
    y = (r.rand(*shape) < np.linspace(0.05, 0.5, shape[1])).astype(float)
    return 1 / (1 + np.exp(-(1.5 * r.standard_normal(shape) + 2 * y - 1.5))), y


# ---- networks


class PassThrough(torch.nn.Module):
    """A feature extractor, as torchmetrics wants it, whose images are features already."""

    num_features = 8

    def forward(self, x):
        return x


def save_tiny_vae(folder, seed=0):
    """An untrained autoencoder in diffusers' format."""
    from train_vae import build

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        build((4, 4, 8, 8)).save_pretrained(folder)


def save_alexnet(path, seed):
    """AlexNet's weights as torchvision has them, random; those that LPIPS does not use are one stored number."""
    from torchvision.models import alexnet

    with torch.device("meta"):
        shapes = {key: value.shape for key, value in alexnet().state_dict().items()}
    draw = torch.Generator().manual_seed(seed)
    weights = {}
    for key, shape in shapes.items():
        if key.startswith("classifier"):
            weights[key] = torch.zeros(()).expand(shape)
        else:
            gain = (2 / np.prod(shape[1:])) ** 0.5 if len(shape) > 1 else 0.1
            weights[key] = gain * torch.randn(shape, generator=draw)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(weights, path)


# ---- commands


class Parsed(Exception):
    """Thrown out of a script as soon as it knows its flags: (parser, flags)."""


def parse(script, arguments):
    """What the script itself makes of these arguments: its parser, and the flags as a dict. Nothing runs.

    Arguments None: its parser alone.
    """
    # A package that torch-fidelity installs is called `tests` too; what lies in ours is imported from its folder.
    module, real = importlib.import_module(script.removeprefix("tests.")), Parser.parse_args

    def stop(parser):
        raise Parsed(parser, None if arguments is None else vars(real(parser)))

    with mock.patch.object(sys, "argv", [f"{script}.py", *(arguments or [])]):
        if arguments and hasattr(module, "parse_args"):
            module.parse_args()  # looks at more than one flag at a time
        with mock.patch.object(Parser, "parse_args", stop), pytest.raises(Parsed) as parsed:
            module.main()
    return parsed.value.args


def commands_of(text):
    """(script, arguments) of every line that starts one of our scripts and is not an outline (...)."""
    for line in re.sub(r"\s*\\\n\s*", " ", text).splitlines():
        start = re.search(r"(?:^|\|\| |&& |\$ )((?:python|torchrun|accelerate launch) .*)", line.strip().strip("`#> "))
        if not start or "..." in line:
            continue
        words = shlex.split(re.split(r"\s{2,}|\s[|>&]|`", start[1])[0])  # what follows two spaces is a remark
        words = [re.sub(r"\$\{?\w+\}?", "1", word) for word in words]
        place = next(i for i, word in enumerate(words) if word.endswith(".py") or words[i - 1:i] == ["-m"])
        yield words[place].removesuffix(".py").replace("/", "."), words[place + 1:]
