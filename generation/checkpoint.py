"""Checkpoints: plain dicts of tensors, numbers and strings, written whole, from which the net is rebuilt.

    python -m generation.checkpoint FILE                                  say what is inside
    python -m generation.checkpoint FILE --to out.safetensors             weights alone, with what the file says of them
    python -m generation.checkpoint FILE --to small.pt --half             the same as a checkpoint, in half precision

Keys of ours: `model` and `ema` (raw and averaged weights under the published names), `opt`, `scaler`, `step`, `epoch`,
`args` (the resolved flags), `label_names`, `model_args` (name and sizes), `best_kid`, `minutes`, `codec`, `run`,
`training_images` (SHA-256 of the CSV file that lists them), `format_version`. The published layout has `model`, `ema`,
`opt` and `args`, in which it finds our weights too. Read are ours, the published layout, bare state dicts and
safetensors; what a file does not say is None.
"""

import argparse
import json
import math
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from core.cli import Parser, run
from core.errors import UserError
from core.files import write_atomically, write_torch
from models import MODELS

FORMAT = 1
PREFIX = "module."  # in front of the names of published files: weights were saved from inside DistributedDataParallel
SAID = ("args", "label_names", "model_args", "step", "epoch", "best_kid", "minutes", "codec", "run", "features",
        "training_images")
KINDS = ("ema", "model")
METADATA = "checkpoint"  # key of the safetensors header under which SAID is kept, as json


def save(path, checkpoint):
    """Write a checkpoint atomically: a job killed here leaves the previous file whole."""
    write_torch(path, {**checkpoint, "format_version": FORMAT})


