"""The life of one image, recorded while it is sampled: over diffusion time, and step by step inside calls.

Recording changes nothing: hooks of PyTorch see what the model is given and what it returns; which cells fire is read
from copies of the generators. Afterwards the steps inside a call are computed again (automaton/watch.py) and everything
is decoded. What is drawn of it: evaluation/growth.py.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from automaton import watch
from core.runtime import autocast
from diffusion import create_diffusion
from generation.guidance import guided
from generation.sampling import sample_images


class Call(NamedTuple):
    """One call of the model: what it was given, and what it returned. Of two copies the conditional one is first."""

    x: torch.Tensor  # (copies, C, h, w)
    t: torch.Tensor  # (copies,)
    y: torch.Tensor  # (copies, K)
    start: torch.Tensor | None  # (copies, S, h, w), for an automaton
    fire: torch.Tensor | None  # (steps, copies, h·w) bool, for an automaton
    out: torch.Tensor  # (copies, 2C, h, w)
    state: torch.Tensor | None  # (copies, S, h, w)


class Recorder:
    """Within it, the calls of a model at the original steps `times` are kept: `calls`, t -> Call.

    For one image at a time.
    """

    def __init__(self, model, times):
        self.model, self.times, self.calls, self.fire = model, {*times}, {}, None

    def __enter__(self):
        self.hooks = [self.model.register_forward_pre_hook(self.before), self.model.register_forward_hook(self.after)]
        return self

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()

    def before(self, model, given):
        """The draw that the model is about to make, made from copies: the generators themselves must not move."""
        x, t, _, state, generators = given
        if state is not None and int(t[0]) in self.times:
            self.fire = model.draw_fire(len(x), x.shape[2] * x.shape[3], [_copy(g) for g in generators])

    def after(self, model, given, returned):
        x, t, y, start, _ = given
        if int(t[0]) in self.times:
            self.calls[int(t[0])] = Call(x, t, y, start, self.fire, *returned)


def _copy(source):
    copy = torch.Generator()
    copy.set_state(source.get_state())
    return copy


@dataclass
class Inside:
    """One call of the automaton, before its first step and after each of K steps; the conditional copy."""

    answers: np.ndarray  # uint8 (K + 1, H, W, 3): x_0, guided and decoded, if the answer were read at that step
    hidden: np.ndarray  # (K + 1, channels, h, w)
    fire: np.ndarray  # bool (K, h, w): the cells that fire at each step
    reached: np.ndarray  # bool (K + 1, h, w): those that the seed cell can have influenced
    sources: np.ndarray  # bool (K + 1, h, w): those on whose state the watched cell's answer can depend
    attention: np.ndarray  # (K, heads, 3, 3): of the watched cell


@dataclass
class Moment:
    """One diffusion step; images are uint8 (H, W, 3), decoded."""

    t: int
    noisy: np.ndarray  # x_t
    predicted: np.ndarray  # x_0 as the model predicts it here, guided
    conditional: np.ndarray  # x_0 by the copy that is given the labels ...
    unconditional: np.ndarray | None  # ... and by that which is given none; None where it is not asked
    inside: Inside | None  # the steps of the automaton, where the model is one


@dataclass
class Life:
    """The life of one image."""

    moments: list  # of Moment, from noise to image
    image: np.ndarray  # uint8 (H, W, 3): the finished one, exactly what the sampling scripts write
    cell: tuple  # (row, column) of the watched cell
    seed_cell: tuple  # (row, column) where life starts

    def nearest(self, t):
        """The recorded diffusion step that is nearest to t."""
        return min((moment.t for moment in self.moments), key=lambda recorded: abs(recorded - t))


def evenly(times, count):
    """`count` of the times, evenly spaced, the first and the last among them; all if there are no more."""
    chosen = np.linspace(0, len(times) - 1, min(count, len(times))).round().astype(int)
    return [times[i] for i in chosen]


def visited(options):
    """The original steps t that a sampler visits, from noise to image."""
    return [int(t) for t in create_diffusion(str(options.steps)).timestep_map[::-1]]


def live(model, codec, labels, number, grid, options, device, times, cell=None, before_step=None):
    """Sample image `number` with these labels (1, K) -> its Life at the original steps `times`.

    grid (rows, columns); `cell` (row, column) is the one that is watched, by default a quarter from the upper left;
    `before_step` as in generation/sampling.py.
    """
    cell = cell or (grid[0] // 4, grid[1] // 4)
    with Recorder(model, times) as recorder:
        ((_, images),) = sample_images(model, codec, labels, [number], grid, options, device, before_step=before_step)
    read = Reader(codec, options)
    moments = []
    with torch.no_grad(), autocast(options.precision, device):
        for t, call in recorder.calls.items():
            within = None if call.state is None else look_inside(model, read, call, cell)
            halves = [read.prediction(call, half[None]) for half in call.out]
            moments.append(Moment(t, read.decoded(call.x[:1]), read.prediction(call, call.out), halves[0],
                                  halves[1] if len(halves) > 1 else None, within))
    return Life(moments, images[0], tuple(cell), (grid[0] // 2, grid[1] // 2))


class Reader:
    """From what a model returns to the picture that it means."""

    def __init__(self, codec, options):
        self.codec, self.scale, self.diffusion = codec, options.cfg_scale, create_diffusion(str(options.steps))
        self.index = {int(t): i for i, t in enumerate(self.diffusion.timestep_map)}

    def decoded(self, latents):
        """(1, C, h, w) -> uint8 (H, W, 3)."""
        return self.codec.decode(latents.float())[0].cpu().numpy()

    def prediction(self, call, out):
        """x_0 by an output of one copy, or of both, which are then guided -> uint8 (H, W, 3)."""
        out = guided(out, self.scale) if len(out) == 2 else out
        i = torch.full((1,), self.index[int(call.t[0])])
        return self.decoded(self.diffusion.p_mean_variance(out, call.x[:1], i).pred_xstart)


def look_inside(model, read, call, cell):
    """The Inside of one call of an automaton."""
    c, grid = model.condition(call.t, call.y), call.x.shape[2:]
    states = watch.states(model, call.x, call.start, c, call.fire, model.engine)  # (K + 1, copies, S, h, w)
    answers = [read.prediction(call, state[:, : model.out_channels]) for state in states]
    attention = [watch.attention_weights(model, call.x, state, c, cell)[0] for state in states[:-1]]
    fire, seed = call.fire[:, 0], (grid[0] // 2, grid[1] // 2)  # fire (K, h·w) of the conditional copy
    return Inside(np.stack(answers), np.stack([channels(model, state[0]) for state in states]),
                  fire.view(-1, *grid).numpy(), watch.reached(fire, grid, seed).numpy(),
                  watch.sources(fire, grid, cell).numpy(), torch.stack(attention).float().cpu().numpy())


def channels(model, state):
    """The hidden channels of one state (S, h, w), as an array (hidden, h, w)."""
    return state[model.out_channels:].float().cpu().numpy()
