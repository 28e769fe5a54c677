"""Feature spaces of networks that others have trained, and of classifiers of classify.py.

Interface and names: evaluation/features.py. All take uint8 RGB images as they come from `load_images` (real and
generated alike: centre-cropped to image_size by the ADM recipe) and say in `preprocessing` what happens to them
next. The libraries that hold the networks are imported when one is opened.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from core import efficientnet_lite
from core.assets import ASSETS, existing, open_timm, weights_file
from core.errors import UserError, first_line
from core.tensors import weights_hash

INSTEAD = ", or use --features retina, which is bundled"


class InceptionFeatures:
    """`inception`: the pooled features (2048) of FID's Inception-v3 (TensorFlow's of 2015, torch-fidelity's weights).

    No crop. The whole image, uint8 of any size, is resized to 299 × 299 in float32, bilinearly, without antialias,
    on the grid of TensorFlow 1 (corners not aligned), aspect ratio not kept; then (value − 128) / 128. All as in
    torch-fidelity, whose network does it by itself; the paper's KID is computed so.
    """

    preprocessing = ("uint8 RGB, no crop; torch-fidelity's resize to 299 x 299, bilinear (TensorFlow 1), "
                     "no antialias, float32; (v - 128) / 128")
    dimensions = 2048

    def __init__(self, name, device="cpu", file=None):
        flag = f"--features {name}"
        file = existing(file, flag) if file else weights_file(ASSETS["inception"], flag, INSTEAD)
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        try:
            torch.load(file, map_location="cpu", weights_only=True)  # the class below would run any pickled code
            with torch.random.fork_rng(devices=[]):
                net = FeatureExtractorInceptionV3(name, ["2048"], feature_extractor_weights_path=str(file))
        except Exception as error:  # whatever the reader of pickles or the network finds wrong
            raise UserError(f"{flag}: {file} does not hold the weights of torch-fidelity's Inception-v3 "
                            f"({first_line(error)}); fetch or name another file") from None
        self.net, self.device, self.name = net.to(device), device, "inception"
        self.identity = f"{self.name}:{weights_hash(net)}:{short_hash(self.preprocessing)}"

    def __call__(self, images, batch_size=32):
        """uint8 (N, H, W, 3), array or tensor -> float32 array (N, 2048)."""
        return in_batches(self, images, batch_size, lambda part: self.net(part.permute(0, 3, 1, 2))[0])


class TimmFeatures:
    """`timm:NAME`: what a timm model gives its classifier, pooled, after the preprocessing of its own evaluation.

    Per image, as timm's transform does on PIL images: the short side is resized (most often bicubic or bilinear,
    with antialias) to the model's size divided by its crop share, the centre of that size is taken, values go to
    [0, 1] and are normalised by the model's mean and standard deviation. `preprocessing` has its numbers.
    """

    model = None  # timm's name of it, where a subclass knows it
    own_head = False  # is the last layer part of the features?
    size = None  # of the images, all of each, where it is not the model's own
    adapted = ""  # what `adapt` does, for `preprocessing`

    def __init__(self, name, device="cpu", file=None):
        self.name = name.partition("=")[0]
        net = open_timm(self.model or self.name.removeprefix("timm:"), file, f"--features {name}", INSTEAD)
        from timm.data import create_transform, resolve_model_data_config

        weights = weights_hash(net)  # as published: what `adapt` computes may differ in the last bit elsewhere
        if not self.own_head:
            net.reset_classifier(0)
        config = resolve_model_data_config(net)
        if self.size:
            config |= {"input_size": (3, self.size, self.size), "crop_pct": 1.0}
        self.adapt(net)
        self.transform = create_transform(**config)  # for evaluation: nothing random
        self.preprocessing = described(config) + self.adapted
        self.net, self.device = net.to(device), device
        self.identity = f"{self.name}:{weights}:{short_hash(self.preprocessing)}"
        self.dimensions = self(np.zeros((1, *config["input_size"][1:], 3), np.uint8)).shape[1]

    def adapt(self, net):
        """Make the net take images of `size`."""

    def __call__(self, images, batch_size=32):
        """uint8 (N, H, W, 3), array or tensor -> float32 array (N, dimensions)."""
        return in_batches(self, images, batch_size, self.net, self.prepared)

    def prepared(self, images):
        """uint8 (n, H, W, 3) -> float32 (n, 3, size, size), image by image in threads."""
        with ThreadPoolExecutor(4) as pool:
            return torch.stack(list(pool.map(lambda image: self.transform(Image.fromarray(image)), images.numpy())))


class DinoFeatures(TimmFeatures):
    """`dinov2`: the class token (768), after the last norm, of DINOv2 ViT-B/14; the space of the paper's GG.

    As FLD does it: the image, square already, is resized to 224 × 224, bicubic with antialias, nothing is cropped
    away, values go to [0, 1] and are normalised by ImageNet's mean and standard deviation.
    """

    model, size = "vit_base_patch14_dinov2.lvd142m", 224
    adapted = "; position table resampled as in DINOv2's own code"

    def adapt(self, net):
        """From the 37 × 37 patches of its training to 16 × 16, with the position table as DINOv2's own code has it.

        That resamples bicubically, without antialias and by (16 + 0.1) / 37; timm would do it with antialias, and
        so with other features.
        """
        cls, table = net.pos_embed[:, :1], net.pos_embed[:, 1:]  # (1, 1, D), (1, 37 · 37, D)
        old, new = net.patch_embed.grid_size[0], self.size // net.patch_embed.patch_size[0]
        table = table.unflatten(1, (old, old)).permute(0, 3, 1, 2)  # (1, D, 37, 37)
        table = F.interpolate(table, scale_factor=(new + 0.1) / old, mode="bicubic").flatten(2).transpose(1, 2)
        net.set_input_size((self.size, self.size))
        net.pos_embed.copy_(torch.cat([cls, table], dim=1))


class ClipFeatures(TimmFeatures):
    """`clip`: the image embedding (512) of OpenAI's CLIP ViT-B/32, after the projection, not normalised, as in FLD.

    timm's model with QuickGELU, as it was trained, in float32. The short side is resized to 224, bicubic with
    antialias, the centre 224 × 224 taken, values go to [0, 1] and are normalised by CLIP's mean and standard
    deviation.
    """

    model, own_head, size = "vit_base_patch32_clip_quickgelu_224.openai", True, 224


class LiteFeatures(TimmFeatures):
    """`imagenet-lite`: the pooled features (1280) of EfficientNet-Lite0, trained on ImageNet; no retina was among it.

    The image, square already, is resized to 224 × 224, bicubic with antialias, and nothing is cropped away, so that
    its border counts too (the authors, who classify photographs, cut off an eighth). Values go to [-1, 1], as timm has
    it; TensorFlow's (v − 127) / 128 differs from that by 0.008 at most. Features are the mean over the 7 × 7 places of
    the last layer before the classifier. The weights come out of the package index (core/efficientnet_lite.py).
    """

    model, size = efficientnet_lite.MODEL, 224


class ClassifierFeatures:
    """A checkpoint of classify.py (FILE.pt): what its network gives its last layer, pooled.

    The classifier prepares the images as it does when it classifies: the central square by the ADM recipe at its own
    image size, values in [0, 1], normalised by its backbone's mean and standard deviation. It has seen retinas only.
    """

    def __init__(self, path, device="cpu"):
        from classification.network import load_classifier

        self.classifier = load_classifier(path, device, "--features")
        size = self.classifier.image_size
        self.name = f"classifier:{Path(path).stem}"
        self.preprocessing = (f"uint8 RGB; centre {size} x {size} by the ADM recipe (box, bicubic); [0, 1]; minus "
                              "mean, over std of its backbone")
        self.identity = f"{self.name}:{self.classifier.identity}:{short_hash(self.preprocessing)}"
        self.dimensions = self.classifier.dimensions

    def __call__(self, images, batch_size=32):
        """uint8 (N, H, W, 3), array or tensor -> float32 array (N, dimensions)."""
        return self.classifier.features(np.asarray(images), batch_size)


@torch.inference_mode()
def in_batches(space, images, batch_size, forward, prepared=lambda part: part):
    """forward(prepared(part)) for each part of the images on the space's device -> float32 array (N, D)."""
    parts = torch.as_tensor(images).split(batch_size)
    return torch.cat([forward(prepared(part).to(space.device)).float().cpu() for part in parts]).numpy()


def described(config):
    """One line that says what timm's transform of this data config does."""
    size, share = config["input_size"][-1], config["crop_pct"]
    mean, std = (" ".join(f"{value:.6g}" for value in config[key]) for key in ("mean", "std"))
    return (f"uint8 RGB; resized to {int(size / share)}, {config['interpolation']}, antialias; crop "
            f"{config['crop_mode']} {size} x {size}; [0, 1]; minus mean {mean}, over std {std}")


def short_hash(text):
    """8 hex digits of the SHA-256 of a text; the last part of an identity name:weights:preprocessing."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]
