"""The classifier of classify.py: a timm network with one output per label, and the file it is kept in.

Preprocessing, here and nowhere else: the central square of the image by `center_crop`, image_size × image_size; values
to [0, 1], minus the mean, over the standard deviation that the backbone expects. A file is a plain dict: `kind`
("classifier"), `backbone`, `image_size`, `label_names`, `model` (weights under timm's names), what the training adds
(`method`, `fold`, `epoch`, ...) and, where training is to be continued, its state `training`.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from classification.dropout import DropoutByImage
from core import schema
from core.assets import open_timm, timm_config
from core.errors import UserError, first_line
from core.files import read_torch, refused, write_torch
from core.runs import checkpoint_file
from core.schema import Number
from core.tensors import weights_hash
from dataset.images import center_crop

KIND, FORMAT = "classifier", 1
SCHEMA = {"backbone": str, "image_size": Number(8, 2048), "label_names": [str], "model": {str: torch.Tensor},
          "method?": (str, None), "synthetic?": (Number(), None), "seen?": ([str], None)}  # of what is read
INSTEAD = ", or name a file of weights (--pretrained-file FILE), or start from random weights (--no-pretrained)"


class Network(nn.Module):
    """uint8 (N, S, S, 3) -> logits (N, K), float32. `backbone` is timm's model, its last layer with K outputs."""

    def __init__(self, backbone, image_size):
        super().__init__()
        config = backbone.pretrained_cfg
        self.backbone, self.image_size = backbone, image_size
        for name in ("mean", "std"):
            self.register_buffer(name, 255 * torch.tensor(config[name]).view(1, -1, 1, 1), persistent=False)

    def forward(self, images):
        return self.backbone(self.prepared(images)).float()

    def features(self, images):
        """uint8 (N, S, S, 3) -> (N, D): the pooled features that the last layer receives."""
        x = self.backbone.forward_features(self.prepared(images))
        return self.backbone.forward_head(x, pre_logits=True).flatten(1)

    def prepared(self, images):
        return (images.permute(0, 3, 1, 2).float() - self.mean) / self.std  # (N, 3, S, S)


def build(backbone, labels, image_size, seed=0, pretrained=False, file=None):
    """A network with a new last layer for `labels` labels. Raises UserError.

    `pretrained`: start from published weights (`core.assets`), or from those in `file`. All other weights are a
    function of `seed`. Backbones of fixed image size are made for this one.
    """
    try:
        config = timm_config(backbone)
    except UserError as error:
        raise UserError(f"--backbone {str(error).removeprefix('timm:')}; give --backbone another name") from None
    options = {"img_size": image_size} if config.fixed_input_size else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the initialisation is the only draw from the global stream
        if pretrained:
            net = open_timm(backbone, file, f"--backbone {backbone}", INSTEAD, **options)
            net.reset_classifier(labels)
        else:
            import timm  # here, as in open_timm

            try:
                net = timm.create_model(backbone, num_classes=labels, **options)
            except (AssertionError, RuntimeError, TypeError, ValueError) as error:  # an image size it cannot tile
                raise UserError(f"--backbone {backbone}: cannot be made for {image_size} pixels ({first_line(error)})"
                                ) from None
    return Network(net.requires_grad_(True), image_size)


def check(network, batch, flag):
    """Refuse a network that cannot be trained on batches of images of its own size. Raises UserError."""
    size, count = network.image_size, min(batch, 2)
    try:
        with torch.no_grad(), DropoutByImage([torch.Generator() for _ in range(count)]):
            network.train()(torch.zeros(count, size, size, 3, dtype=torch.uint8))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(f"{flag}: cannot be trained on {batch} image(s) of {size} pixels ({first_line(error)}); change "
                        "--image-size, --global-batch-size or the backbone") from None


def has_batch_norm(network):
    return any(isinstance(module, _BatchNorm) for module in network.modules())


