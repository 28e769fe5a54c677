"""What GeCA computes, and that it is what the published code computes.

The file walks through one image: what a denoiser is told (step and labels), what one cell does (written out below,
cell by cell, as the paper has it), how noise is put on (q) and taken off (p), what is trained, and how guided sampling
hands the automaton's state on. Everything is compared with tests/reference_vectors.npz, which the published code
computed on a CPU in float32; the weights are those of `made_weight` in conftest.py.
"""

import math
import zlib

import numpy as np
import pytest
import torch
from conftest import fill, generators, largest_relative, made_weight

from diffusion import create_diffusion, samplers
from generation import guidance
from models import MODELS


@pytest.fixture(scope="module")
def geca_xs():
    model = fill(MODELS["GeCA-XS"](input_size=8))
    model.update_rate = 1  # every cell fires
    return model


@pytest.fixture(scope="module")
def weights():
    """Name -> array: the weights of GeCA-XS under their published names."""
    shapes = {key: tuple(value.shape) for key, value in MODELS["GeCA-XS"](input_size=8).state_dict().items()}
    return {key: made_weight(key, shape).double().numpy() for key, shape in shapes.items()}


@pytest.mark.parametrize("name, parameters", [
    ("GeCA-S", 13_312_584), ("GeCA-XS", 2_255_720), ("DiT-S/2", 32_731_424), ("DiT-S", 32_731_424)])
def test_parameter_counts_of_the_paper(name, parameters):
    assert sum(p.numel() for p in MODELS[name](num_classes=11).parameters()) == parameters


def test_ldm_b_is_as_large_as_the_paper_says():
    assert sum(p.numel() for p in MODELS["LDM-B"](num_classes=11).parameters()) == pytest.approx(17.3e6, abs=0.1e6)


# ---- the automaton, written out


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def norm(x, weight=1.0, bias=0.0, eps=1e-5):
    """Layer norm of each row."""
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * weight + bias


def linear(weights, name, x):
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)


def embedded_step(weights, t):
    """t -> (D,): 128 cosines, 128 sines, two layers."""
    angle = t * 10000 ** (-np.arange(128) / 128)
    wave = np.concatenate([np.cos(angle), np.sin(angle)])
    return linear(weights, "t_embedder.mlp.2", silu(linear(weights, "t_embedder.mlp.0", wave)))


def embedded_labels(weights, y):
    """Multi-hot (K,) -> (D,): two layers, and nothing between them."""
    return linear(weights, "y_embedder.embedding_table.1", linear(weights, "y_embedder.embedding_table.0", y))


def attention(weights, z, height, width):
    """Cells (H·W, D) look at their 3 × 3 neighbours; a place outside the grid is a key and a value of 0."""
    q, k, v = np.split(linear(weights, "transformer.layers.0.0.fn.to_qkv", z), 3, axis=-1)
    out = np.zeros_like(q)
    for row, column in np.ndindex(height, width):
        cell, neighbours = row * width + column, []
        for dy, dx in np.ndindex(3, 3):
            y, x = row + dy - 1, column + dx - 1
            neighbours.append(y * width + x if 0 <= y < height and 0 <= x < width else None)
        for head in range(0, q.shape[1], 64):
            part = slice(head, head + 64)
            keys, values = (np.array([np.zeros(64) if n is None else a[n, part] for n in neighbours]) for a in (k, v))
            share = np.exp(keys @ q[cell, part] / 8)  # 64^½
            out[cell, part] = share / share.sum() @ values
    return linear(weights, "transformer.layers.0.0.fn.to_out.0", out)


