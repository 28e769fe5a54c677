"""The diffusion against closed forms: schedule, posterior, loss terms, samplers, guidance."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import generators

from diffusion import create_diffusion, gaussian, multiscale, samplers
from diffusion.schedule import space_timesteps
from generation import guidance


def test_all_steps_is_the_identity():
    full, again = create_diffusion(), create_diffusion("1000")
    assert again.timestep_map.tolist() == list(range(1000))
    np.testing.assert_allclose(again.betas, full.betas, rtol=1e-10)
    assert full.betas[0] == pytest.approx(1e-4) and full.betas[-1] == pytest.approx(0.02)


def test_steps_by_hand():
    assert space_timesteps(10, "4") == [0, 3, 6, 9]
    assert space_timesteps(10, "5") == [0, 2, 4, 7, 9]  # rounded: 2.25, 4.5, 6.75
    assert space_timesteps(10, "ddim5") == [0, 2, 4, 6, 8]
    assert space_timesteps(9, "2,1") == [0, 4, 5]
    assert space_timesteps(10, "1") == [0]


@pytest.mark.parametrize("respacing", ["11", "0", "ddim7", "5,6"])
def test_impossible_steps_are_refused(respacing):
    with pytest.raises(ValueError):
        space_timesteps(10, respacing)


def test_respaced_process_has_the_noise_levels_of_the_full_one():
    full, some = create_diffusion(), create_diffusion("25")
    np.testing.assert_allclose(some.alphas_cumprod, full.alphas_cumprod[some.timestep_map], rtol=1e-10)


def test_posterior_is_bayes_rule():
    """q(x_{i-1} | x_i, x_0) ∝ q(x_i | x_{i-1}) q(x_{i-1} | x_0), on a grid of x_{i-1}."""
    diffusion, i, x0, x = create_diffusion("50"), 20, 0.7, -0.4
    beta, before = diffusion.betas[i], diffusion.alphas_cumprod_prev[i]
    z = np.linspace(-6, 6, 200_001)
    log = -((x - math.sqrt(1 - beta) * z) ** 2) / (2 * beta) - (z - math.sqrt(before) * x0) ** 2 / (2 * (1 - before))
    p = np.exp(log - log.max())
    p /= p.sum()
    mean, variance = (p * z).sum(), (p * z**2).sum() - (p * z).sum() ** 2
    found_mean, found_log_variance = diffusion.q_posterior(
        torch.full((1, 1, 1, 1), x0), torch.full((1, 1, 1, 1), x), torch.tensor([i]))
    assert found_mean.item() == pytest.approx(mean, rel=1e-5)
    assert found_log_variance.exp().item() == pytest.approx(variance, rel=1e-5)


def test_kl_against_numerical_integration():
    mean1, log1, mean2, log2 = 0.3, -0.5, -0.2, 0.4
    z = np.linspace(-12, 12, 400_001)

    def log_density(mean, log_variance):
        return -0.5 * (math.log(2 * math.pi) + log_variance + (z - mean) ** 2 * math.exp(-log_variance))

    p = log_density(mean1, log1)
    expected = (np.exp(p) * (p - log_density(mean2, log2))).sum() * (z[1] - z[0])
    found = gaussian.gaussian_kl(*(torch.tensor(v, dtype=torch.float64) for v in (mean1, log1, mean2, log2)))
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_discretised_likelihood_is_a_distribution_over_256_bins():
    bins = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, log_scale in ((0.1, -2.0), (-0.9, -1.0), (0.0, -4.0)):
        like = torch.full_like(bins, mean), torch.full_like(bins, log_scale)
        p = gaussian.discretised_log_likelihood(bins, *like).exp()
        assert p.sum().item() == pytest.approx(1, abs=1e-6)
        exact = 0.5 * (torch.erf((bins - mean + 1 / 255) / math.exp(log_scale) / 2**0.5)
                       - torch.erf((bins - mean - 1 / 255) / math.exp(log_scale) / 2**0.5))
        assert (p - exact)[1:-1].abs().max() < 5e-4  # the tanh approximation of the normal distribution


class GaussianWorld:
    """The perfect denoiser of data N(mean, variance): E[ε | x_t] is linear in x_t; the variance is β̃."""

    def __init__(self, mean, variance, fraction=-1.0):
        self.full, self.mean, self.variance, self.fraction = create_diffusion(), mean, variance, fraction

    def __call__(self, x, t, state):
        level = torch.as_tensor(self.full.alphas_cumprod)[t].view(-1, 1, 1, 1)
        marginal = level * self.variance + 1 - level
        eps = (1 - level).sqrt() / marginal * (x - level.sqrt() * self.mean)
        return torch.cat([eps.float(), torch.full_like(x, self.fraction)], 1), state


@pytest.mark.parametrize("sampler, steps, options", [
    ("p_sample_loop", "250", {}), ("ddim_sample_loop", "250", {}), ("ddim_sample_loop", "250", {"eta": 1.0})])
def test_samplers_return_a_known_gaussian(sampler, steps, options):
    """Mean and variance within five standard errors of 20,000 draws, and 3 % for the discretisation in time."""
    mean, variance, n = 0.8, 0.25, 20_000
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 100, 200, generator=g)
    found = getattr(samplers, sampler)(
        create_diffusion(steps), GaussianWorld(mean, variance), x,
        lambda shape: torch.randn(1, *shape, generator=g), **options)
    assert found.mean().item() == pytest.approx(mean, abs=5 * (variance / n) ** 0.5 + 0.03 * mean)
    assert found.var().item() == pytest.approx(variance, rel=5 * (2 / n) ** 0.5 + 0.03)


def error_after(sampler, steps, variance):
    """How far a sampler with the perfect denoiser of N(0.8, variance) is from the exact answer; no chance in it.

    The deterministic ones against the exact solution of their differential equation; the ancestral one by the variance
    it gives, found from a unit of noise at one step at a time, since all is linear.
    """
    diffusion = create_diffusion(str(steps))
    last = diffusion.alphas_cumprod[-1]
    if sampler == "ddpm":
        units = iter(torch.eye(steps + 1))
        x, noise = next(units).view(1, 1, 1, -1), lambda shape: next(units).view(1, *shape)
        found = samplers.SAMPLERS[sampler](diffusion, GaussianWorld(0, variance), x, noise)
        return abs(found.double().square().sum().item() - variance)
    x = torch.linspace(-2, 2, 9).view(1, 1, 1, 9)
    found = samplers.SAMPLERS[sampler](diffusion, GaussianWorld(0.8, variance), x, lambda shape: torch.zeros(1, *shape))
    exact = 0.8 + variance**0.5 * (x - 0.8 * last**0.5) / (last * variance + 1 - last) ** 0.5
    return (found - exact).abs().max().item()


@pytest.mark.parametrize("variance", [0.25, 4.0])
@pytest.mark.parametrize("sampler, low, high", [("ddpm", 0.75, 1.05), ("ddim", 0.95, 1.05), ("dpmpp", 1.9, 2.3)])
def test_samplers_converge_at_the_order_they_promise(sampler, low, high, variance):
    """Twice the steps, half the error for ancestral (weakly) and DDIM, a quarter for DPM-Solver++(2M)."""
    errors = [error_after(sampler, steps, variance) for steps in (40, 80, 160)]
    assert all(low < math.log2(a / b) < high for a, b in pairwise(errors)), errors


def test_multistep_solver_by_hand():
    """The second step extrapolates x_0 by half the ratio of the steps in λ; another grid begins anew."""
    diffusion, predicted = create_diffusion("4"), iter([2.0, 3.0, 4.0, 5.0])

    def denoise(x, t, state):
        level = create_diffusion().alphas_cumprod[int(t[0])]
        return torch.cat([(x - level**0.5 * next(predicted)) / (1 - level) ** 0.5, torch.zeros_like(x)], 1), state

    def enlarge(x, state, t):
        return (x.repeat(1, 1, 2, 2) if t == diffusion.timestep_map[1] else x), state

    passed = []
    samplers.dpmpp_sample_loop(diffusion, lambda x, t, state: (passed.append(x), denoise(x, t, state))[1],
                               torch.zeros(1, 1, 1, 1), lambda shape: None, regrid=enlarge)
    level, before = diffusion.alphas_cumprod, diffusion.alphas_cumprod_prev
    h = [0.5 * math.log(b / (1 - b) * (1 - a) / a) for a, b in zip(level[1:], before[1:], strict=True)]  # of steps 1-3
    x = 0.0
    for k, estimate, i in ((3, 2.0, 1), (2, 3 + h[1] / (2 * h[2]) * (3 - 2), 2), (1, 4.0, 3)):
        x = ((1 - before[k]) / (1 - level[k])) ** 0.5 * x + before[k] ** 0.5 * (1 - math.exp(-h[k - 1])) * estimate
        assert passed[i].flatten()[0].item() == pytest.approx(x, rel=1e-4)
    assert [p.shape[-1] for p in passed] == [1, 1, 2, 2]


def test_learned_variance_runs_from_posterior_to_beta():
    diffusion, i = create_diffusion("50"), torch.tensor([20])
    x = torch.zeros(1, 1, 2, 2)
    for v, expected in ((-1.0, diffusion.posterior_variance[20]), (1.0, diffusion.betas[20])):
        p = diffusion.p_mean_variance(torch.cat([x, x + v], 1), x, i)
        assert p.variance.flatten()[0].item() == pytest.approx(expected, rel=1e-5)


def test_the_bound_trains_the_variance_alone():
    g = torch.Generator().manual_seed(0)
    out = torch.randn(2, 2, 3, 3, generator=g).requires_grad_()
    x0, noise = torch.randn(2, 2, 1, 3, 3, generator=g)
    terms = create_diffusion().training_losses(lambda x, t: out, x0, torch.tensor([0, 500]), noise)
    terms["vb"].sum().backward()
    assert not out.grad[:, :1].any() and out.grad[:, 1:].all()


class Echo(torch.nn.Module):
    """A model whose ε is its label, which remembers how often each image was seen and inherits all."""

    in_channels = 1

    def draw_seed(self, n, generator):
        return torch.zeros(len(generator), 1)

    def initial_state(self, n, h, w, seed):
        return torch.zeros(n, 1, 1, 1)

    def inherit(self, state, seed):
        return state

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x, t, y, state=None, generator=None):
        self.calls.append((y.clone(), state.clone()))
        eps = (1 + y[:, :1]).view(-1, 1, 1, 1).expand_as(x)
        return torch.cat([eps, y[:, :1].view(-1, 1, 1, 1).expand_as(x)], 1), state + 1 + eps[:, :1, :1, :1]


def test_guidance_by_hand():
    """ε = ε_null + s·(ε_label − ε_null), variance of the labelled half, null labels zero, states apart."""
    model, y = Echo(), torch.tensor([[1.0], [3.0]])
    denoise = guidance.GuidedDenoiser(model, y, 1.5, (generators(2), generators(2)))
    x, t = torch.zeros(2, 1, 2, 2), torch.tensor([5, 5])
    out, state = denoise(x, t, None)
    assert out[:, 0, 0, 0].tolist() == [1 + 1.5 * 1, 1 + 1.5 * 3] and out[:, 1, 0, 0].tolist() == [1, 3]
    assert model.calls[0][0].flatten().tolist() == [1, 3, 0, 0]
    denoise(x, t, state)
    assert model.calls[1][1].flatten().tolist() == [3, 5, 2, 2]


def test_guidance_in_an_interval():
    """Outside it the labelled half alone is computed; the null half waits with the state it has."""
    model, y = Echo(), torch.tensor([[1.0], [3.0]])
    denoise = guidance.GuidedDenoiser(model, y, 1.5, (generators(2), generators(2)), interval=(3, 5))
    x, state, epsilons = torch.zeros(2, 1, 2, 2), None, []
    for t in (6, 5, 2, 3):
        out, state = denoise(x, torch.tensor([t, t]), state)
        epsilons.append(out[:, 0, 0, 0].tolist())
    assert epsilons == [[2, 4], [2.5, 5.5], [2, 4], [2.5, 5.5]]
    assert [len(labels) for labels, _ in model.calls] == [2, 4, 2, 4]
    assert model.calls[3][1].flatten().tolist() == [9, 15, 2, 2]


def test_guidance_one_is_the_limit_of_scales_above_one():
    from test_automaton import small_geca

    torch.manual_seed(0)
    model, y = small_geca(), torch.eye(3)[:2]
    images = {}
    for scale in (1, 1 + 1e-5):
        denoise = guidance.GuidedDenoiser(model, y, scale, (generators(2), generators(2, seed=1)))
        noise = guidance.ImageNoise(generators(2, seed=2), "cpu")
        x = noise((2, 6, 6))
        images[scale] = samplers.p_sample_loop(create_diffusion("5"), denoise, x, noise)
    torch.testing.assert_close(images[1], images[1 + 1e-5], rtol=1e-3, atol=1e-3)


def test_state_is_inherited_between_sampling_steps():
    """The hidden channels that a step left are what the next one starts from; the output is seeded afresh."""
    from test_automaton import small_geca

    model, seen = small_geca(), []
    forward = model.forward

    def spy(x, t, y, state, generator):
        out, left = forward(x, t, y, state, generator)
        seen.append((state.clone(), left.clone()))
        return out, left

    model.forward = spy
    denoise = guidance.GuidedDenoiser(model, torch.eye(3)[:2], 1.5, (generators(2), generators(2, seed=1)))
    noise = guidance.ImageNoise(generators(2, seed=2), "cpu")
    samplers.p_sample_loop(create_diffusion("3"), denoise, noise((2, 5, 5)), noise)
    assert len(seen) == 3 and not seen[0][0][:, 4:].any()
    for (_, left), (start, _) in pairwise(seen):
        assert torch.equal(start[:, 4:], left[:, 4:]) and left[:, 4:].any()
        alive = start[:, :4].abs().sum((0, 1)).nonzero().tolist()
        assert alive == [[2, 2]]


def test_grids_of_multi_scale():
    assert [multiscale.reduction(t) for t in (999, 667, 666, 334, 333, 0)] == [4, 4, 2, 2, 1, 1]
    x = torch.arange(16.0).view(1, 4, 4)
    assert multiscale.shrink(x, 900).tolist() == [[[7.5]]]
    assert multiscale.shrink(x, 500)[0, 0].tolist() == [2.5, 4.5]
    step = torch.tensor([0.0, 1.0]).expand(2, 1, 2, 2)
    z, (state, null) = multiscale.enlarge(step, (torch.ones(2, 5, 2, 2), None), 400, side=8)
    assert z.shape == (2, 1, 4, 4) and state.shape == (2, 5, 4, 4) and (state == 1).all() and null is None
    assert z[0, 0, 0].tolist() == [0, 0.25, 0.75, 1]  # bilinear
    assert multiscale.enlarge(z, None, 400, side=8)[0] is z
