"""Checkpoints: plain dicts of tensors, numbers and strings, written whole, from which the net is rebuilt.

    python -m generation.checkpoint FILE                                  say what is inside
    python -m generation.checkpoint FILE --to out.safetensors             weights alone, with what the file says of them
    python -m generation.checkpoint FILE --to small.pt --half             the same as a checkpoint, in half precision

Keys of a file of ours: `model` and `ema` (raw and averaged weights under the published names), `averages` (further
averages: decay -> weights), `opt`, `scaler`, `step`, `epoch`, `args` (the resolved flags), `label_names`, `model_args`
(name and sizes), `best_kid`, `minutes`, `codec`, `run`, `features`, `training_images` (SHA-256 of the CSV file that
lists them), `format_version`. The published layout has `model`, `ema`, `opt` and `args`, in which it finds our weights
too. Read are ours, the published layout, bare state dicts and safetensors; what a file does not say is None.
"""

import argparse
import json
import math
import re
from dataclasses import dataclass, field, fields
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
KINDS = ("ema", "model")
METADATA = "checkpoint"  # key of the safetensors header under which a checkpoint's plain values are kept, as json


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds; None, or empty, is what it does not say. Never changed: `dataclasses.replace` makes another.

    Weights are state dicts (name -> tensor) under the published names.
    """

    args: dict  # the flags it was trained with
    model_args: dict  # name and sizes: what to build the net with
    ema: dict = field(default_factory=dict)  # averaged weights
    model: dict = field(default_factory=dict)  # raw weights
    averages: dict = field(default_factory=dict)  # decay, as text -> further averaged weights
    label_names: list | None = None
    step: int | None = None
    epoch: int | None = None
    best_kid: float | None = None
    minutes: float | None = None
    codec: str | None = None  # identity of the autoencoder: name:hash
    run: str | None = None  # name of the run folder
    features: str | None = None  # identity of the feature space of best_kid
    training_images: str | None = None  # SHA-256 of the CSV file that lists them
    opt: dict = field(default_factory=dict)  # state of the optimiser
    scaler: dict = field(default_factory=dict)  # state of fp16's loss scaler
    validated: list = field(default_factory=list)  # features of earlier validations, for --validation-kid accumulated
    bare: bool = False  # a state dict without a word about it

    def weights(self, kind):
        """The weights that `--weights` names: "ema", "model" or "ema:DECAY" of a further average; {} if none."""
        return self.averages.get(kind.removeprefix("ema:"), {}) if ":" in kind else getattr(self, kind)

    @property
    def kinds(self):
        """Names of the weights that are there, averaged ones first."""
        return [kind for kind in KINDS if getattr(self, kind)] + [f"ema:{decay}" for decay in self.averages]

    @property
    def default_kind(self):
        return "ema" if self.ema else "model"


SAID = tuple(f.name for f in fields(Checkpoint) if f.name not in
             ("ema", "model", "averages", "opt", "scaler", "validated", "bare"))  # plain values


def save(path, state):
    """Write a checkpoint, a dict with keys of `Checkpoint`, atomically: a job killed here leaves the old file whole."""
    write_torch(path, {**state, "format_version": FORMAT})


def load(path, flag="--ckpt"):
    """Read a checkpoint, ours or foreign, without executing anything in it -> Checkpoint. Raises UserError."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{flag} {path}: no such file; train.py writes RUN/checkpoints/best_ckpt.pt")
    content = _read_safetensors(path, flag) if path.suffix == ".safetensors" else _read_pickle(path, flag)
    if content.get("format_version", FORMAT) != FORMAT:
        raise UserError(f"{flag} {path}: has format {content['format_version']}, expected {FORMAT}; update this "
                        "program")
    wrong = _what_is_wrong(content)
    if wrong:
        raise UserError(f"{flag} {path}: not a checkpoint ({wrong})")
    content |= {kind: _without_prefix(content.get(kind) or {}) for kind in KINDS}
    if isinstance(content.get("args"), argparse.Namespace):
        content["args"] = vars(content["args"])
    if content.get("model_args") is None:
        content |= _identify(content, f"{flag} {path}")
    known = {f.name for f in fields(Checkpoint)}
    checkpoint = Checkpoint(**{key: value for key, value in content.items() if key in known and value is not None})
    shapes = _shapes_of(checkpoint.model_args)
    for kind in checkpoint.kinds:
        if shapes != {key: value.shape for key, value in checkpoint.weights(kind).items()}:
            raise UserError(f"{flag} {path}: its weights are not those of the {checkpoint.model_args.get('model')} it "
                            "says it holds")
    return checkpoint


