"""What train.py has logged of one or more runs, as curves: a panel for each kind of value, against the step."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from core.errors import UserError
from core.files import read_jsonl
from core.runs import METRICS

PANELS = (  # title, values with their line styles, whether the axis is logarithmic
    ("training loss", {"loss": "-"}, True),
    ("validation KID × 1e-3 (dashed: raw weights)", {"kid": "-", "kid_raw": "--"}, True),
    ("norm of the gradient", {"gradient_norm": "-"}, True),
    ("learning rate", {"lr": "-"}, False),
    ("root mean square of the state (dashed: hidden channels)", {"state_rms": "-", "hidden_rms": "--"}, False),
    ("images per second", {"images_per_second": "-"}, False),
    ("peak memory, MiB", {"memory_mib": "-"}, False))
BINS = ("loss_t0", "loss_t1", "loss_t2", "loss_t3", "loss_t4")
STEPS = ("0–199", "200–399", "400–599", "600–799", "800–999")
UNSMOOTHED = ("kid", "kid_raw", "lr", "memory_mib")  # exact, or too few


def read(folder):
    """Name of each logged value -> its steps and values, two arrays. Raises UserError."""
    file = Path(folder) / "metrics.jsonl"
    if not file.is_file():
        raise UserError(f"{folder}: no metrics.jsonl; give a run folder of train.py")
    curves = {}
    for record in read_jsonl(file, "remove the run", METRICS):
        for name in record.keys() - {"step"}:
            if record[name] is not None:  # what was not finite
                curves.setdefault(name, []).append((record["step"], record[name]))
    return {name: np.array(points, float).T for name, points in curves.items()}


def smoothed(values, length):
    """Exponentially weighted means (n,) of values (n,): each weighs 1 − 1/length times what its successor weighs."""
    weight, total, mean = 0.0, 0.0, []
    for value in values:
        weight, total = weight * (1 - 1 / length) + 1, total * (1 - 1 / length) + value
        mean.append(total / weight)
    return np.array(mean)


def draw(axes, curve, name, length, **style):
    """A curve (steps, values): smoothed, and pale as it is."""
    steps, values = curve
    scale = 1e3 if name.startswith("kid") else 1
    if name in UNSMOOTHED or length == 1:
        axes.plot(steps, scale * values, marker="." if name.startswith("kid") else None, **style)
    else:
        axes.plot(steps, scale * values, **style | {"alpha": 0.25, "label": None, "linewidth": 0.8})
        axes.plot(steps, scale * smoothed(values, length), **style)


def draw_floor(axes, curves, colour):
    """The noise floor of a run's KID."""
    if curves.keys() >= {"kid_floor", "kid_floor_std"}:
        mean, std = (1e3 * curves[name][1][-1] for name in ("kid_floor", "kid_floor_std"))
        axes.axhspan(mean - std, mean + std, color=colour, alpha=0.15, label="noise floor")


def plot(runs, length, panels=PANELS, bins=True, columns=4, colours=None):
    """Run name -> curves -> figure: those of `panels` that a run has values for and, if `bins`, the loss by step.

    length: log lines over which a curve is smoothed. colours: run name -> colour (None: matplotlib's, in order).
    """
    known = {name for curves in runs.values() for name in curves}
    panels = [panel for panel in panels if known & panel[1].keys()]
    bins = bins and bool(known & {*BINS})
    colours = colours or {name: f"C{i}" for i, name in enumerate(runs)}
    count = len(panels) + bins
    columns = min(columns, max(1, count))
    figure = Figure(figsize=(4.2 * columns, 3.2 * -(-count // columns)), layout="constrained")
    places = list(figure.subplots(-(-count // columns), columns, squeeze=False).flat)
    for axes, (title, styles, logarithmic) in zip(places, panels, strict=False):
        for name, curves in runs.items():
            for value, line in styles.items():
                if value in curves:
                    label = name if value == next(iter(styles)) else None
                    draw(axes, curves[value], value, length, color=colours[name], linestyle=line, label=label)
            if "kid" in styles:
                draw_floor(axes, curves, "grey" if len(runs) == 1 else colours[name])
        finish(axes, title, logarithmic)
    if bins:
        draw_bins(places[len(panels)], *next(iter(runs.items())), length)
    for axes in places[count:]:
        axes.remove()
    return figure


def draw_bins(axes, name, curves, length):
    """The loss of one run by diffusion step."""
    for i, (value, steps) in enumerate(zip(BINS, STEPS, strict=True)):
        if value in curves:
            draw(axes, curves[value], value, length, color=matplotlib.colormaps["viridis"](i / 4.5), label=steps)
    finish(axes, f"squared error by diffusion step, {name}", True)


def finish(axes, title, logarithmic):
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("step")
    if logarithmic:  # with the little below zero that a KID may be
        axes.set_yscale("symlog" if "KID" in title else "log", **({"linthresh": 10} if "KID" in title else {}))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
