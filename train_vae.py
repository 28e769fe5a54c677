"""Train a small autoencoder and save it in diffusers' folder format (what --vae FOLDER reads).

    python train_vae.py --data-path data/oct data/fundus --output vae --steps 5000

It learns from random crops of every image of the data roots except those of `test.csv`, at several scales, and
is scored (PSNR, SSIM) on the images of `test.csv`. The same command continues a stopped run.
The loss is the reconstruction's + kl-weight·KL (Kingma & Welling 2014): the mean squared error, which is what PSNR
measures, or L1 + 0.1·(1 − SSIM) (Zhao et al. 2017).
"""

import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import save as to_safetensors
from torch.nn import functional as F
from torchmetrics.functional.image import structural_similarity_index_measure as ssim

from core import claims, runs, runtime, schema
from core.cli import Parser, integer, number, run
from core.errors import UserError
from core.files import json_text, read_torch, refused, text_writer, write_together, write_torch
from core.progress import progress_bar
from core.random import generator
from dataset import contents, outside
from dataset.images import center_crop, load_image, load_images
from dataset.root import read_split
from dataset.vae import DIFFUSERS, VaeCodec, to_model_range
from generation.optimiser import OPTIMISERS, make_optimiser

WARM_UP, EMA_DECAY, BETAS = 100, 0.999, (0.9, 0.999)
EDGES = ("encoder.conv_in", "decoder.conv_out")  # the layers that see pixels
LOSSES = {"mse": F.mse_loss,
          "l1-ssim": lambda a, b: F.l1_loss(a, b) + 0.1 * (1 - ssim(a, b, data_range=2.0))}


def build(widths):
    """AutoencoderKL, 8x reduction, 4 latent channels. No attention: it then treats every image size alike."""
    levels = len(widths)
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=widths, layers_per_block=1,
        norm_num_groups=4, mid_block_add_attention=False, sample_size=256,
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
    )


def training_paths(root):
    """All images of a root that are not in its test.csv; a root without folds has none."""
    held_out = set(read_split(root, "test").filenames)
    folds = sorted(p.stem for p in Path(root).glob("train_*.csv"))
    names = {name for fold in folds for name in read_split(root, fold).filenames}
    return [Path(root) / name for name in sorted(names - held_out)]


def random_crop(image, size, scales, draw):
    """uint8 (H, W, 3) -> uint8 (size, size, 3): a random place at a random scale, mirrored with probability 1/2."""
    side = min(image.shape[:2])
    scale = scales[draw.integers(len(scales))]
    window = min(side, max(size, round(size * side / scale)))
    top, left = (draw.integers(length - window + 1) for length in image.shape[:2])
    crop = image[top:top + window, left:left + window, :]
    crop = np.asarray(center_crop(Image.fromarray(crop), size))
    return crop[:, ::-1] if draw.integers(2) else crop


def loss_terms(vae, images, draw, reconstruction):
    """Images (N, 3, S, S) in [-1, 1] -> `reconstruction` of one posterior sample each, KL per latent entry in nats."""
    posterior = vae.encode(images).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=draw).to(images.device)
    decoded = vae.decode(posterior.mean + posterior.std * noise).sample
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    return reconstruction(decoded.float(), images), kl


