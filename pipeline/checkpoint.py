"""Checkpoints: plain dicts of tensors, numbers and strings, written whole, from which the net is rebuilt.

    python -m pipeline.checkpoint RUN/checkpoints/best_ckpt.pt                  say what is inside
    python -m pipeline.checkpoint RUN/checkpoints/best_ckpt.pt --to small.pt    averaged weights only, float16

Keys: `model` and `ema` (state dicts under the published names), `opt`, `step`, `epoch`, `args` (the resolved
flags), `label_names`, `model_args` (name and sizes), `best_kid`, `format_version`.
"""

from pathlib import Path

import torch

from models import MODELS
from pipeline.cli import Parser, UserError, run
from pipeline.files import write_atomically

FORMAT = 1


def save(path, checkpoint):
    """Write a checkpoint atomically: a job killed here leaves the previous file whole."""
    write_atomically(path, lambda temporary: torch.save({**checkpoint, "format_version": FORMAT}, temporary))


def load(path, flag="--ckpt"):
    """Read a checkpoint of ours without executing anything in it. Raises UserError."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{flag} {path}: no such file; train.py writes RUN/checkpoints/best_ckpt.pt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch raise a dozen kinds for damaged or unsafe files
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise UserError(f"{flag} {path}: not a checkpoint that can be loaded safely ({reason})") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format_version") != FORMAT:
        raise UserError(f"{flag} {path}: not a checkpoint of train.py (format {FORMAT})")
    return checkpoint


def build(checkpoint, weights="ema"):
    """The net of a checkpoint with its `ema` or raw `model` weights, in evaluation mode."""
    model = MODELS[checkpoint["model_args"]["model"]](
        input_size=checkpoint["model_args"]["input_size"], num_classes=checkpoint["model_args"]["num_classes"],
        in_channels=checkpoint["model_args"]["in_channels"])
    model.load_state_dict({key: value.float() for key, value in checkpoint[weights].items()})
    return model.eval().requires_grad_(False)


def check_flag(path, name, asked, found):
    """A flag that disagrees with the checkpoint is an error; None means the flag was not given."""
    if asked is not None and asked != found:
        flag = "--" + name.replace("_", "-")
        raise UserError(f"{flag} {asked}: {path} was trained with {flag} {found}; leave the flag out or change it")


def slim(checkpoint):
    """What sampling and --load-from need, in half precision: an eighth of the size."""
    half = {key: value.half() for key, value in checkpoint["ema"].items()}
    return {**checkpoint, "ema": half, "model": {}, "opt": {}, "scaler": {}}


def summary(checkpoint):
    """A few lines about a checkpoint, for people."""
    size = sum(value.numel() for value in checkpoint["ema"].values())
    held = " and ".join(name for name, key in (("averaged", "ema"), ("raw", "model")) if checkpoint[key])
    trained = checkpoint["args"]
    return (f"{trained['model']}, {size:,} values, {held} weights; step {checkpoint['step']}, epoch "
            f"{checkpoint['epoch']}, best KID {1e3 * checkpoint['best_kid']:.2f}e-3\n"
            f"{trained['image_size']} px, VAE {checkpoint['codec']}, labels {' '.join(checkpoint['label_names'])}")


def main():
    p = Parser(__doc__)
    p.add_argument("file", type=Path, help="a checkpoint of train.py")
    p.add_argument("--to", type=Path, metavar="FILE", help="write a slim copy")
    args = p.parse_args()
    checkpoint = load(args.file, flag="")
    print(summary(checkpoint))
    if args.to:
        save(args.to, slim(checkpoint))
        print(f"{args.to}: {args.to.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main)
