"""The automaton: its attention against a hand-written loop, the rule's locality, and two engines that agree."""

import pytest
import torch
from conftest import fill, generators, largest_relative

from automaton import engines, graphs, reference
from automaton.attention import neighbourhood_attention
from automaton.engines import firing_rows
from automaton.rule import POSITION_CODES, FeedForward, Modulation, position_code
from models import MODELS, GeCA


def small_geca(in_channels=2, steps=4):
    """One head, every weight non-zero: the published start values would hide the whole rule behind zeros."""
    torch.manual_seed(0)
    model = GeCA(num_classes=3, in_channels=in_channels, width=64, mlp_width=16, hidden=5, steps=steps)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.1)
    return model


def inputs(n, h, w, channels=2, seed=3):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, channels, h, w, generator=g)
    return x, torch.randint(0, 1000, (n,), generator=g), torch.rand(n, 3, generator=g).round()


def loop_attention(q, k, v):
    """One cell and head at a time; outside the grid a zero key, whose logit is 0, and a zero value."""
    n, height, width, heads, d = q.shape
    out = torch.zeros_like(q)
    for b, y, x, head in torch.cartesian_prod(*(torch.arange(s) for s in (n, height, width, heads))).tolist():
        logits, values = [], []
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                inside = 0 <= y + dy < height and 0 <= x + dx < width
                key = k[b, y + dy, x + dx, head] if inside else torch.zeros(d, dtype=q.dtype)
                value = v[b, y + dy, x + dx, head] if inside else torch.zeros(d, dtype=q.dtype)
                logits.append(torch.dot(q[b, y, x, head], key) / d**0.5)
                values.append(value)
        out[b, y, x, head] = torch.stack(logits).softmax(0) @ torch.stack(values)
    return out


def qkv(n, h, w, heads=2, d=3, dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(n, h, w, heads, d, generator=g, dtype=dtype, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (3, 2), (4, 5)])
def test_attention_is_the_hand_written_loop(grid):
    q, k, v = qkv(2, *grid)
    torch.testing.assert_close(neighbourhood_attention(q, k, v), loop_attention(q, k, v))


def test_attention_of_one_cell_by_hand():
    """A lone cell gives eight ninths of its attention, at logit 0, to nothing: its value comes out as a ninth."""
    zero, value = torch.zeros(1, 1, 1, 1, 2), torch.tensor([9.0, 18.0]).view(1, 1, 1, 1, 2)
    assert neighbourhood_attention(zero, zero, value).flatten().tolist() == pytest.approx([1, 2])


@pytest.mark.parametrize("grid", [(1, 1), (1, 3), (3, 4)])
def test_attention_gradients(grid):
    assert torch.autograd.gradcheck(neighbourhood_attention, qkv(1, *grid, heads=2, d=2))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_attention_in_half_precision_is_rounded_once(half):
    """Gradients are those of the same numbers in float64, less than half a unit of rounding off (rms).

    Sums in half precision would be 0.65 units off; the forward sum is made in it, and 0.55 off.
    """
    halves = [t.detach().to(half).requires_grad_() for t in qkv(2, 6, 7, d=64)]
    exact = [t.detach().double().requires_grad_() for t in halves]
    results = []
    for tensors in (halves, exact):
        out = neighbourhood_attention(*tensors)
        out.backward(torch.ones_like(out))
        results.append((out, *(t.grad for t in tensors)))
    for found, expected, units in zip(*results, (0.75, 0.5, 0.5, 0.5), strict=True):
        error = (found.double() - expected).square().mean() / expected.square().mean()
        assert found.dtype == half and error.sqrt() < units * torch.finfo(half).eps