def written_out(weights, x, t, y, state, fire):
    """One call for one image: x (C, H, W), state (2C + hidden, H, W), fire (steps, H·W) -> the state afterwards."""
    channels, height, width = state.shape
    cells, x = state.reshape(channels, -1).T, x.reshape(len(x), -1).T  # a cell is a row: [input | output, hidden]
    c = silu(embedded_step(weights, t) + embedded_labels(weights, y))
    shift1, scale1, gate1, shift2, scale2, gate2 = np.split(linear(weights, "transformer.adaLN_modulation.1", c), 6)
    shift3, scale3 = np.split(linear(weights, "final_layer.adaLN_modulation.1", c), 2)
    place = np.arange(len(c))
    angle = np.arange(height * width)[:, None] * 10000.0 ** (-place / len(c))
    position = np.where(place % 2 == 0, np.sin(angle), np.cos(angle))
    layer = "transformer.layers.0"
    for fires in fire:
        e = linear(weights, "cell_to_embedding", np.hstack([x, cells])) + position
        z = norm(e, weights[f"{layer}.0.norm.weight"], weights[f"{layer}.0.norm.bias"]) * (1 + scale1) + shift1
        z = e + gate1 * attention(weights, z, height, width)
        m = norm(z, weights[f"{layer}.1.norm.weight"], weights[f"{layer}.1.norm.bias"]) * (1 + scale2) + shift2
        z = z + gate2 * linear(weights, f"{layer}.1.fn.net.3", gelu(linear(weights, f"{layer}.1.fn.net.0", m)))
        update = linear(weights, "final_layer.linear", norm(z, eps=1e-6) * (1 + scale3) + shift3)
        cells = cells + fires[:, None] * update
    return cells.T.reshape(state.shape)


def test_the_published_code_computes_what_is_written_out(weights, golden):
    """Image 0 of the reference call, every cell firing at all 12 steps."""
    x, t, y, state = (golden[f"geca_xs/{name}"][0].double().numpy() for name in ("x", "t", "y", "state_in"))
    state = torch.tensor(written_out(weights, x, t, y, state, np.ones((12, 64), bool)))
    assert largest_relative(state, golden["geca_xs/state_out"][0]) < 1e-5
    assert largest_relative(state[:8], golden["geca_xs/out"][0]) < 1e-5  # ε and v are the first channels of the state


@pytest.mark.parametrize("engine", ["dense", "asynchronous"])
def test_our_cells_fire_at_random_and_compute_what_is_written_out(geca_xs, weights, golden, engine, monkeypatch):
    """On a 3 × 5 grid, half of the cells firing; a fresh call starts from the centre cell alone."""
    monkeypatch.setattr(geca_xs, "update_rate", 0.5)
    monkeypatch.setattr(geca_xs, "engine", engine)
    x, t, y = golden["geca_xs/x"][1:, :, 2:5, :5], golden["geca_xs/t"][1:], golden["geca_xs/y"][1:]
    (draws,) = generators(1)
    seed = torch.randn(8, generator=draws)
    fire = torch.rand(12, 15, generator=draws) < 0.5
    state = np.zeros((40, 3, 5))
    state[:8, 1, 2] = seed
    wanted = torch.tensor(written_out(weights, *(a[0].double().numpy() for a in (x, t, y)), state, fire.numpy()))
    with torch.no_grad():
        out, state = geca_xs(x, t, y, None, generators(1))
    assert largest_relative(state[0], wanted) < 1e-5 and torch.equal(out, state[:, :8])


# ---- the models against the published ones


@pytest.mark.parametrize("engine", ["dense", "asynchronous"])
def test_geca_call(geca_xs, golden, engine, monkeypatch):
    monkeypatch.setattr(geca_xs, "engine", engine)
    with torch.no_grad():
        out, state = geca_xs(*(golden[f"geca_xs/{name}"] for name in ("x", "t", "y", "state_in")))
    assert largest_relative(out, golden["geca_xs/out"]) < 1e-5
    assert largest_relative(state, golden["geca_xs/state_out"]) < 1e-5


def test_geca_embedders(geca_xs, golden):
    assert largest_relative(geca_xs.t_embedder(golden["geca_xs/t"]), golden["geca_xs/t_emb"]) < 1e-5
    assert largest_relative(geca_xs.y_embedder(golden["geca_xs/y"]), golden["geca_xs/y_emb"]) < 1e-5


def test_attention_alone_on_a_5x7_grid(geca_xs, golden):
    attention = geca_xs.transformer.layers[0][0].fn
    q, k, v = attention.to_qkv(golden["attn3x3/x"]).chunk(3, -1)
    out = attention.to_out(geca_xs.attend(q.flatten(0, 1), k, v, None, (5, 7)).view_as(q))
    assert largest_relative(out, golden["attn3x3/out"]) < 1e-5


