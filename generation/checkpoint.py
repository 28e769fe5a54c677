"""Checkpoints: plain dicts of tensors, numbers and strings, written whole, from which the net is rebuilt.

    python -m generation.checkpoint FILE                                  say what is inside; or a run folder
    python -m generation.checkpoint FILE --to out.safetensors             weights alone, with what the file says of them
    python -m generation.checkpoint FILE --to small.pt --half             the same as a checkpoint, in half precision

Keys of a file of ours: `model` and `ema` (raw and averaged weights under the published names), `averages` (further
averages: decay -> weights), `opt`, `scaler`, `step`, `epoch`, `args` (the resolved flags), `label_names`, `model_args`
(name and sizes), `best_kid`, `minutes`, `history` (flags that changed when it was continued), `codec`, `run`,
`features`, `training_images` (their fingerprint), `seen` (identities of all images that the weights have seen),
`format_version`. The published layout has `model`, `ema`, `opt` and `args`, in which it finds our weights too. Read
are ours, the published layout, bare state dicts and safetensors; what a file does not say is None.
"""

import argparse
import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

from core.cli import Parser, run
from core.errors import UserError
from core.files import read_torch, refused, remove_leftovers, write_torch
from core.runs import checkpoint_file
from core.schema import Number, check, parse
from core.tensors import all_finite, read_tensors, write_tensors
from core.text import one_line
from models import MODELS

FORMAT = 1
PREFIX = "module."  # in front of the names of published files: weights were saved from inside DistributedDataParallel
KINDS = ("ema", "model")
HEADER = {"kind?": KINDS}  # schema of the plain values in a safetensors header; SCHEMA has the others
STATE_DICT, SIDE, COUNT = {str: torch.Tensor}, Number(8, 2048), Number(1, 1 << 20)
FLAGS = {"vae?": (str, None), "num_classes?": (COUNT, None), "in_channels?": (COUNT, None), "fold?": (Number(), None),
         "image_space?": (bool, None), "multi_scale?": (bool, None)}  # schema of those flags that are looked at
SCHEMA = {"format_version?": int, "model?": (STATE_DICT, None), "ema?": (STATE_DICT, None),
          "averages?": ({str: STATE_DICT}, None),
          "label_names?": ([str], None), "step?": (Number(), None), "epoch?": (Number(), None),
          "best_kid?": (Number(-math.inf, math.inf, False), None), "minutes?": (Number(0, math.inf, False), None),
          "codec?": (str, None), "run?": (str, None), "features?": (str, None), "training_images?": (str, None),
          "seen?": ([str], None), "opt?": ({}, None), "scaler?": ({}, None), "validated?": ([torch.Tensor], None),
          "history?": ([{}], None)}
OURS = {**SCHEMA, "args": {**FLAGS, "model": str, "image_size": SIDE}, "model_args": {
    "model": str, "num_classes": COUNT, "in_channels": COUNT, "input_size?": Number(1, 2048),
    "position_code?": str}}
FOREIGN = {**SCHEMA, "model_args?": None,
           "args?": ({**FLAGS, "model?": (str, None), "image_size?": (SIDE, None)}, None)}
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
    history: list = field(default_factory=list)  # how it was continued: {"step": …, "changed": flag -> [before, after]}
    codec: str | None = None  # identity of the autoencoder: name:hash
    run: str | None = None  # name of the run folder
    features: str | None = None  # identity of the feature space of best_kid
    training_images: str | None = None  # their fingerprint (dataset/root.py)
    seen: list | None = None  # identities (dataset/leaks.py) of all images it was trained on, by --load-from too
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
    """Read a checkpoint, ours or foreign, without executing anything in it -> Checkpoint. Raises UserError.

    `path`: a file, or a run folder (core/runs.py says which of its files is meant).
    """
    path = checkpoint_file(path, flag)
    if not path.is_file():
        raise UserError(f"{flag} {path}: no such file; train.py writes RUN/checkpoints/best_ckpt.pt")
    content = _read_safetensors(path, flag) if path.suffix == ".safetensors" else _read_pickle(path, flag)
    version = content.get("format_version", FORMAT)
    if isinstance(version, int) and version != FORMAT:
        raise UserError(f"{flag} {path}: has format {version}, expected {FORMAT}; update this program")
    if isinstance(content.get("args"), argparse.Namespace):
        content["args"] = vars(content["args"])
    try:
        check(content, FOREIGN if content.get("model_args") is None else OURS)
    except ValueError as error:
        raise UserError(f"{flag} {path}: not a checkpoint ({error})") from None
    if not (content.get("ema") or content.get("model")):
        found = one_line(", ".join(map(str, content)))[:80] or "nothing"
        raise UserError(f"{flag} {path}: not a checkpoint (found {found}; expected `ema` or `model`, or a state dict)")
    content |= {kind: _without_prefix(content.get(kind) or {}) for kind in KINDS}
    if content.get("model_args") is None:
        content |= _identify(content, f"{flag} {path}")
    known = {f.name for f in fields(Checkpoint)}
    checkpoint = Checkpoint(**{key: value for key, value in content.items() if key in known and value is not None})
    shapes = _shapes_of(checkpoint.model_args)
    for kind in checkpoint.kinds:
        weights = checkpoint.weights(kind)
        if shapes != {key: value.shape for key, value in weights.items()}:
            raise UserError(f"{flag} {path}: its weights are not those of the {checkpoint.model_args.get('model')} it "
                            "says it holds")
        with refused(f"{flag} {path}", "give whole weights"):  # sparse ones, or of a kind that is not computed with
            finite = all_finite(weights.values())
        if not finite:
            raise UserError(f"{flag} {path}: its weights `{kind}` are not finite, as of a training that diverged; give "
                            "an earlier checkpoint")
    return checkpoint


def _read_pickle(path, flag):
    # The published layout keeps its flags in a Namespace; nothing else is let in.
    content = read_torch(path, flag, "give a checkpoint of train.py, or weights", [argparse.Namespace])
    if not isinstance(content, dict):
        raise UserError(f"{flag} {path}: not a checkpoint (found {type(content).__name__}, expected a dict)")
    bare = content and all(isinstance(value, torch.Tensor) for value in content.values())
    return {"ema": content, "bare": True} if bare else content


def _read_safetensors(path, flag):
    weights, about = read_tensors(path, "give a whole file")
    said = {"bare": True}
    if METADATA in about:
        with refused(f"{flag} {path}", "give a whole file"):
            said = parse(about[METADATA], HEADER)
            if said.keys() & {"ema", "model"}:
                raise ValueError("its header holds weights")
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
    except (KeyError, TypeError, ValueError, RuntimeError):
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
    write_tensors(path, state[kind], {METADATA: said})


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
    remove_leftovers(args.to.parent)
    write = save_safetensors if args.to.suffix == ".safetensors" else save
    write(args.to, weights_alone(checkpoint, kind, args.half))
    print(f"{args.to}: {args.to.stat().st_size / 1e6:.1f} MB")


def parser():
    p = Parser(__doc__)
    p.add_argument("file", type=Path, help="a checkpoint of any layout, or a run folder")
    p.add_argument("--to", type=Path, metavar="FILE", help="write the weights to a .safetensors or .pt file")
    p.add_argument("--weights", metavar="KIND",
                   help="ema, model (raw) or ema:DECAY (default: averaged if there are any)")
    p.add_argument("--half", action="store_true", help="write them in half precision")
    return p


if __name__ == "__main__":
    run(main)