def synchronise_batch_norm(network):
    """Let every batch norm use the images of all processes, so that several train as one does. GPUs only.

    By timm's function, since torch's loses the activation that timm's batch norms contain.
    """
    from timm.layers import convert_sync_batchnorm  # here, as everywhere: it takes seconds

    return convert_sync_batchnorm(network)


def save(path, network, backbone, label_names, **about):
    """Write a classifier atomically; `about` holds tensors, numbers, strings, lists and dicts."""
    write_torch(path, {"kind": KIND, "format_version": FORMAT, "backbone": backbone, "image_size": network.image_size,
                       "label_names": list(label_names), "model": network.backbone.state_dict(), **about})


def read(path, flag="--classifier"):
    """The dict in a file of `save`, or of a run folder, without executing anything in it. Raises UserError."""
    path = checkpoint_file(path, flag)
    if not path.is_file():
        raise UserError(f"{flag} {path}: no such file; classify.py writes OUTPUT/fold-K/checkpoints/best_ckpt.pt")
    content = read_torch(path, flag, "give a file of classify.py")
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise UserError(f"{flag} {path}: not a classifier; give a file of classify.py")
    if content.get("format_version") != FORMAT:
        raise UserError(f"{flag} {path}: has format {content.get('format_version')}, expected {FORMAT}; "
                        "update this program")
    with refused(f"{flag} {path}", "give a file of classify.py"):
        schema.check(content, SCHEMA)
    return content


def load_classifier(path, device="cpu", flag="--classifier"):
    """The classifier in a file of classify.py. Raises UserError."""
    content = read(path, flag)
    backbone, label_names = content["backbone"], content["label_names"]
    network = build(backbone, len(label_names), content["image_size"])
    try:
        network.backbone.load_state_dict(content["model"])
    except RuntimeError as error:
        raise UserError(f"{flag} {path}: its weights are not those of {backbone} ({first_line(error)})") from None
    return Classifier(network.eval().requires_grad_(False).to(device), label_names, backbone, device,
                      {key: content.get(key) for key in ("method", "synthetic", "seen")})


class Classifier:
    """A trained network with its labels, image size and identity; computes in float32."""

    def __init__(self, network, label_names, backbone, device, about):
        """`about`: what the file says of its training; None is what it does not say."""
        self.network, self.device = network, device
        self.method, self.synthetic, self.seen = (about[key] for key in ("method", "synthetic", "seen"))
        self.label_names, self.image_size = tuple(label_names), network.image_size
        views = repr((network.image_size, network.mean.tolist(), network.std.tolist(), self.label_names))
        self.identity = f"{backbone}:{weights_hash(network)}:{hashlib.sha256(views.encode()).hexdigest()[:8]}"
        self.dimensions = self.features(np.zeros((1, self.image_size, self.image_size, 3), np.uint8)).shape[1]

    def scores(self, images, batch_size=32):
        """uint8 (N, H, W, 3) -> probabilities (N, K), float32."""
        return self._in_batches(images, batch_size, lambda part: self.network(part).sigmoid())

    def features(self, images, batch_size=32):
        """uint8 (N, H, W, 3) -> (N, D), float32: the pooled features that the last layer receives."""
        return self._in_batches(images, batch_size, self.network.features)

    @torch.inference_mode()
    def _in_batches(self, images, batch_size, forward):
        parts = [forward(torch.from_numpy(self.cropped(images[i:i + batch_size])).to(self.device)).float().cpu()
                 for i in range(0, len(images), batch_size)]
        return torch.cat(parts).numpy() if parts else np.zeros((0, len(self.label_names)), np.float32)

    def cropped(self, images):
        """uint8 (n, H, W, 3) -> uint8 (n, S, S, 3), in threads; images of that size stay as they are."""
        images = np.ascontiguousarray(images)
        if images.shape[1:3] == (self.image_size, self.image_size):
            return images
        with ThreadPoolExecutor(4) as pool:
            crops = pool.map(lambda image: np.asarray(center_crop(Image.fromarray(image), self.image_size)), images)
            return np.stack(list(crops))