def _what_is_wrong(content):
    """Why this dict is no checkpoint, or None."""
    for kind in KINDS:
        weights = content.get(kind)
        if weights is not None and not isinstance(weights, dict):
            return f"its `{kind}` is a {type(weights).__name__}, expected a state dict"
        if weights and not all(isinstance(value, torch.Tensor) for value in weights.values()):
            return f"its `{kind}` holds other things than tensors"
    averages = content.get("averages") or {}
    if not isinstance(averages, dict) or not all(isinstance(weights, dict) and all(
            isinstance(value, torch.Tensor) for value in weights.values()) for weights in averages.values()):
        return "its `averages` are no state dicts"
    if not (content.get("ema") or content.get("model")):
        return f"found {', '.join(map(str, content))[:80] or 'nothing'}; expected `ema` or `model`, or a state dict"
    for key, kinds in (("args", (dict, argparse.Namespace)), ("model_args", dict), ("label_names", list)):
        if content.get(key) is not None and not isinstance(content[key], kinds):
            return f"its `{key}` is a {type(content[key]).__name__}"
    if content.get("model_args") is not None and not isinstance(content.get("args"), dict):
        return "it has `model_args` but no `args`"
    return None


def _read_pickle(path, flag):
    try:  # the published layout keeps its flags in a Namespace; nothing else is let in
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch raise a dozen kinds for damaged or unsafe files
        raise UserError(f"{flag} {path}: not a checkpoint that can be loaded safely ({_reason(error)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{flag} {path}: not a checkpoint (found {type(content).__name__}, expected a dict)")
    bare = content and all(isinstance(value, torch.Tensor) for value in content.values())
    return {"ema": content, "bare": True} if bare else content


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


def _identify(content, where):
    """`model_args` and `args` of a file that does not say what it holds, from the shapes of its weights."""
    shapes = {key: value.shape for key, value in (content["ema"] or content["model"]).items()}
    for name, make in MODELS.items():
        sizes = make.sizes_of(shapes)
        if sizes and _shapes_of({"model": name, **sizes}) == shapes:
            break
    else:
        raise UserError(f"{where}: its {len(shapes)} weights fit none of {' '.join(MODELS)}")
    said = {"image_size": None, "vae": None, "image_space": None, "multi_scale": None, **(content.get("args") or {})}
    return {"model_args": {"model": name, **sizes},
            "args": said | {"model": name, "num_classes": sizes["num_classes"], "in_channels": sizes["in_channels"]}}


def _shapes_of(model_args):
    """Name -> shape of the weights of the model with these arguments; None where there is no such model."""
    sizes = dict(model_args)
    try:
        with torch.device("meta"):
            model = MODELS[sizes.pop("model")](**sizes)
    except (KeyError, TypeError, ValueError):
        return None
    return {key: value.shape for key, value in model.state_dict().items()}


def build(checkpoint, kind="ema"):
    """The net of a Checkpoint with the weights that `kind` names, in evaluation mode."""
    sizes = dict(checkpoint.model_args)
    model = MODELS[sizes.pop("model")](**sizes)
    model.load_state_dict({key: value.float() for key, value in checkpoint.weights(kind).items()})
    return model.eval().requires_grad_(False)


