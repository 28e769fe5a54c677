"""Which checkpoint to start from: the one that denoises the images of a latent cache best, untrained on them.

    python scripts/nearest_weights.py --feature-path store/mine --fold 0 --ckpt assets/geca-xs-*/geca-xs-*.pt

Prints the file whose error of ε is lowest on standard output, and the errors on standard error. Labels are left out
(the null label), since those of the checkpoints may be others. Checkpoints must be of the same autoencoder.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from core.cli import Parser, integer, run
from core.errors import UserError
from dataset import latents
from dataset.vae import same_latents
from generation import checkpoint as checkpoints
from scripts.study_learning import held_out_error

IMAGES = 64  # of the cache that are looked at


def error_of(file, cache):
    """Mean squared error of ε of a checkpoint on images of a cache, without labels. Raises UserError."""
    checkpoint = checkpoints.load(file)
    vae, own = cache.manifest.get("vae"), (checkpoint.model_args["in_channels"], checkpoint.model_args["input_size"])
    found = (cache.mean.shape[2], cache.mean.shape[-1])
    if own != found or (checkpoint.codec and vae and not same_latents(checkpoint.codec, vae)):
        raise UserError(f"--ckpt {file}: is for latents of {checkpoint.codec}, {own[0]} channels and side {own[1]}; "
                        f"found {vae}, {found[0]} and {found[1]}; leave it out")
    chosen = torch.linspace(0, len(cache) - 1, min(IMAGES, len(cache))).long()
    model = checkpoints.build(checkpoint, checkpoint.default_kind)
    labels = torch.zeros(len(chosen), checkpoint.model_args["num_classes"])
    images = torch.stack([cache.mean[i][0] for i in chosen.tolist()]).float()  # without their mirror images
    return held_out_error(model, images, labels)[0]


def main():
    p = Parser(__doc__)
    p.add_argument("--feature-path", type=Path, required=True, metavar="DIR", help="latent cache")
    p.add_argument("--fold", type=integer(0), default=0, help="of the cache")
    p.add_argument("--ckpt", type=Path, nargs="+", required=True, metavar="FILE", help="checkpoints to choose from")
    args = p.parse_args()
    cache = latents.load(args.feature_path, args.fold)
    errors = {file: error_of(file, cache) for file in args.ckpt}
    for file, error in errors.items():
        print(f"error of ε {error:.4f}: {file}", file=sys.stderr)
    print(min(errors, key=errors.get))


if __name__ == "__main__":
    run(main)