def test_dit_call(golden):
    """The first baseline of the paper."""
    model = fill(MODELS["DiT-S/2"](input_size=8))
    with torch.no_grad():
        out, state = model(*(golden[f"dit_s2/{name}"] for name in ("x", "t", "y")))
    assert state is None and largest_relative(out, golden["dit_s2/out"]) < 1e-5


# ---- the diffusion: 1000 steps of noise, and what undoes them


def test_schedule_tables(golden):
    diffusion = create_diffusion()
    for name in ("betas", "alphas_cumprod", "posterior_log_variance_clipped"):
        np.testing.assert_allclose(getattr(diffusion, name), golden[f"diffusion/{name}"], rtol=1e-13)


@pytest.mark.parametrize("respacing", ["250", "50", "10", "ddim50", "100,100,50"])
def test_respacings(golden, respacing):
    diffusion = create_diffusion(respacing)
    assert diffusion.timestep_map.tolist() == golden[f"diffusion/timestep_map/{respacing}"].tolist()
    np.testing.assert_allclose(diffusion.betas, golden[f"diffusion/respaced_betas/{respacing}"], rtol=1e-10)


def made(name, shape, factor=1.0):
    r = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    return torch.tensor(r * factor, dtype=torch.float32)


X0 = made("diffusion/x0", (4, 4, 8, 8))
NOISE = made("diffusion/noise", (4, 4, 8, 8))
OUT = made("diffusion/model_out", (4, 8, 8, 8), 0.7)
STEP_NOISE = made("diffusion/p_noise", (4, 4, 8, 8))


def test_q_sample(golden):
    x = create_diffusion().q_sample(X0, golden["diffusion/t"], NOISE)
    assert largest_relative(x, golden["diffusion/q_sample"]) < 1e-5


@pytest.mark.parametrize("clip", [0, 1])
def test_p_mean_variance(golden, clip):
    diffusion, t = create_diffusion(), golden["diffusion/t"]
    p = diffusion.p_mean_variance(OUT, diffusion.q_sample(X0, t, NOISE), t, clip_denoised=bool(clip))
    for name in ("mean", "variance", "log_variance", "pred_xstart"):
        wanted = golden[f"diffusion/p_mean_variance/clip{clip}/{name}"]
        assert largest_relative(getattr(p, name), wanted) < 1e-5


def test_training_loss_terms(golden):
    t = golden["diffusion/t"]
    assert 0 in t.tolist() and len(set(t.tolist())) > 1  # both kinds of variational term
    terms = create_diffusion().training_losses(lambda x, t: OUT, X0, t, NOISE)
    assert largest_relative(terms["mse"], golden["diffusion/mse"]) < 1e-5
    assert largest_relative(terms["vb"], golden["diffusion/vb"]) < 1e-5
    assert largest_relative(terms["loss"], golden["diffusion/training_loss"]) < 1e-5


def test_one_step_of_each_sampler(golden):
    diffusion, i = create_diffusion("250"), golden["diffusion/p_t250"]
    x = golden["diffusion/q_sample"]
    p = diffusion.p_mean_variance(OUT, x, i)
    ancestral = samplers.p_sample(p, i, STEP_NOISE)
    assert largest_relative(ancestral, golden["diffusion/p_sample/250"]) < 1e-5
    for name, eta in (("ddim_sample", 0.0), ("ddim_eta1", 1.0)):
        x_next = samplers.ddim_sample(diffusion, p, x, i, STEP_NOISE, eta)
        assert largest_relative(x_next, golden[f"diffusion/{name}/250"]) < 1e-5


def test_guided_loop(geca_xs, golden, monkeypatch):
    """Ten guided ancestral steps: guidance, heredity and the ancestral loop together."""
    seeds, steps = iter(golden["guided_loop/seed_noise"]), iter(golden["guided_loop/step_noise"])
    monkeypatch.setattr(geca_xs, "draw_seed", lambda n, generator: next(seeds))
    denoise = guidance.GuidedDenoiser(geca_xs, golden["guided_loop/y"], 1.5, ([], []))
    sample = samplers.p_sample_loop(
        create_diffusion("10"), denoise, golden["guided_loop/z"], lambda shape: next(steps)
    )
    assert largest_relative(sample, golden["guided_loop/sample"]) < 1e-4
