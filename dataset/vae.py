"""From pixels to what the denoiser sees and back: a VAE's latents, or (`--image_space`) the pixels themselves.

A codec has `channels` and `factor` (pixels per cell side), `identity` (a name and a hash of the weights, so that
a cache can tell where its latents come from), `moments(images)` and `decode(latents)`.
"""

import warnings
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from core.assets import ASSETS, weights_file, weights_hash
from core.errors import UserError, first_line

NAMED = {  # --vae NAME -> where it comes from
    "ema": ASSETS["vae-ema"].source,
    "mse": ASSETS["vae-mse"].source,
    "retina": str(Path(__file__).resolve().parent.parent / "assets" / "vae-retina"),
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
        self.identity = f"{Path(name).name}:{weights_hash(self.vae)}"

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
    """The codec that the flags `--vae` (ema, mse, retina or a folder) and `--image_space` ask for."""
    return PixelCodec() if image_space else VaeCodec(vae, device)


def cells_per_side(image_size, codec):
    """Grid side for a square image. Raises UserError where the VAE cannot halve that often."""
    if image_size % codec.factor:
        raise UserError(f"--image-size {image_size}: expected a multiple of {codec.factor}, the VAE's reduction")
    return image_size // codec.factor


def same_weights(identity, other):
    """Whether two codec identities `name:hash` mean the same weights; a folder may have been renamed."""
    return str(identity).rpartition(":")[2] == str(other).rpartition(":")[2]


def _load(name):
    folder = NAMED.get(name, name)
    if not Path(folder).is_dir():
        if f"vae-{name}" not in ASSETS:
            raise UserError(f"--vae {name}: no such folder (expected {', '.join(NAMED)} or a diffusers VAE folder)")
        instead = ", or use the bundled autoencoder: --vae retina"
        folder = weights_file(ASSETS[f"vae-{name}"], f"--vae {name}", instead).parent
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of diffusers' about its own call of the hub
            return AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--vae {name}: not a diffusers AutoencoderKL folder ({first_line(error)})") from None