def learning_rate(step, steps, peak):
    """Linear warm-up, then a half cosine to zero."""
    return peak * min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def train(args, vae, ema, images, device, interruption):
    """Run the remaining steps -> whether all are done; False: `interruption` asked to stop.

    The state after each `--save-every` steps, and where it stopped, lies in OUTPUT/training_state.pt.
    """
    optimiser = make_optimiser(vae, args.optimizer, args.lr, BETAS, EDGES)
    state_file, first = args.output / "training_state.pt", 0
    if state_file.is_file():
        state = read_torch(state_file, "state", f"remove {args.output}")
        with refused(state_file, f"remove {args.output}"):
            schema.check(state, {"model": {}, "ema": {}, "optimiser": {}, "step": schema.Number()})
            vae.load_state_dict(state["model"])
            ema.load_state_dict(state["ema"])
            optimiser.load_state_dict(state["optimiser"])
            first = state["step"]
        print(f"continuing from step {first} of {state_file}")
    bar = progress_bar(range(first, args.steps), initial=first, total=args.steps, unit="steps", title="training")
    for step in bar:
        draw = np.random.default_rng([args.global_seed, step])  # a function of the step: resuming needs no state
        chosen = draw.integers(len(images), size=args.batch_size)
        batch = [random_crop(images[i], args.crop, args.scales, draw) for i in chosen]
        batch = to_model_range(np.stack(batch)).to(device, memory_format=torch.channels_last)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        with runtime.autocast(args.precision, device):
            loss, kl = loss_terms(vae, batch, generator(args.global_seed, "posterior", step), LOSSES[args.loss])
        optimiser.zero_grad(set_to_none=True)
        (loss + args.kl_weight * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        with torch.no_grad():
            for mean, value in zip(ema.parameters(), vae.parameters(), strict=True):
                mean.lerp_(value, 1 - min(EMA_DECAY, (1 + step) / (10 + step)))
        if step % 20 == 0:
            bar.set_postfix({args.loss: f"{loss:.5f}", "kl": f"{kl:.2f}"}, refresh=False)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps or interruption.asked:
            state = {"model": vae.state_dict(), "ema": ema.state_dict(), "optimiser": optimiser.state_dict(),
                     "step": step + 1}
            write_torch(state_file, state)
        if interruption.asked:
            print(f"stopped at step {step + 1}; the same command continues")
            return False
    return True


def save(vae, folder):
    """Write an autoencoder in diffusers' format, whole or not at all (its save_pretrained writes one file by one)."""
    weights = {key: value.contiguous() for key, value in vae.state_dict().items()}
    raw = to_safetensors(weights, {"format": "pt"})
    write_together({folder / DIFFUSERS[0]: text_writer(vae.to_json_string()),
                    folder / DIFFUSERS[1]: lambda path: path.write_bytes(raw)})


@torch.no_grad()
def latent_std(vae, paths, device):
    """Standard deviation of the latents of full images; its inverse is the scaling factor."""
    sample = load_images(paths[:: max(1, len(paths) // 128)], 256)
    parts = to_model_range(sample).to(device).split(8)
    return torch.cat([vae.encode(part).latent_dist.mode() for part in parts]).std().item()


def score(folder, roots, sizes, device):
    """PSNR (dB) and SSIM of reconstructions from the posterior mean, on each root's test images at each size."""
    codec, results, picture = VaeCodec(str(folder), device), [], []
    for root in roots:
        paths = read_split(root, "test").paths
        for size in sizes:
            psnr, similarity = [], []
            for start in range(0, len(paths), 8):
                real = load_images(paths[start:start + 8], size)
                fake = codec.decode(codec.moments(real)[0]).cpu()
                error = (fake.float() - torch.as_tensor(real).float()).square().mean((1, 2, 3))
                psnr += (10 * torch.log10(255**2 / error)).tolist()
                similarity.append(len(real) * ssim(to_model_range(fake), to_model_range(real), data_range=2.0))
                if start == 0 and size == max(sizes):
                    picture.append(np.concatenate([*real[:4], *fake.numpy()[:4]], axis=1))
            results.append({"root": Path(root).name, "size": size, "images": len(paths),
                            "psnr": round(float(np.mean(psnr)), 2),
                            "ssim": round(float(sum(similarity)) / len(paths), 4)})
            print("{root:>10}  {size:>3} px  {images:>4} test images  PSNR {psnr:.2f} dB  SSIM {ssim:.4f}".format(
                **results[-1]))
    shown = Image.fromarray(np.concatenate(picture))
    write_together({folder / "reconstructions.png": lambda path: shown.save(path, "PNG"),
                    folder / "scores.json": text_writer(json_text(results))})


def check_shapes(args):
    """Refuse sizes that the net cannot halve three times, or widths that its norms cannot group."""
    for flag, values, unit in (("--crop", [args.crop], 8), ("--sizes", args.sizes, 8), ("--widths", args.widths, 4)):
        for value in values:
            if value % unit:
                raise UserError(f"{flag} {value}: expected a multiple of {unit}")


def claim(args, paths):
    """The output folder for this training alone: its flags, its images. Raises UserError where it holds another."""
    flags = ("steps", "batch_size", "crop", "widths", "loss", "kl_weight", "optimizer", "lr", "precision", "scales",
             "global_seed")
    settings = {name: getattr(args, name) for name in flags} | {"images": contents.digest(paths)}
    stored = claims.read_settings(args.output)
    if stored is None and (args.output / "training_state.pt").exists():
        raise UserError(f"--output {args.output}: holds a training that does not say its settings; remove it")
    if stored is not None and (different := claims.differences(stored, settings)):
        raise UserError(f"--output {args.output}: holds another training ({claims.described(different)}); remove it or "
                        "give another folder")
    runs.hold(args.output)
    claims.write_settings(args.output, settings)


def main():
    args = parser().parse_args()
    runtime.alone("train_vae.py")
    check_shapes(args)
    device = runtime.start(args.precision).device
    paths = [path for root in args.data_path for path in training_paths(root)]
    if not paths:
        raise UserError(f"--data-path {' '.join(map(str, args.data_path))}: no training image outside test.csv")
    claim(args, paths)
    torch.manual_seed(args.global_seed)
    vae = build(args.widths).to(device, memory_format=torch.channels_last)
    ema = build(args.widths).to(device)
    ema.load_state_dict(vae.state_dict())
    print(f"{sum(p.numel() for p in vae.parameters()):,} parameters, {len(paths)} training images, {device}")
    started = time.monotonic()
    images = [load_image(path) for path in progress_bar(paths, total=len(paths), unit="images", title="reading")]
    with runtime.Interruption() as interruption:
        done = train(args, vae, ema, images, device, interruption)
    if not done:
        sys.exit(interruption.exit_code)
    ema.register_to_config(scaling_factor=1 / latent_std(ema, paths, device))
    save(ema.half(), args.output)
    print(f"{args.output}: written after {(time.monotonic() - started) / 60:.0f} minutes")
    score(args.output, args.data_path, args.sizes, device)


def parser():
    p = Parser(__doc__)
    p.add_argument("--data-path", type=Path, nargs="+", required=True, metavar="ROOT",
                   help="prepared data roots (prepare_data.py); their test.csv is held out")
    outside.add_flag(p)
    p.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    p.add_argument("--steps", type=integer(1), default=5000, help="optimiser steps")
    p.add_argument("--batch-size", type=integer(1), default=16, help="crops per step")
    p.add_argument("--crop", type=integer(16, 256), default=64, help="side of a training crop, in pixels")
    p.add_argument("--widths", type=integer(4), nargs=4, default=(8, 32, 64, 128), metavar="C",
                   help="channels of the four levels, multiples of 4, from full to 1/8 resolution")
    p.add_argument("--loss", choices=LOSSES, default="mse", help="of the reconstruction")
    p.add_argument("--kl-weight", type=number(0), default=1e-6, help="weight of the KL term, per latent entry")
    p.add_argument("--optimizer", choices=OPTIMISERS, default="muon", help="Muon, or AdamW, which learns slower")
    p.add_argument("--lr", type=number(1e-7), default=2e-3, help="learning rate, after a warm-up; a half cosine to 0")
    p.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="fp32",
                   help="of training")
    p.add_argument("--scales", type=integer(16), nargs="+", default=(256, 256, 128, 128, 64), metavar="PIXELS",
                   help="short sides at which images are seen; one is drawn for each crop")
    p.add_argument("--sizes", type=integer(16), nargs="+", default=(256, 128, 64), metavar="PIXELS",
                   help="image sizes at which the result is scored")
    p.add_argument("--save-every", type=integer(1), default=250, help="steps between saved states")
    p.add_argument("--global-seed", type=integer(0), default=0, help="seed of the initial weights and all draws")
    return p


if __name__ == "__main__":
    run(main)
