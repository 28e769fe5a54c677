"""On a GPU as on a CPU: engines, CUDA graphs, a training step and guided sampling, in every precision."""

import pytest
import torch
from conftest import generators, largest_relative
from test_automaton import inputs, small_geca

from automaton import graphs, reference
from core import runtime
from diffusion import create_diffusion
from generation.sampling import SamplingOptions, sample_latents
from models import MODELS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BOUNDS = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 5e-2, "fp16": 1e-2}  # largest difference, as a share of the largest value


@pytest.fixture(params=BOUNDS)
def precision(request):
    runtime.allow(request.param, "cuda")
    yield request.param
    runtime.allow("fp32", "cuda")


def call(model, device, precision, n=3, grid=(7, 5), function=None):
    """Output, state and every gradient of one call, on the CPU; `function` in place of the model."""
    model = model.to(device)
    model.zero_grad()
    x, t, y = (part.to(device) for part in inputs(n, *grid))
    state = torch.randn(n, 9, *grid, generator=torch.Generator().manual_seed(5)).to(device).requires_grad_()
    x.requires_grad_()
    with runtime.autocast(precision, device):
        out, new = (function or model)(x, t, y, state, generators(n))
    (new.float() * torch.randn(new.shape, generator=torch.Generator().manual_seed(6)).to(device)).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = {"out": out, "state": new, "x": x.grad, "state_in": state.grad, **grads}
    return {name: tensor.detach().float().cpu() for name, tensor in found.items()}


@pytest.fixture(scope="module")
def expected():
    """What automaton/reference.py says, on the CPU in float32."""
    model = small_geca()

    def function(x, t, y, state, generators):
        return reference.forward(model, x, t, y, model.draw_fire(len(x), x[0, 0].numel(), generators), state)

    return call(model, "cpu", "fp32", function=function)


@pytest.mark.parametrize("engine, again", [("dense", False), ("dense", True), ("asynchronous", False),
                                           ("asynchronous", True)])
def test_engines_give_results_and_gradients_of_the_reference_on_a_cpu(engine, again, precision, expected):
    model = small_geca()
    model.engine, model.checkpoint_steps = engine, again
    found = call(model, "cuda", precision)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert largest_relative(found[name], value) < BOUNDS[precision], name


@torch.no_grad()
def test_a_graph_repeats_the_engine(precision):
    """Also for other inputs of the same shape, another grid of as many cells, and weights that have changed."""
    model = small_geca().cuda()
    model.engine = "asynchronous"
    for n, grid, seed in ((3, (7, 5), 1), (3, (7, 5), 2), (3, (5, 7), 1), (1, (7, 5), 1), (3, (7, 5), 3)):
        x, t, y = (part.cuda() for part in inputs(n, *grid, seed=seed))
        with runtime.autocast(precision, "cuda"):
            plain = model(x, t, y, None, generators(n, seed))[1]
            with graphs.recorded("cuda"):
                replayed = model(x, t, y, None, generators(n, seed))[1]
        assert largest_relative(replayed.float(), plain.float()) < BOUNDS[precision] / 10 + 1e-5
        for p in model.parameters():
            p.mul_(1.01)  # in place, as averages of weights are updated
    assert len(graphs._graphs[model]) == 3  # n and grid


def test_nothing_is_recorded_where_gradients_are_wanted():
    model = small_geca().cuda()
    with graphs.recorded("cuda"):
        call(model, "cuda", "fp32")
    assert model not in graphs._graphs


@pytest.mark.parametrize("name", ["GeCA-XS", "DiT-S", "LDM-B"])
def test_a_training_step_is_that_of_a_cpu(name, precision):
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = MODELS[name](input_size=8, num_classes=3).to(device)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).to(device))
        g = torch.Generator().manual_seed(2)
        x, noise = (torch.randn(4, 4, 8, 8, generator=g).to(device) for _ in range(2))
        t, y = torch.tensor([5, 200, 600, 990]), torch.eye(4, 3).to(device)
        with runtime.autocast(precision if device == "cuda" else "fp32", device):
            terms = create_diffusion().training_losses(
                lambda x, t, model=model, y=y: model(x, t, y, None, generators(4))[0], x, t, noise)
        terms["loss"].mean().backward()
        grads = [p.grad.float().cpu().flatten() for p in model.parameters() if p.grad is not None]
        results.append((terms["loss"].detach().float().cpu(), torch.cat(grads)))
    (loss, grad), (loss_gpu, grad_gpu) = results
    assert largest_relative(loss_gpu, loss) < BOUNDS[precision]
    assert (grad_gpu - grad).norm() < 2 * BOUNDS[precision] * grad.norm()


@pytest.mark.parametrize("name", ["GeCA-XS", "DiT-S", "LDM-B"])
def test_guided_sampling_is_that_of_a_cpu(name, precision):
    torch.manual_seed(0)
    model = MODELS[name](input_size=8, num_classes=3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    options, labels = SamplingOptions(steps=10, sampler="ddim", precision=precision), torch.eye(4, 3)

    def sample(device, precision, ids):
        with runtime.autocast(precision, device), graphs.recorded(device):
            return sample_latents(model.to(device), labels[ids], ids, 8, options, device).cpu()

    expected = sample("cpu", "fp32", [0, 1, 2, 3])
    found = sample("cuda", precision, [0, 1, 2, 3])
    assert largest_relative(found, expected) < 2 * BOUNDS[precision]
    assert torch.equal(found, sample("cuda", precision, [0, 1, 2, 3]))  # the same bits again
    assert largest_relative(sample("cuda", precision, [2, 3]), found[2:]) < 2 * BOUNDS[precision]  # in any batch
