"""How the local rule is applied for a number of steps: a readable way and a fast one with the same result.

`dense` computes every cell of every step: the reference. `asynchronous` gives the same result for half the arithmetic:
a cell that does not fire needs no query, MLP or update, and a cell that did not fire in the previous step has the
embedding, key and value it had before, since neither its state nor the condition has changed.

`base` (N, L, D) is what does not change of a cell's embedding, `state` (N, L, S) the living channels of L = H·W cells,
`m` the modulation, `fire` (steps, N, L) bool: which cells fire. All engines return the new state.
"""

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from automaton.rule import Modulation, Recorder, Replay
from core.random import on_device


def grow(rule, x, state, c, fire, engine="auto"):
    """Apply the rule len(fire) times.

    x (N, C, H, W) input, state (N, S, H, W), c (N, D) condition, fire (steps, N, H·W) bool on the CPU: which cells
    fire -> state (N, S, H, W). `engine`: "dense", "asynchronous", or "auto": dense where every cell fires.
    """
    if engine == "auto":
        engine = "dense" if fire.all() else "asynchronous"
    cells = state.flatten(2).transpose(1, 2).contiguous()  # (N, L, S)
    cells = ENGINES[engine](rule, rule.base(x), cells, rule.modulation(c), fire, state.shape[2:])
    return cells.transpose(1, 2).reshape(state.shape)


def dense(rule, base, state, m, fire, grid):
    """Every cell at every step; in training, with `rule.checkpoint_steps`, each step is computed again for backward."""

    def step(state, fires, *m):
        m = Modulation(*m)
        e, k, v = rule.tables(base, state, m)
        return state + fires[..., None] * rule.step_update(e, k, v, m, None, grid)

    again = rule.checkpoint_steps and torch.is_grad_enabled()
    for fires in on_device(fire, state.device):
        state = checkpoint(step, state, fires, *m, use_reentrant=False) if again else step(state, fires, *m)
    return state


def asynchronous(rule, base, state, m, fire, grid):
    """Only cells that fire, and cells that fired at the step before."""
    steps = firing_rows(fire, state.device)
    if not torch.is_grad_enabled():
        return _in_place(rule, base, state.clone(), m, steps, grid)
    if rule.checkpoint_steps:
        return _Recomputed.apply(rule, steps, grid, base, state, *m, *rule.step_parameters())
    return _kept(rule, base, state, m, steps, grid)


class Step:
    """Which rows of the flattened (N·L) cells one step computes: the same number of each image.

    `rows` (N·R,) the cells that fire. R is the largest number of firing cells of any image; an image with fewer is
    filled up with cells that do not fire, where `fires` (N, R, 1) is 0. So every image has the same number of rows, and
    what is per image (the modulation) needs no copies.
    """

    def __init__(self, rows, fires):
        self.rows, self.fires = rows, fires

    def of(self, table):
        """(N, L, D) -> the rows (N, R, D)."""
        return table.flatten(0, 1).index_select(0, self.rows).view(len(table), -1, table.shape[-1])

    def put(self, table, values):
        """The table (N, L, D) with other rows (N, R, D): a new one."""
        return table.flatten(0, 1).index_copy(0, self.rows, values.flatten(0, 1).to(table.dtype)).view_as(table)

    def put_(self, table, values):
        """The same in place."""
        table.view(-1, table.shape[-1]).index_copy_(0, self.rows, values.flatten(0, 1).to(table.dtype))

    def add_(self, table, values):
        """Add to these rows, in place."""
        table.view(-1, table.shape[-1]).index_add_(0, self.rows, values.flatten(0, 1).to(table.dtype))

    def clear_(self, table):
        """Set these rows to 0, in place."""
        table.view(-1, table.shape[-1]).index_fill_(0, self.rows, 0)