def test_attention_keeps_no_nine_copies():
    q, k, v = qkv(2, 8, 8, heads=2, d=64, dtype=torch.float32)
    kept = []

    def remember(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda t: t):
        out = neighbourhood_attention(q.flatten(0, 2), k, v, torch.arange(128))
    assert sum(kept) == 3 * q.numel() + 2 * 8 * 8  # q, k, v and which cells attend
    assert vars(out.grad_fn) == {"fused": False}  # and nothing beside what is saved for backward


def call(model, engine, rate, grid, n, again=True):
    """Output, state and every gradient of one call."""
    model.engine, model.update_rate, model.checkpoint_steps = engine, rate, again
    model.zero_grad()
    x, t, y = inputs(n, *grid)
    state = torch.randn(n, 9, *grid, generator=torch.Generator().manual_seed(5)).requires_grad_()
    x.requires_grad_()
    out, new = model(x, t, y, state, generators(n))
    weigh = torch.randn(new.shape, generator=torch.Generator().manual_seed(6))  # a loss that tells cells apart
    (new * weigh).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"out": out, "state": new, "x": x.grad, "state_in": state.grad, **grads}


@pytest.mark.parametrize("rate", [0, 0.1, 0.5, 1])
@pytest.mark.parametrize("grid, n", [((1, 1), 1), ((2, 5), 3), ((7, 4), 2), ((64, 64), 1)])
def test_engines_agree_in_results_and_all_gradients(rate, grid, n):
    model = small_geca()
    dense = call(model, "dense", rate, grid, n, again=False)
    if rate == 1:
        assert len(dense) == 4 + len(list(model.parameters()))
    for engine, again in (("dense", True), ("asynchronous", False), ("asynchronous", True)):
        other = call(model, engine, rate, grid, n, again)
        for name, expected in dense.items():
            found = other.get(name)
            if found is None or not expected.abs().max():
                assert not expected.abs().max(), name
                assert found is None or not found.abs().max(), name
                continue
            assert largest_relative(found, expected) < 1e-5, (engine, again, name)


@pytest.mark.parametrize("again", [False, True])
def test_half_precision_in_training(again):
    """Under autocast the recomputed steps are in half precision too, and their gradients near the exact ones."""
    model = small_geca()
    exact = call(model, "dense", 0.5, (6, 7), 2, again=False)
    with torch.autocast("cpu", torch.bfloat16):
        found = call(model, "asynchronous", 0.5, (6, 7), 2, again)
    for name, expected in exact.items():
        error = (found[name].double() - expected).norm() / expected.norm()
        assert 0 < error < 0.03, (name, error.item())