def check_flag(path, name, asked, found):
    """A flag that disagrees with the checkpoint is an error; None means not given, or not said by the file."""
    same = MODELS.get(asked, asked) == MODELS.get(found, found)  # DiT-S and DiT-S/2 are one model
    if None not in (asked, found) and not same:
        flag = "--" + name.replace("_", "-")
        raise UserError(f"{flag} {asked}: {path} was trained with {flag} {found}; leave the flag out or change it")


def weights_alone(checkpoint, kind, half=False):
    """What `save` writes of one kind of weights, as `ema` or `model`: them and the plain values, no optimiser."""
    weights = {key: value.half() if half else value for key, value in checkpoint.weights(kind).items()}
    place = "model" if kind == "model" else "ema"
    return {key: getattr(checkpoint, key) for key in SAID} | {"ema": {}, "model": {}, place: weights}


def save_safetensors(path, state):
    """Write a dict of `weights_alone` as safetensors: weights under their published names, the rest in the header."""
    kind = "ema" if state["ema"] else "model"
    kid = state.get("best_kid")
    said = json.dumps({"kind": kind, **{key: state.get(key) for key in SAID},
                       "best_kid": None if kid == math.inf else kid})  # json has no infinity
    tensors = {key: value.contiguous() for key, value in state[kind].items()}
    write_atomically(path, lambda temporary: temporary.write_bytes(to_bytes(tensors, {METADATA: said})))


def summary(checkpoint):
    """A few lines about a Checkpoint, for people."""
    weights = checkpoint.weights(checkpoint.default_kind)
    size = sum(value.numel() for value in weights.values())
    dtypes = {str(value.dtype).removeprefix("torch.") for value in weights.values()}
    names = {"ema": "averaged", "model": "raw"}
    held = " and ".join(names.get(kind, f"averaged ({kind[4:]})") for kind in checkpoint.kinds)
    held = "averaged or raw (not said)" if checkpoint.bare else held
    trained, sizes = checkpoint.args, checkpoint.model_args

    def said(value, text="{}"):
        return "not said" if value is None else text.format(value)

    kid = checkpoint.best_kid
    return "\n".join([
        f"{sizes['model']}, {size:,} values, {held} weights, {' and '.join(sorted(dtypes))}",
        f"step {said(checkpoint.step)}, epoch {said(checkpoint.epoch)}, "
        f"best KID {said(None if kid in (None, math.inf) else 1e3 * kid, '{:.2f}e-3')}",
        f"{said(trained.get('image_size'), '{} px')}, VAE {said(checkpoint.codec or trained.get('vae'))}, "
        f"{sizes['num_classes']} labels: {said(checkpoint.label_names and ' '.join(checkpoint.label_names))}"])


def main():
    args = parser().parse_args()
    if args.to and not args.to.parent.is_dir():
        raise UserError(f"--to {args.to}: no such folder as {args.to.parent}; make it first")
    checkpoint = load(args.file, flag="FILE")
    print(summary(checkpoint))
    if args.to is None:
        return
    kind = args.weights or checkpoint.default_kind
    if kind not in checkpoint.kinds:
        raise UserError(f"--weights {kind}: {args.file} holds {', '.join(checkpoint.kinds)}; give one of them")
    write = save_safetensors if args.to.suffix == ".safetensors" else save
    write(args.to, weights_alone(checkpoint, kind, args.half))
    print(f"{args.to}: {args.to.stat().st_size / 1e6:.1f} MB")


def parser():
    p = Parser(__doc__)
    p.add_argument("file", type=Path, help="a checkpoint of any layout")
    p.add_argument("--to", type=Path, metavar="FILE", help="write the weights to a .safetensors or .pt file")
    p.add_argument("--weights", metavar="KIND",
                   help="ema, model (raw) or ema:DECAY (default: averaged if there are any)")
    p.add_argument("--half", action="store_true", help="write them in half precision")
    return p


if __name__ == "__main__":
    run(main)