def firing_rows(fire, device):
    """fire (steps, N, L) bool on the CPU -> a Step for each step at which any cell fires, on `device`."""
    most = fire.sum(2).amax(1).tolist()  # the sizes must be known on the host; the rest is done on the device
    fire = on_device(fire, device)
    order = fire.byte().argsort(dim=2, descending=True, stable=True)  # firing cells first
    first = torch.arange(fire.shape[1], device=device)[:, None] * fire.shape[2]
    steps = []
    for fires, cells, count in zip(fire, order, most, strict=True):
        if count:
            cells = cells[:, :count]
            steps.append(Step((cells + first).flatten(), fires.gather(1, cells)[..., None]))
    return steps


def _in_place(rule, base, state, m, steps, grid):
    """Without gradients: `state` and the tables of embeddings, keys and values are written over."""
    tables = moved = None
    for step in steps:
        tables = _first(rule, base, state, m) if tables is None else _renew(rule, tables, base, state, m, moved)
        _move(rule, tables, state, m, step, grid)
        moved = step
    return state


def _first(rule, base, state, m):
    """Embeddings, keys and values of all cells."""
    return [table.contiguous() for table in rule.tables(base, state, m)]


def _renew(rule, tables, base, state, m, moved):
    """Compute those of the rows that moved from the state as it is now, in place."""
    for table, values in zip(tables, rule.tables(moved.of(base), moved.of(state), m), strict=True):
        moved.put_(table, values)
    return tables


def _move(rule, tables, state, m, step, grid, linear=F.linear):
    """Add the update of one step to the state, in place."""
    update = rule.step_update(step.of(tables[0]), *tables[1:], m, step.rows, grid, linear)
    step.put_(state, step.of(state) + step.fires * update)


def _kept(rule, base, state, m, steps, grid):
    """With gradients, and everything that autograd wants kept."""
    tables = moved = None
    for step in steps:
        if tables is None:
            tables = _first(rule, base, state, m)
        else:
            renewed = rule.tables(moved.of(base), moved.of(state), m)
            tables = [moved.put(table, values) for table, values in zip(tables, renewed, strict=True)]
        update = rule.step_update(step.of(tables[0]), tables[1], tables[2], m, step.rows, grid)
        state = step.put(state, step.of(state) + step.fires * update)
        moved = step
    return state


class _Recomputed(torch.autograd.Function):
    """The asynchronous engine for training: keeps what is small or dear, and computes the rest once more in backward.

    Kept are, of the rows that fired, the old state, the keys and values that were written over, and the results of the
    four matrix products. Backward walks through the steps from the last to the first; putting the old rows back
    restores the tables of embeddings, keys and values, and each step is differentiated by itself. Norms, modulation,
    attention and activations, which take most of the memory and little of the time, are computed again.
    """

    @staticmethod
    def forward(ctx, rule, steps, grid, base, state, *m_and_parameters):
        m, state = Modulation(*m_and_parameters[:8]), state.clone()
        tables, moved, kept = None, None, []
        for step in steps:
            if tables is None:
                tables = _first(rule, base, state, m)
            else:
                kept += [moved.of(tables[1]), moved.of(tables[2])]
                _renew(rule, tables, base, state, m, moved)
            old, products = step.of(state), Recorder()
            _move(rule, tables, state, m, step, grid, products)
            kept += [old, *products.results]
            moved = step
        parameters = m_and_parameters[8:]  # saved only so that PyTorch notices if they change before backward
        ctx.save_for_backward(*parameters, base, state, *m, *(tables or []), *kept)
        ctx.rule, ctx.steps, ctx.grid, ctx.parameters = rule, steps, grid, len(parameters)
        # Without the cache: older PyTorch would find casts in it that were made without gradients.
        ctx.autocast = {"device_type": base.device.type, "enabled": torch.is_autocast_enabled(base.device.type),
                        "dtype": torch.get_autocast_dtype(base.device.type), "cache_enabled": False}
        return state

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        base, state, *saved = ctx.saved_tensors[ctx.parameters:]
        m, tables, kept = Modulation(*saved[:8]), saved[8:11], saved[11:]
        with torch.autocast(**ctx.autocast):
            back = _Backward(ctx.rule, base, state.clone(), m, [t.clone() for t in tables], ctx.grid,
                             grad.clone(memory_format=torch.contiguous_format))
            back.walk(ctx.steps, kept)
        grad_m = [total.to(t.dtype) for total, t in zip(back.grad_m, m, strict=True)]
        return (None, None, None, back.grad_base, back.grad_state, *grad_m, *back.grad_parameters)