@pytest.mark.parametrize("again", [False, True])
def test_what_backward_cannot_do_is_refused(again):
    """A weight that changed since the call, and a second derivative: an error, not a wrong gradient."""
    model, (x, t, y) = small_geca(), inputs(2, 4, 4)
    model.checkpoint_steps = again
    out, _ = model(x, t, y, None, generators(2))
    with torch.no_grad():
        model.transformer.layers[0][1].fn.net[3].weight.mul_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    x.requires_grad_()
    (grad,) = torch.autograd.grad(model(x, t, y, None, generators(2))[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_frozen_weights_and_other_dtypes():
    model, (x, t, y) = small_geca(), inputs(2, 4, 5)
    model.transformer.requires_grad_(False)
    model(x, t, y, None, generators(2))[0].sum().backward()
    assert model.final_layer.linear.weight.grad is not None and model.transformer.layers[0][0].norm.weight.grad is None
    exact = model(x, t, y, None, generators(2))[0]
    double = model.double()(x.double(), t, y.double(), None, generators(2))[0]
    assert double.dtype == torch.float64 and largest_relative(exact.double(), double) < 1e-4
    half = model.bfloat16()(x.bfloat16(), t, y.bfloat16(), None, generators(2))[0]
    assert half.dtype == torch.bfloat16 and largest_relative(half.double(), double) < 0.1


def test_training_keeps_little():
    """Kept for backward: of each firing cell and step its old state, key and value, and results of products."""
    model, (x, t, y) = MODELS["GeCA-XS"](num_classes=3), inputs(2, 16, 16, channels=4)
    kept = {}

    def remember(tensor):
        kept[tensor.data_ptr(), tensor.numel()] = tensor.numel()
        return tensor

    def numbers(again):
        model.checkpoint_steps = again
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(remember, lambda t: t):
            model(x, t, y, None, generators(2))
        return sum(kept.values()) - sum(p.numel() for p in model.parameters())

    cells, firing = 2 * 256, 12 * 2 * 256 * 0.55
    assert numbers(True) < firing * (40 + 5 * 384 + 64) + cells * 6 * 384
    assert numbers(False) > 3 * numbers(True)


@pytest.mark.parametrize("grid", [(6, 5), (1, 1)])
def test_engines_agree_without_gradients_and_leave_the_state_alone(grid):
    """Without gradients the caches are written in place; the caller's state must not be."""
    model, (x, t, y) = small_geca(), inputs(3, *grid)
    state = torch.randn(3, 9, *grid, generator=generators(1)[0])
    before, results = state.clone(), []
    for model.engine in ("dense", "asynchronous"):
        with torch.no_grad():
            results.append(model(x, t, y, state, generators(3))[1])
    assert largest_relative(results[1], results[0]) < 1e-5
    assert torch.equal(state, before)


@torch.no_grad()
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("grid", [(1, 1), (7, 4), (9, 9)])
def test_what_a_graph_records_is_what_the_engine_computes(grid, fused, monkeypatch):
    """Cells that rest fill up each image or, fused, the list of all cells to a round number: here without a GPU."""
    model, (x, t, y) = small_geca(), inputs(3, *grid)
    model.engine = "asynchronous"
    expected = model(x, t, y, None, generators(3))[1]
    recorded = []
    monkeypatch.setattr(graphs, "wanted", lambda x: True)
    monkeypatch.setattr(graphs, "replay", lambda model, settings, function, inputs: (
        recorded.append(inputs[2].shape), function(*inputs))[1])
    monkeypatch.setattr(engines, "_fused", engines.Parts)
    model.fused = fused
    assert largest_relative(model(x, t, y, None, generators(3))[1], expected) < 1e-5
    (shape,) = recorded
    assert shape[:2] == ((4, 1) if fused else (4, 3))
    assert shape[2] % graphs.ROUND == 0 or shape[2] == grid[0] * grid[1] * (3 if fused else 1)


def test_light_cone():
    """In s steps a cell can be influenced only from within s cells."""
    model, (x, t, y) = small_geca(steps=3), inputs(1, 11, 13)
    changed = x.clone()
    changed[0, :, 5, 6] += 1
    a, b = (model(z, t, y, torch.zeros(1, 9, 11, 13), generators(1))[1] for z in (x, changed))
    moved = (a - b).abs().sum((0, 1)) > 0
    rows, columns = torch.meshgrid(torch.arange(11), torch.arange(13), indexing="ij")
    distance = torch.maximum((rows - 5).abs(), (columns - 6).abs())
    assert not moved[distance > 3].any()
    assert moved[distance <= 1].any() and moved[distance > 1].any()  # and it does travel


@pytest.mark.parametrize("engine", ["dense", "asynchronous"])
def test_a_cell_that_never_fires_never_moves(engine, monkeypatch):
    model, (x, t, y) = small_geca(), inputs(2, 4, 4)
    model.engine = engine
    fire = torch.ones(4, 2, 16, dtype=torch.bool)
    fire[:, 1, 5] = False
    monkeypatch.setattr(model, "draw_fire", lambda n, cells, generator: fire)
    state = torch.randn(2, 9, 4, 4, generator=generators(1)[0])
    after = model(x, t, y, state)[1]
    still = (after == state).all(1)
    assert still[1, 1, 1] and still.sum() == 1


def test_fire_rate_is_what_it_says():
    model = MODELS["GeCA-XS"]()
    model.update_rate = 0.3
    fire = model.draw_fire(4, 1024, generators(4))
    assert fire.shape == (12, 4, 1024)
    assert abs(fire.float().mean() - 0.3) < 5 * (0.21 / fire.numel()) ** 0.5
    agreement = (fire[:, :1] == fire[:, 1:]).float().mean((0, 2)), (fire[:-1] == fire[1:]).float().mean((1, 2))
    for together in agreement:  # each image and each step draws for itself: two draws agree with p² + (1 − p)²
        assert (together - 0.58).abs().max() < 5 * (0.25 / 4096) ** 0.5


def test_an_image_does_not_depend_on_its_batch():
    model, (x, t, y) = small_geca(), inputs(3, 5, 5)
    together = model(x, t, y, None, generators(3))[0]
    alone = model(x[2:], t[2:], y[2:], None, generators(3)[2:])[0]
    assert largest_relative(alone, together[2:]) < 1e-5


def test_life_starts_in_the_centre_cell_and_heredity_keeps_the_hidden_channels():
    model = small_geca()
    seed = torch.full((2, 4), 7.0)
    state = model.initial_state(2, 5, 8, seed)
    assert state.abs().sum((0, 1)).nonzero().tolist() == [[2, 4]]
    assert (state[:, :4, 2, 4] == 7).all() and not state[:, 4:].any()
    old = torch.randn(2, 9, 5, 8, generator=generators(1)[0])
    inherited = model.inherit(old, seed)
    assert torch.equal(inherited[:, 4:], old[:, 4:]) and torch.equal(inherited[:, :4], state[:, :4])


def test_firing_rows_by_hand():
    fire = torch.tensor([[[0, 1, 0], [1, 0, 1]], [[0, 0, 0], [0, 0, 0]]], dtype=torch.bool)
    (step,) = firing_rows(fire, "cpu")  # at the second step nobody fires
    assert step.rows.tolist() == [1, 0, 3, 5]  # the first image is filled up with its cell 0 …
    assert step.fires.flatten().tolist() == [True, False, True, True]  # … which does not fire


def test_draws_need_one_generator_per_image():
    model, (x, t, y) = small_geca(), inputs(2, 3, 3)
    with pytest.raises(ValueError, match="one generator per image"):
        model(x, t, y)
    with pytest.raises(ValueError, match="found 1"):
        model(x, t, y, None, generators(1))


def test_gelu_is_exact_and_norms_have_the_published_eps():
    """What small weights hide: Φ(1) is not its tanh approximation, and rows that hardly vary feel the eps."""
    mlp = FeedForward(1, 1)
    for p in mlp.parameters():
        torch.nn.init.constant_(p, float(p.dim() == 2))
    assert mlp(torch.ones(1, 1)).item() == pytest.approx(0.8413447, abs=1e-6)  # by tanh 0.8411920
    model = small_geca()
    attention_norm, mlp_norm = (part.norm for part in model.transformer.layers[0])
    assert (attention_norm.eps, mlp_norm.eps) == (1e-5, 1e-5)
    flat = torch.tensor([1e-3, -1e-3]).repeat(32).view(1, 1, 64)  # variance 1e-6, as large as the last norm's eps
    with torch.no_grad():
        for p in [*model.transformer.layers.parameters(), *model.final_layer.parameters()]:
            p.zero_()
        model.final_layer.linear.weight[:, 0] = 1
        zero = torch.zeros(1, 1, 64)
        update = model.update(flat, zero, Modulation(*[zero] * 8))
    assert update.flatten().tolist() == pytest.approx([0.5**0.5] * 9)  # 1e-3 / √(1e-6 + 1e-6)


def test_start_values_are_the_published_ones():
    """Modulation and last linear zero: a new automaton does not move, and its output is its seed."""
    model = MODELS["GeCA-XS"]()
    x, t, y = torch.ones(1, 4, 6, 6), torch.tensor([3]), torch.zeros(1, 11)
    seed = model.draw_seed(1, generators(1))
    out, state = model(x, t, y, None, generators(1))
    assert torch.equal(state, model.initial_state(1, 6, 6, seed)) and torch.equal(out, state[:, :8])


def test_published_weight_names():
    names = set(fill(MODELS["GeCA-S"]()).state_dict())
    attention, mlp = "transformer.layers.0.0", "transformer.layers.0.1"
    linears = ["t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder.embedding_table.0", "y_embedder.embedding_table.1",
               "cell_to_embedding", f"{attention}.fn.to_out.0", f"{mlp}.fn.net.0", f"{mlp}.fn.net.3",
               f"{attention}.norm", f"{mlp}.norm", "transformer.adaLN_modulation.1", "final_layer.linear",
               "final_layer.adaLN_modulation.1"]
    assert names == {f"{n}.{kind}" for n in linears for kind in ("weight", "bias")} | {f"{attention}.fn.to_qkv.weight"}


@pytest.mark.parametrize("update_rate", [0.5, 1])
@pytest.mark.parametrize("grid", [(1, 1), (1, 6), (5, 7), (8, 8)])
@pytest.mark.parametrize("given", [False, True], ids=["one cell", "given state"])
def test_engines_agree_with_the_reference(grid, update_rate, given):
    """Output, state and all gradients, of every engine, against automaton/reference.py."""
    n, cells = 2, grid[0] * grid[1]
    model = small_geca()
    model.update_rate = update_rate
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(n, model.in_channels, *grid, generator=g), torch.rand(n, model.num_classes, generator=g)
    t = torch.tensor([3, 800])
    start = torch.randn(n, model.out_channels + model.hidden, *grid, generator=g) if given else None

    def results(call):
        model.zero_grad()
        out, state = call()
        (out.square().sum() + state.sin().sum()).backward()
        return [out.detach(), state.detach(), *(p.grad.clone() for p in model.parameters())]

    def by_the_reference():
        draws = generators(n)
        seed = None if given else model.draw_seed(n, draws)
        return reference.forward(model, x, t, y, model.draw_fire(n, cells, draws), start, seed)

    expected = results(by_the_reference)
    for engine in ("dense", "asynchronous"):
        for model.checkpoint_steps in (False, True):
            model.engine = engine
            for a, b in zip(results(lambda: model(x, t, y, start, generators(n))), expected, strict=True):
                assert (a - b).abs().max() <= 1e-5 * b.abs().max() + 1e-7


# ---- position codes


def test_the_published_code_counts_cells_and_ours_rows_and_columns():
    """Ours tells a cell its row and column: on a wider grid it is the same. The published one changes below row 0."""
    narrow, wide = ({name: code(4, w, 8, "cpu").view(4, w, 8) for name, code in POSITION_CODES.items()} for w in (4, 7))
    assert torch.equal(wide["2d"][:, :4], narrow["2d"])
    assert torch.equal(wide["published"][0, :4], narrow["published"][0])
    assert not torch.isclose(wide["published"][1:, :4], narrow["published"][1:]).all(-1).any()
    assert torch.equal(narrow["2d"][2, 3], torch.cat([position_code(4, 4, "cpu")[2], position_code(4, 4, "cpu")[3]]))
    assert torch.equal(narrow["published"][2, 3], position_code(16, 8, "cpu")[11])


def test_a_net_is_built_with_either_code():
    x = torch.zeros(1, 4, 3, 5)
    published, ours = (MODELS["GeCA-XS"](**more).base(x) for more in ({}, {"position_code": "2d"}))
    assert published.shape == ours.shape and not torch.equal(published, ours)
    with pytest.raises(ValueError, match="expected published or 2d"):
        MODELS["GeCA-XS"](position_code="3d")