def load(path, flag="--ckpt"):
    """Read a checkpoint, ours or foreign, without executing anything in it. Raises UserError.

    Returns the keys of ours. `ema` or `model` is empty where the file has no such weights; those of a bare state dict
    stand under `ema`, and `bare` is true.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{flag} {path}: no such file; train.py writes RUN/checkpoints/best_ckpt.pt")
    found = _read_safetensors(path, flag) if path.suffix == ".safetensors" else _read_pickle(path, flag)
    if found.get("format_version", FORMAT) != FORMAT:
        raise UserError(f"{flag} {path}: has format {found['format_version']}, expected {FORMAT}; update this program")
    wrong = _what_is_wrong(found)
    if wrong:
        raise UserError(f"{flag} {path}: not a checkpoint ({wrong})")
    found |= {kind: _without_prefix(found.get(kind) or {}) for kind in KINDS}
    if isinstance(found.get("args"), argparse.Namespace):
        found["args"] = vars(found["args"])
    found = {key: found.get(key) for key in SAID} | found
    if found["model_args"] is None:
        _identify(found, f"{flag} {path}")
    weights = found["ema"] or found["model"]
    if _shapes_of(found["model_args"]) != {key: value.shape for key, value in weights.items()}:
        raise UserError(f"{flag} {path}: its weights are not those of the {found['model_args'].get('model')} it says "
                        "it holds")
    return found


def _what_is_wrong(found):
    """Why this dict is no checkpoint, or None."""
    for kind in KINDS:
        weights = found.get(kind)
        if weights is not None and not isinstance(weights, dict):
            return f"its `{kind}` is a {type(weights).__name__}, expected a state dict"
        if weights and not all(isinstance(value, torch.Tensor) for value in weights.values()):
            return f"its `{kind}` holds other things than tensors"
    if not (found.get("ema") or found.get("model")):
        return f"found {', '.join(map(str, found))[:80] or 'nothing'}; expected `ema` or `model`, or a state dict"
    for key, kinds in (("args", (dict, argparse.Namespace)), ("model_args", dict), ("label_names", list)):
        if found.get(key) is not None and not isinstance(found[key], kinds):
            return f"its `{key}` is a {type(found[key]).__name__}"
    if found.get("model_args") is not None and not isinstance(found.get("args"), dict):
        return "it has `model_args` but no `args`"
    return None


def _read_pickle(path, flag):
    try:  # the published layout keeps its flags in a Namespace; nothing else is let in
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch raise a dozen kinds for damaged or unsafe files
        raise UserError(f"{flag} {path}: not a checkpoint that can be loaded safely ({_reason(error)})") from None
    if not isinstance(found, dict):
        raise UserError(f"{flag} {path}: not a checkpoint (found {type(found).__name__}, expected a dict)")
    bare = found and all(isinstance(value, torch.Tensor) for value in found.values())
    return {"ema": found, "bare": True} if bare else found


def _reason(error):
    """Why torch refused a file, without its advice to load it unsafely."""
    unsafe = re.search(r"GLOBAL (\S+)", str(error))
    return f"it holds a {unsafe[1]}" if unsafe else (str(error) or type(error).__name__).splitlines()[0][:120]


def _read_safetensors(path, flag):
    try:
        with safe_open(path, "pt") as file:
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            header = (file.metadata() or {}).get(METADATA)
        said = json.loads(header) if header else {"bare": True}
        if not isinstance(said, dict) or said.keys() & {"ema", "model"} or said.get("kind", "ema") not in KINDS:
            raise ValueError(f"its header says {str(header)[:40]}")
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{flag} {path}: not a safetensors file that can be read ({error})") from None
    return {**said, said.get("kind", "ema"): weights}


def _without_prefix(weights):
    return {str(key).removeprefix(PREFIX): value for key, value in weights.items()}


def _identify(found, where):
    """Fill in `model_args` and `args` of a file that does not say what it holds, from the shapes of its weights."""
    shapes = {key: value.shape for key, value in (found["ema"] or found["model"]).items()}
    for name, make in MODELS.items():
        sizes = make.func.sizes(shapes)
        if sizes and _shapes_of({"model": name, **sizes}) == shapes:
            break
    else:
        raise UserError(f"{where}: its {len(shapes)} weights fit none of {' '.join(MODELS)}")
    found["model_args"] = {"model": name, **sizes}
    found["args"] = {"image_size": None, "vae": None, "image_space": None, "multi_scale": None, **(found["args"] or {}),
                     "model": name, "num_classes": sizes["num_classes"], "in_channels": sizes["in_channels"]}


def _shapes_of(model_args):
    """Name -> shape of the weights of the model with these arguments; None where there is no such model."""
    sizes = dict(model_args)
    try:
        with torch.device("meta"):
            model = MODELS[sizes.pop("model")](**sizes)
    except (KeyError, TypeError, ValueError):
        return None
    return {key: value.shape for key, value in model.state_dict().items()}


def build(checkpoint, weights="ema"):
    """The net of a checkpoint with its `ema` or raw `model` weights, in evaluation mode."""
    sizes = dict(checkpoint["model_args"])
    model = MODELS[sizes.pop("model")](**sizes)
    model.load_state_dict({key: value.float() for key, value in checkpoint[weights].items()})
    return model.eval().requires_grad_(False)


def check_flag(path, name, asked, found):
    """A flag that disagrees with the checkpoint is an error; None means not given, or not said by the file."""
    same = MODELS.get(asked, asked) == MODELS.get(found, found)  # DiT-S and DiT-S/2 are one model
    if None not in (asked, found) and not same:
        flag = "--" + name.replace("_", "-")
        raise UserError(f"{flag} {asked}: {path} was trained with {flag} {found}; leave the flag out or change it")


def weights_only(checkpoint, kind="ema", half=False):
    """A checkpoint of one kind of weights, `ema` or `model`, and nothing that only training needs."""
    weights = {key: value.half() if half else value for key, value in checkpoint[kind].items()}
    return {**checkpoint, "ema": {}, "model": {}, kind: weights, "opt": {}, "scaler": {}, "validated": []}


def save_safetensors(path, checkpoint):
    """Write the weights of a checkpoint of one kind (`weights_only`) under their published names."""
    kind = "ema" if checkpoint["ema"] else "model"
    kid = checkpoint.get("best_kid")
    said = json.dumps({"kind": kind, **{key: checkpoint.get(key) for key in SAID},
                       "best_kid": None if kid == math.inf else kid})  # json has no infinity
    tensors = {key: value.contiguous() for key, value in checkpoint[kind].items()}
    write_atomically(path, lambda temporary: temporary.write_bytes(to_bytes(tensors, {METADATA: said})))


def summary(checkpoint):
    """A few lines about a checkpoint, for people."""
    weights = checkpoint["ema"] or checkpoint["model"]
    size = sum(value.numel() for value in weights.values())
    kinds = {str(value.dtype).removeprefix("torch.") for value in weights.values()}
    held = " and ".join(name for name, key in (("averaged", "ema"), ("raw", "model")) if checkpoint[key])
    held = "averaged or raw (not said)" if checkpoint.get("bare") else held
    trained, sizes = checkpoint["args"], checkpoint["model_args"]

    def said(value, text="{}"):
        return "not said" if value is None else text.format(value)

    kid = checkpoint["best_kid"]
    return "\n".join([
        f"{sizes['model']}, {size:,} values, {held} weights, {' and '.join(sorted(kinds))}",
        f"step {said(checkpoint['step'])}, epoch {said(checkpoint['epoch'])}, "
        f"best KID {said(None if kid in (None, math.inf) else 1e3 * kid, '{:.2f}e-3')}",
        f"{said(trained['image_size'], '{} px')}, VAE {said(checkpoint['codec'] or trained['vae'])}, "
        f"{sizes['num_classes']} labels: {said(checkpoint['label_names'] and ' '.join(checkpoint['label_names']))}"])


def main():
    args = parser().parse_args()
    if args.to and not args.to.parent.is_dir():
        raise UserError(f"--to {args.to}: no such folder as {args.to.parent}; make it first")
    checkpoint = load(args.file, flag="FILE")
    print(summary(checkpoint))
    if args.to is None:
        return
    kind = args.weights or ("ema" if checkpoint["ema"] else "model")
    if not checkpoint[kind]:
        raise UserError(f"--weights {kind}: {args.file} holds none; give the other")
    write = save_safetensors if args.to.suffix == ".safetensors" else save
    write(args.to, weights_only(checkpoint, kind, args.half))
    print(f"{args.to}: {args.to.stat().st_size / 1e6:.1f} MB")


def parser():
    p = Parser(__doc__)
    p.add_argument("file", type=Path, help="a checkpoint of any layout")
    p.add_argument("--to", type=Path, metavar="FILE", help="write the weights to a .safetensors or .pt file")
    p.add_argument("--weights", choices=KINDS, help="averaged or raw (default: averaged if there are any)")
    p.add_argument("--half", action="store_true", help="write them in half precision")
    return p


if __name__ == "__main__":
    run(main)