class _Backward:
    """What backward holds while it walks: state and tables of one moment, and the gradients so far."""

    def __init__(self, rule, base, state, m, tables, grid, grad):
        self.rule, self.base, self.state, self.m, self.tables, self.grid = rule, base, state, m, tables, grid
        self.parameters = rule.step_parameters()
        self.grad_state, self.grad_base = grad, torch.zeros_like(base)
        self.grad_tables = [torch.zeros_like(table, dtype=_sum_dtype(table)) for table in tables]
        self.grad_m = [torch.zeros_like(t, dtype=_sum_dtype(t)) for t in m]
        self.grad_parameters = [torch.zeros_like(p) if p.requires_grad else None for p in self.parameters]

    def walk(self, steps, kept):
        """kept, of each step: old keys and values (not of the first), old state, results of four products."""
        kept = [(None, None, *kept[:5]), *(kept[i: i + 7] for i in range(5, len(kept), 7))]
        for i in reversed(range(len(steps))):
            old_k, old_v, old_state, *products = kept[i]
            self.through_move(steps[i], products)
            steps[i].put_(self.state, old_state)
            if i:
                self.through_renewal(steps[i - 1], kept[i - 1][2], old_k, old_v)
        if steps:
            self.through_first()

    def through_move(self, step, products):
        """state += fires · update(e of the rows, keys, values)."""

        def update(e, k, v, m):
            return [self.rule.step_update(e, k, v, m, step.rows, self.grid, Replay(products))]

        inputs = [step.of(self.tables[0]), *self.tables[1:]]
        grad_e, grad_k, grad_v = self.differentiate(update, inputs, [step.fires * step.of(self.grad_state)])
        step.add_(self.grad_tables[0], grad_e)
        self.grad_tables[1] += grad_k
        self.grad_tables[2] += grad_v

    def through_renewal(self, moved, old_state, old_k, old_v):
        """The rows `moved` of the tables came from the state as it is now; what they held before has no part in it."""
        base = moved.of(self.base)
        grad_base, grad_state = self.through_tables(base, moved.of(self.state),
                                                    [moved.of(grad) for grad in self.grad_tables])
        moved.add_(self.grad_base, grad_base)
        moved.add_(self.grad_state, grad_state)
        for grad, table, old in zip(self.grad_tables, self.tables, (self.rule.embed(base, old_state), old_k, old_v),
                                    strict=True):
            moved.clear_(grad)
            moved.put_(table, old)

    def through_first(self):
        """All rows of the tables came from the first state."""
        grad_base, grad_state = self.through_tables(self.base, self.state, self.grad_tables)
        self.grad_base += grad_base
        self.grad_state += grad_state

    def through_tables(self, base, state, grad_tables):
        """(e, k, v) = tables(base, state). Nothing reads k and v here: any numbers of their shape will do."""
        unread = self.tables[1].new_empty(1).expand(*base.shape[:2], 2 * base.shape[2])
        return self.differentiate(lambda base, state, m: self.rule.tables(base, state, m, Replay([unread])),
                                  [base, state], grad_tables)

    def differentiate(self, function, inputs, grad_outputs):
        """Gradients of function(*inputs, m) to its inputs; those to modulation and parameters are added up here."""
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
    """Twelve sums are too many for half precision."""
    return torch.promote_types(tensor.dtype, torch.float32)


ENGINES = {"dense": dense, "asynchronous": asynchronous}
