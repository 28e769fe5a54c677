"""Where the curves of a run go beside its folder: TensorBoard or Weights & Biases, through accelerate's trackers."""

import uuid
from importlib.util import find_spec

from core.errors import UserError
from core.files import write_text

TRACKERS = ("tensorboard", "wandb", "none")
PROJECT = "geca"  # of Weights & Biases; WANDB_PROJECT and the like are obeyed by wandb itself
IDENTITY = "wandb-id.txt"  # in the run folder: a run that goes on is one run there too


def check(name):
    """Raise UserError where the tracker of this name is not installed."""
    if name != "none" and find_spec(name) is None:
        raise UserError(f"--tracker {name}: the package is not installed; pip install {name}, or give another of "
                        f"{', '.join(TRACKERS)}")


def start(name, folder, step, about):
    """The tracker of a run folder that goes on after `step`: one of accelerate's, or None.

    `about`: flags, name -> plain value. Packages are imported here, by the process that logs alone.
    """
    from accelerate import PartialState, tracking

    if name == "none":
        return None
    PartialState()  # else accelerate's own messages are errors
    if name == "wandb":
        tracker = tracking.WandBTracker(PROJECT, name=folder.name, dir=str(folder), id=_identity(folder),
                                        resume="allow", config=about)
    else:
        tracker = tracking.TensorBoardTracker(folder.name, folder.parent, purge_step=step + 1)
    tracker.start()
    return tracker


def _identity(folder):
    file = folder / IDENTITY
    if not file.is_file():
        write_text(file, uuid.uuid4().hex[:12])
    return file.read_text(encoding="utf-8")


def log_picture(tracker, step, name, picture):
    """Show a picture, uint8 (H, W, 3)."""
    layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
    tracker.log_images({name: picture[None]}, step=step, **layout)
