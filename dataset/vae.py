"""From pixels to what the denoiser sees and back: a VAE's latents, or (`--image_space`) the pixels themselves.

A codec has `channels` and `factor` (pixels per cell side), `identity` (a name, a hash of the weights and the scale of
the latents, so that a cache can tell where its latents come from), `moments(images)` and `decode(latents)`.
"""

import os
import warnings
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from core.assets import ASSETS, DIFFUSERS, weights_file
from core.errors import UserError, first_line
from core.files import read_json
from core.schema import Number
from core.tensors import weights_hash

BUNDLED = Path(__file__).resolve().parent.parent / "assets"
NAMED = {  # --vae NAME -> where it comes from
    "ema": ASSETS["vae-ema"].source,
    "mse": ASSETS["vae-mse"].source,
    "retina": str(BUNDLED / "vae-retina"),
    "retina-2": str(BUNDLED / "vae-retina-2"),
}
WIDTH = Number(1, 4096)
CONFIG = {  # of config.json: what is used here, or would make diffusers load something else
    "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels?": 3, "latent_channels?": Number(1, 256),
    "block_out_channels": [WIDTH], "layers_per_block?": Number(1, 16), "norm_num_groups?": WIDTH,
    "scaling_factor?": Number(1e-6, 1e6, whole=False), "quantization_config?": None, "auto_map?": None,
}
DECODED = 16  # images that are decoded together


def to_model_range(images):
    """uint8 (N, H, W, 3) -> float32 (N, 3, H, W) in [-1, 1]."""
    return torch.as_tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pixels(images):
    """float (N, 3, H, W), nominally in [-1, 1] -> uint8 (N, H, W, 3): clamp(127.5 v + 128, 0, 255).

    The published scripts use 128, not 127.5: with the cut to an integer that follows it rounds to nearest.
    """
    return (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


class VaeCodec:
    """A diffusers AutoencoderKL; latents are scaled by its `scaling_factor` (0.18215 for sd-vae-ft-*)."""

    def __init__(self, name, device="cpu"):
        self.vae = _load(name).to(device).eval().requires_grad_(False)
        self.channels = self.vae.config.latent_channels
        self.factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.scale = self.vae.config.scaling_factor
        self.identity = f"{Path(name).name}:{weights_hash(self.vae)}:x{self.scale:g}"

    @torch.no_grad()
    def moments(self, images):
        """uint8 (N, H, W, 3) -> posterior mean and std of the scaled latents, each (N, C, H/f, W/f)."""
        images = to_model_range(images).to(self.vae.device)
        posterior = self.vae.encode(images).latent_dist
        return posterior.mean * self.scale, posterior.std * self.scale

    @torch.no_grad()
    def decode(self, latents):
        """Scaled latents (N, C, h, w) -> uint8 (N, h·f, w·f, 3); a few at a time, as a decoder needs much memory."""
        return torch.cat([to_pixels(self.vae.decode(part / self.scale).sample) for part in latents.split(DECODED)])


class PixelCodec:
    """Diffusion in image space: three channels, one cell per pixel, nothing to encode."""

    channels, factor, scale, identity = 3, 1, 1.0, "pixels"

    def moments(self, images):
        """uint8 (N, H, W, 3) -> (N, 3, H, W) in [-1, 1] and a std of zero."""
        mean = to_model_range(images)
        return mean, torch.zeros_like(mean)

    def decode(self, latents):
        """(N, 3, H, W) -> uint8 (N, H, W, 3)."""
        return to_pixels(latents)


def open_codec(vae, image_space=False, device="cpu"):
    """The codec that the flags `--vae` (a name of NAMED, or a folder) and `--image_space` ask for."""
    return PixelCodec() if image_space else VaeCodec(vae, device)


def cells_per_side(image_size, codec):
    """Grid side for a square image. Raises UserError where the VAE cannot halve that often."""
    if image_size % codec.factor:
        raise UserError(f"--image-size {image_size}: expected a multiple of {codec.factor}, the VAE's reduction")
    return image_size // codec.factor


def same_latents(identity, other):
    """Whether codecs of two identities `name:hash:xSCALE` make the same latents; a folder may have been renamed.

    Older files do not say the scale.
    """
    (weights, scale), (other_weights, other_scale) = _parts(str(identity)), _parts(str(other))
    return weights == other_weights and (scale == other_scale or "" in (scale, other_scale))


def weights_of(identity):
    """The hash in a codec's identity."""
    return _parts(identity)[0]


def _parts(identity):
    """Hash and scale of `name:hash:xSCALE`, `name:hash` or `pixels`; "" where there is none."""
    rest, marked, scale = identity.rpartition(":x")
    return (rest if marked else scale).rpartition(":")[2], scale if marked else ""


def _load(name):
    """The AutoencoderKL of a name or folder. Only numbers are read: config.json and one file of safetensors."""
    folder = NAMED.get(name, name)
    if not os.path.isdir(folder):
        if f"vae-{name}" not in ASSETS:
            raise UserError(f"--vae {name}: no such folder (expected {', '.join(NAMED)} or a diffusers VAE folder)")
        instead = ", or use a bundled autoencoder: --vae retina or retina-2"
        folder = weights_file(ASSETS[f"vae-{name}"], f"--vae {name}", instead).parent
    config, weights = (Path(folder) / file for file in DIFFUSERS)
    if not (config.is_file() and weights.is_file()) or any(Path(folder).glob("*.index.json")):  # weights elsewhere
        raise UserError(f"--vae {name}: expected the diffusers files {config.name} and {weights.name} in {folder}, "
                        "with all weights (no other format is read: it might hold code); save it with save_pretrained")
    read_json(config, "expected what diffusers saves of an AutoencoderKL", CONFIG)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of diffusers' about its own call of the hub
            vae = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True,
                                                use_safetensors=True)
        missing = [key for key, value in vae.state_dict().items() if value.is_meta]  # diffusers leaves those so
        if missing:
            raise ValueError(f"{weights.name} has no {missing[0]}")
        return vae
    except Exception as error:  # whatever diffusers finds wrong with the settings or weights of somebody else
        raise UserError(f"--vae {name}: not a diffusers AutoencoderKL folder ({first_line(error)})") from None
