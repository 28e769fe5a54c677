"""How the local rule is applied for a number of steps: computing every cell, or only what can have changed.

`dense` computes every cell at every step, as automaton/reference.py writes it. `asynchronous` gives the same result for
half the arithmetic. It rests on two facts (a call has one input and one condition, and half of the cells rest):

    a cell that does not fire now needs no query, no MLP and no update;
    a cell that did not fire at the last step still has the key and value it had before.

So a cache holds the key and value of every cell, and each step (a) renews the rows of the cache whose cells fired at
the last step, then (b) computes the update of the cells that fire now, from their states and the cache.

Training must go backward through this. `_Recomputed` keeps little of the forward pass and computes most of it again:

    kept, per step        the old state, keys and values of the rows that are overwritten; the results of the four
                          large matrix products of the cells that fire (queries, attention output, both of the MLP)
    computed again        norms, modulation, attention, activations: most of the memory, little of the time
    why backward can      Overwriting is undone by putting the old rows back. Backward visits the steps from last to
    walk the other way    first; before it differentiates step i it has restored state and cache to what they were at
                          step i, so that the step can be differentiated alone, with its kept products in place of new
                          ones. Nothing else of the past is needed.

Shapes: N images of L = H·W cells; `base` (N, L, D) is the part of the embedding that no step changes, `state` (N, L, S)
the output and hidden channels, `m` the modulation, `fire` (steps, N, L) bool which cells fire. R is the number of rows,
cells of one image, that a step computes.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from automaton import graphs
from automaton.rule import Cache, Modulation


def grow(rule, x, state, c, fire, engine="auto"):
    """Apply the rule len(fire) times.

    x (N, C, H, W) input, state (N, S, H, W), c (N, D) condition, fire (steps, N, H·W) bool on the CPU (pinned where
    the rest is on a GPU) -> state (N, S, H, W). `engine`: "dense", "asynchronous", or "auto": dense where every cell
    fires.
    """
    if engine == "auto":
        engine = "dense" if fire.all() else "asynchronous"
    cells = state.flatten(2).transpose(1, 2).contiguous()  # (N, L, S)
    cells = ENGINES[engine](rule, rule.base(x), cells, rule.modulation(c), fire, state.shape[2:])
    return cells.transpose(1, 2).reshape(state.shape)


def dense(rule, base, state, m, fire, grid):
    """Every cell at every step; in training, with `rule.checkpoint_steps`, each step is computed again for backward."""

    def step(state, fires, *m):
        m, e = Modulation(*m), rule.embed(base, state)  # (N, L, D)
        q, k, v = rule.project(e, m, "qkv")  # (N, L, D) each
        attended = rule.attend(q.flatten(0, 1), k, v, None, grid).view_as(e)  # (N, L, D)
        return state + fires[..., None] * rule.update(e, attended, m)  # (N, L, S)

    again = rule.checkpoint_steps and torch.is_grad_enabled()
    for fires in fire.to(state.device, non_blocking=True):  # (N, L)
        state = checkpoint(step, state, fires, *m, use_reentrant=False) if again else step(state, fires, *m)
    return state


def asynchronous(rule, base, state, m, fire, grid):
    """Only the cells that fire, and the cache of those that fired at the step before."""
    if graphs.wanted(state):
        return _replayed(rule, base, state, m, fire, grid)
    steps = firing_rows(fire, state.device)
    if not torch.is_grad_enabled():
        return _in_place(rule, base, state.clone(), m, steps, grid)
    if rule.checkpoint_steps:
        return _Recomputed.apply(rule, steps, grid, base, state, *m, *rule.step_parameters())
    return _everything_kept(rule, base, state, m, steps, grid)


# ---- the rows of a step


class Step:
    """The rows of the (N, L, ...) cells that one step computes, R of each image: how to read and write them.

    `rows` (N·R,): indices into the N·L cells. R is the largest number of firing cells of any image. An image with fewer
    is filled up with cells that rest, where `fires` (N, R, 1) is 0: then all images have the same number of rows, and
    what is one per image (the modulation) broadcasts over them without a copy. With `image` (R,), the image of each
    row, the rows of all images stand in one list, (1, R, D), and the modulation is looked up for each: what is fused
    reads it once either way, and only the list is filled up.
    """

    def __init__(self, rows, fires, image=None):
        self.rows, self.fires, self.image = rows, fires, image

    def modulation(self, m):
        """What broadcasts over the rows: of Modulation (N, 1, D)."""
        return m if self.image is None else Modulation(*(part[:, 0].index_select(0, self.image)[None] for part in m))

    def of(self, cells):
        """(N, L, D) -> its rows (N, R, D)."""
        return cells.flatten(0, 1).index_select(0, self.rows).view(*self.fires.shape[:2], cells.shape[-1])

    def put(self, cells, values):
        """A copy of (N, L, D) with other rows (N, R, D)."""
        return cells.flatten(0, 1).index_copy(0, self.rows, values.flatten(0, 1).to(cells.dtype)).view_as(cells)

    def put_(self, cells, values):
        """The same in place."""
        cells.view(-1, cells.shape[-1]).index_copy_(0, self.rows, values.flatten(0, 1).to(cells.dtype))

    def add_(self, cells, values):
        """Add to these rows, in place."""
        cells.view(-1, cells.shape[-1]).index_add_(0, self.rows, values.flatten(0, 1).to(cells.dtype))

    def clear_(self, cells):
        """Set these rows to 0, in place."""
        cells.view(-1, cells.shape[-1]).index_fill_(0, self.rows, 0)


def firing_rows(fire, device):
    """fire (steps, N, L) bool on the CPU -> a Step on `device` for every step at which any cell fires."""
    most = fire.sum(2).amax(1).tolist()  # shapes must be known on the host; everything else happens on the device
    order, fire = _fireable(fire, device)
    return [_step(cells[:, :count], fires) for cells, fires, count in zip(order, fire, most, strict=True) if count]


def _fireable(fire, device):
    """-> of each image the cells of each step, those that fire first (steps, N, L), and `fire`; both on `device`."""
    fire = fire.to(device, non_blocking=True)
    return fire.byte().argsort(dim=2, descending=True, stable=True), fire


def _step(cells, fires, image=None):
    """The Step of these cells (N, R) of each image; fires (N, L) bool."""
    first = torch.arange(len(fires), device=fires.device)[:, None] * fires.shape[1]  # (N, 1): cell 0 of each image
    return Step((cells + first).flatten(), fires.gather(1, cells)[..., None], image)


# ---- the parts of a step; in place, so that torch.compile can fuse each with the reading and writing of its rows


def _first_cache(rule, base, state, m):
    """The cache of all cells."""
    return Cache(*(part.contiguous() for part in rule.cache(base, state, m)))


def _renew_(rule, cache, base, state, m, fired):
    """Compute the cache of the rows `fired` from the state as it is now."""
    values = rule.cache(fired.of(base), fired.of(state), fired.modulation(m))
    for part, value in zip(cache, values, strict=True):
        fired.put_(part, value)


def _ask(rule, base, state, m, step, linear=F.linear):
    """Embeddings and queries of the rows of a step, (N, R, D) each."""
    return rule.query(step.of(base), step.of(state), step.modulation(m), linear)


def _answer_(rule, e, attended, state, m, step, linear=F.linear):
    """Add to the state what the rows make of what they attended to."""
    update = rule.update(e, attended.view_as(e), step.modulation(m), linear)  # (N, R, S)
    step.put_(state, step.of(state) + step.fires * update)


class Parts(NamedTuple):
    """The functions above, or what torch.compile makes of them."""

    first_cache: Callable = _first_cache
    renew_: Callable = _renew_
    ask: Callable = _ask
    answer_: Callable = _answer_

    def move_(self, rule, cache, base, state, m, step, grid, linear=F.linear):
        """Add the update of one step to the state, in place."""
        e, q = self.ask(rule, base, state, m, step, linear)
        attended = rule.attend(q.flatten(0, 1), *cache, step.rows, grid)  # (N·R, D)
        self.answer_(rule, e, attended, state, m, step, linear)


@lru_cache(maxsize=1)
def _fused():
    """For any number of cells, so that it happens once."""
    return Parts(*(torch.compile(part, dynamic=True) for part in Parts()))


# ---- forward


def _in_place(rule, base, state, m, steps, grid):
    """Without gradients: state and cache are overwritten."""
    cache, fired, parts = None, None, _fused() if rule.fused else Parts()
    for step in steps:
        if cache is None:
            cache = parts.first_cache(rule, base, state, m)
        else:
            parts.renew_(rule, cache, base, state, m, fired)
        parts.move_(rule, cache, base, state, m, step, grid)
        fired = step
    return state


def _replayed(rule, base, state, m, fire, grid):
    """The same by a CUDA graph: as many rows at every step, of cells that rest where fewer fire."""
    if rule.fused:  # one list of the cells of all images
        fire = fire.flatten(1)[:, None]  # (steps, 1, N·L)
    most = int(fire.sum(2).max())
    count = min(-(-most // graphs.ROUND) * graphs.ROUND, fire.shape[2])
    order, fire = _fireable(fire, state.device)
    cells = state.shape[1]

    def call(base, state, order, fire, *m):
        image = [part.flatten() // cells if rule.fused else None for part in order]
        steps = [_step(*parts) for parts in zip(order, fire, image, strict=True)]
        return _in_place(rule, base, state.clone(), Modulation(*m), steps, grid)

    inputs = [base, state, order[..., :count].contiguous(), fire, *m]
    return graphs.replay(rule, (grid, rule.fused), call, inputs).clone()


def _everything_kept(rule, base, state, m, steps, grid):
    """With gradients, autograd keeping whatever it wants: fastest, and with the most memory."""
    cache = fired = None
    for step in steps:
        if cache is None:
            cache = _first_cache(rule, base, state, m)
        else:
            renewed = rule.cache(fired.of(base), fired.of(state), m)
            cache = Cache(*(fired.put(part, values) for part, values in zip(cache, renewed, strict=True)))
        old = step.of(state)  # (N, R, S)
        state = step.put(state, old + step.fires * rule.step_update(step.of(base), old, *cache, m, step.rows, grid))
        fired = step
    return state


# ---- backward with recomputation


class Recorder:
    """F.linear that remembers its results, in order."""

    def __init__(self):
        self.results = []

    def __call__(self, x, weight, bias=None):
        self.results.append(F.linear(x, weight, bias))
        return self.results[-1]


class Replay:
    """F.linear whose results are known already: no product now, and the right gradients in backward."""

    def __init__(self, results):
        self.results = iter(results)

    def __call__(self, x, weight, bias=None):
        known = next(self.results)
        return _KnownLinear.apply(x.to(known.dtype), weight.to(known.dtype), bias, known)


class _KnownLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, known):
        ctx.save_for_backward(x, weight)
        return known.view_as(known)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows, (needs_x, needs_weight, needs_bias, _) = grad.flatten(0, -2), ctx.needs_input_grad
        return (grad @ weight if needs_x else None, rows.T @ x.flatten(0, -2) if needs_weight else None,
                rows.sum(0) if needs_bias else None, None)


class Moved(NamedTuple):
    """Kept of the rows that a step moved: their state before it, and the results of its matrix products."""

    old_state: torch.Tensor  # (N, R, S)
    queries: torch.Tensor  # (N, R, D)
    attention_output: torch.Tensor  # (N, R, D)
    mlp_hidden: torch.Tensor  # (N, R, MLP)
    mlp_output: torch.Tensor  # (N, R, D)

    @property
    def products(self):
        """In the order in which `LocalRule.step_update` asks for them."""
        return self[1:]


class Overwritten(NamedTuple):
    """Kept of the rows of the cache that were renewed before a step: what stood there."""

    k: torch.Tensor  # (N, R, D)
    v: torch.Tensor  # (N, R, D)


def _grouped(tensors, kind):
    """A flat list of tensors -> a list of named tuples."""
    size = len(kind._fields)
    return [kind(*tensors[i:i + size]) for i in range(0, len(tensors), size)]


class _Recomputed(torch.autograd.Function):
    """The asynchronous engine for training; the head of this file says what is kept and why that is enough."""

    @staticmethod
    def forward(ctx, rule, steps, grid, base, state, *m_and_parameters):
        count = len(Modulation._fields)
        m, parameters = Modulation(*m_and_parameters[:count]), m_and_parameters[count:]
        state, cache, fired = state.clone(), None, None
        moved, overwritten = [], []  # a Moved per step, an Overwritten per step but the first
        for step in steps:
            if cache is None:
                cache = _first_cache(rule, base, state, m)
            else:
                overwritten.append(Overwritten(fired.of(cache.k), fired.of(cache.v)))
                _renew_(rule, cache, base, state, m, fired)
            old, products = step.of(state), Recorder()
            Parts().move_(rule, cache, base, state, m, step, grid, products)
            moved.append(Moved(old, *products.results))
            fired = step
        # Parameters are saved only so that PyTorch notices if they change before backward.
        groups = [parameters, (base, state), m, cache or (), [t for part in moved for t in part],
                  [t for part in overwritten for t in part]]
        ctx.save_for_backward(*(tensor for group in groups for tensor in group))
        ctx.sizes = [len(group) for group in groups]
        ctx.rule, ctx.steps, ctx.grid = rule, steps, grid
        # Without autocast's cache: older PyTorch would find casts in it that were made without gradients.
        ctx.autocast = {"device_type": base.device.type, "enabled": torch.is_autocast_enabled(base.device.type),
                        "dtype": torch.get_autocast_dtype(base.device.type), "cache_enabled": False}
        return state

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        saved = iter(ctx.saved_tensors)
        _, (base, state), m, cache, moved, overwritten = ([next(saved) for _ in range(n)] for n in ctx.sizes)
        m = Modulation(*m)
        with torch.autocast(**ctx.autocast):
            back = _Backward(ctx.rule, base, state.clone(), m, [part.clone() for part in cache], ctx.grid,
                             grad.clone(memory_format=torch.contiguous_format))
            back.walk(ctx.steps, _grouped(moved, Moved), _grouped(overwritten, Overwritten))
        grad_m = [total.to(t.dtype) for total, t in zip(back.grad_m, m, strict=True)]
        return (None, None, None, back.grad_base, back.grad_state, *grad_m, *back.grad_parameters)


class _Backward:
    """State and cache at one moment, and the gradients of what came after it; `walk` goes back in time.

    At the start they are those after the last step. Gradients that several steps add to are summed in float32.
    """

    def __init__(self, rule, base, state, m, cache, grid, grad):
        self.rule, self.base, self.state, self.m, self.cache, self.grid = rule, base, state, m, cache, grid
        self.parameters = rule.step_parameters()
        self.grad_state, self.grad_base = grad, torch.zeros_like(base)
        self.grad_cache = [torch.zeros_like(part, dtype=_sum_dtype(part)) for part in cache]
        self.grad_m = [torch.zeros_like(t, dtype=_sum_dtype(t)) for t in m]
        self.grad_parameters = [torch.zeros_like(p) if p.requires_grad else None for p in self.parameters]

    def walk(self, steps, moved, overwritten):
        """From the last step to the first; `moved` has an entry per step, `overwritten` one per step but the first."""
        for i in reversed(range(len(steps))):
            steps[i].put_(self.state, moved[i].old_state)  # the state as it was before step i; so is the cache
            self.through_move(steps[i], moved[i])
            if i:  # before it, the rows that had fired at step i - 1 were renewed from this state
                self.through_renewal(steps[i - 1], overwritten[i - 1])
        if steps:
            self.through_first_cache()

    def through_move(self, step, moved):
        """state += fires · update(base and state of the rows, keys and values of all cells)."""

        def update(base, state, k, v, m):
            return [self.rule.step_update(base, state, k, v, m, step.rows, self.grid, Replay(moved.products))]

        # The state itself passes on its gradient unchanged (state + ...): only the update is differentiated.
        grad_base, grad_state, grad_k, grad_v = self.differentiate(
            update, [step.of(self.base), moved.old_state, *self.cache], [step.fires * step.of(self.grad_state)])
        step.add_(self.grad_base, grad_base)
        step.add_(self.grad_state, grad_state)
        self.grad_cache[0] += grad_k
        self.grad_cache[1] += grad_v

    def through_renewal(self, fired, old):
        """cache[rows] = cache(base[rows], state[rows]), the rows `fired`; then undo it.

        What stood in these rows before has no part in the new values: its gradient starts again at 0.
        """
        grad_base, grad_state = self.through_cache(fired.of(self.base), fired.of(self.state),
                                                   [fired.of(grad) for grad in self.grad_cache])
        fired.add_(self.grad_base, grad_base)
        fired.add_(self.grad_state, grad_state)
        for grad, part, values in zip(self.grad_cache, self.cache, old, strict=True):
            fired.clear_(grad)
            fired.put_(part, values)

    def through_first_cache(self):
        """cache = cache(base, state), of all cells and the state that the call began with."""
        grad_base, grad_state = self.through_cache(self.base, self.state, self.grad_cache)
        self.grad_base += grad_base
        self.grad_state += grad_state

    def through_cache(self, base, state, grad_cache):
        """Gradients of `LocalRule.cache` to base and state. Nobody reads keys and values here: any numbers will do."""
        unread = self.cache[0].new_empty(1).expand(*base.shape[:2], 2 * base.shape[2])
        return self.differentiate(lambda base, state, m: self.rule.cache(base, state, m, Replay([unread])),
                                  [base, state], grad_cache)

    def differentiate(self, function, inputs, grad_outputs):
        """Gradients of function(*inputs, m) to its inputs; those to modulation and parameters are summed here."""
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_() for t in inputs]
            m = Modulation(*(t.detach().requires_grad_() for t in self.m))
            outputs = function(*inputs, m)
            grad_outputs = [g.to(out.dtype) for g, out in zip(grad_outputs, outputs, strict=True)]
            learnt = [p for p in self.parameters if p.requires_grad]
            grads = torch.autograd.grad(outputs, [*inputs, *m, *learnt], grad_outputs, allow_unused=True)
        totals = [*self.grad_m, *(total for total in self.grad_parameters if total is not None)]
        for total, g in zip(totals, grads[len(inputs):], strict=True):
            if g is not None:
                total += g
        return grads[:len(inputs)]


def _sum_dtype(tensor):
    """Twelve summands are too many for half precision."""
    return torch.promote_types(tensor.dtype, torch.float32)


ENGINES = {"dense": dense, "asynchronous": asynchronous}
