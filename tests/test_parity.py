"""The same numbers as the published code, from vectors that it computed (tests/reference_vectors.npz)."""

import zlib

import numpy as np
import pytest
import torch
from conftest import fill, largest_relative

from diffusion import create_diffusion, samplers
from models import MODELS


@pytest.fixture(scope="module")
def geca_xs():
    model = fill(MODELS["GeCA-XS"](input_size=8))
    model.update_rate = 1  # every cell fires
    return model


@pytest.mark.parametrize("name, parameters", [("GeCA-S", 13_312_584), ("GeCA-XS", 2_255_720)])
def test_parameter_counts_of_the_paper(name, parameters):
    assert sum(p.numel() for p in MODELS[name](num_classes=11).parameters()) == parameters


@pytest.mark.parametrize("engine", ["dense", "asynchronous"])
def test_geca_call(geca_xs, golden, engine):
    geca_xs.engine = engine
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
    out = attention.to_out(geca_xs._attend(q, k, v, (5, 7)))
    assert largest_relative(out, golden["attn3x3/out"]) < 1e-5


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
    denoise = samplers.GuidedDenoiser(geca_xs, golden["guided_loop/y"], 1.5, ([], []))
    sample = samplers.p_sample_loop(
        create_diffusion("10"), denoise, golden["guided_loop/z"], lambda shape: next(steps)
    )
    assert largest_relative(sample, golden["guided_loop/sample"]) < 1e-4
