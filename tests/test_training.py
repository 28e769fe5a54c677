"""What a training step draws; `--as-released` and the options it is made of: each changes what it says, no more."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import generators

import train
from dataset.latents import LatentCache
from generation import validation as validation_module
from generation.guidance import GuidedDenoiser
from generation.sampling import RELEASED, parser
from metrics.kid import kid, polynomial_mmd
from models import GeCA

REQUIRED = ["--data-path", "D", "--feature-path", "F"]
SPELT = ["--frozen-latents", "--no-ema-warmup", "--validation-weights", "model", "--validation-labels", "null",
         "--validation-kid", "accumulated", "--val-samples", "24", "--num-sampling-steps", "1000", "--cfg-scale", "1",
         "--unguided-state", "whole"]


def parsed(*flags):
    return vars(train.parser().parse_args([*REQUIRED, *flags]))


def test_one_flag_is_all_of_them():
    assert parsed("--as-released") == {**parsed(*SPELT), "as_released": True}
    ours, released = parsed(), parsed("--as_released")
    assert {name for name in ours if ours[name] != released[name]} == {*train.RELEASED, "as_released"} - {"val_samples"}


def test_a_flag_that_is_given_wins():
    assert parsed("--as-released", "--cfg-scale", "2")["cfg_scale"] == 2
    assert parsed("--no-frozen-latents", "--as-released")["frozen_latents"] is False


def test_samplers_have_theirs():
    flags = ["--ckpt", "C", "--data-path", "D"]
    ours, released = (vars(parser("", "").parse_args([*flags, *more])) for more in ((), ["--as-released"]))
    assert {name: released[name] for name in ours if ours[name] != released[name]} == {**RELEASED, "as_released": True}


# ---- training


def training(*flags):
    """A run on six made-up latents, in batches of four."""
    args = train.parser().parse_args([*REQUIRED, "--model", "GeCA-XS", "--global-batch-size", "4", *flags])
    g = torch.Generator().manual_seed(0)
    cache = LatentCache(Path("cache"), {}, torch.randn(6, 2, 4, 2, 2, generator=g), torch.full((6, 2, 4, 2, 2), 0.1),
                        torch.ones(6, 3))
    return train.Training(args, Accelerator(cpu=True), cache, ["A", "B", "C"], None)


def drawn(run, step):
    run.step = step
    (samples,) = run.draw([(0, 2), (1, 5)])
    return [torch.stack([torch.as_tensor(sample[i]) for sample in samples]) for i in range(4)]


def test_label_entries_are_dropped_one_by_one():
    run = training()
    labels = torch.cat([drawn(run, step)[2] for step in range(1000)])  # (2000, 3), all of them asked for
    missing, error = (labels == 0).float(), 5 * (0.09 / 2000) ** 0.5
    assert ((missing.mean(0) - 0.1).abs() < error).all()
    together = (missing[:, :1] * missing[:, 1:]).mean(0)
    assert ((together - 0.01).abs() < 5 * (0.01 / 2000) ** 0.5).all()


def test_every_step_of_the_diffusion_is_trained():
    run = training()
    steps = torch.cat([drawn(run, step)[1] for step in range(2000)]).double()
    assert steps.min() >= 0 and steps.min() < 5 and 994 < steps.max() <= 999
    assert abs(steps.mean() - 499.5) < 5 * 288.7 / len(steps) ** 0.5


def test_frozen_latents_are_one_draw_and_one_mirror_per_image():
    frozen, ours = training("--frozen-latents"), training()
    (early, *rest), (late, *_) = drawn(frozen, 0), drawn(frozen, 40)
    assert torch.equal(early, late) and not torch.equal(early[0], early[1])
    (our_early, *our_rest), (our_late, *_) = drawn(ours, 0), drawn(ours, 40)
    assert not torch.isclose(our_early, our_late).any()
    assert all(torch.equal(a, b) for a, b in zip(rest, our_rest, strict=True))  # steps, labels and noise stay
    near = (early[0] - frozen.cache.mean[2]).abs().amax((1, 2, 3))  # a posterior sample of one of the two variants
    assert 0 < near.min() < 0.6 < near.max()
    mirrored = {int((frozen.cache.draw(i, frozen.latent_generator(i, 0)) - frozen.cache.mean[i])
                    .abs().amax((1, 2, 3)).argmin()) for i in range(6)}
    assert mirrored == {0, 1}  # the coin falls for each image


def test_ema_warmup_changes_the_average_alone():
    ours, released = training(), training("--no-ema-warmup")
    assert ours.ema_decay() == 0.1 and released.ema_decay() == 0.9999
    for run in (ours, released):
        run.train_step()
    for (name, a), b, average, slow in zip(ours.net.named_parameters(), released.net.parameters(),
                                           ours.ema.parameters(), released.ema.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert torch.equal(average, a) or not torch.equal(average, slow), name
    ours.step = 10**6
    assert ours.ema_decay() == 0.9999


def test_the_average_by_hand():
    average, net = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    for layer, value in ((average, 1.0), (net, 11.0)):
        torch.nn.init.constant_(layer.weight, value)
    train.update_ema(average, net, 0.9)
    assert average.weight.item() == pytest.approx(2)


# ---- validation


def validate(monkeypatch, *flags, features=None):
    """What a validation asks of the sampler, and the KID it finds: (net, labels, options, scores)."""
    run = training("--val-samples", "8", *flags)
    asked, made = {}, np.zeros((8, 4, 4, 3), np.uint8)

    def record(net, codec, labels, ids, **options):
        asked.update(net=net, labels=labels, options={k: v for k, v in options.items() if k != "progress"})
        yield ids, made

    monkeypatch.setattr(validation_module, "sample_images", record)
    validation = object.__new__(validation_module.Validation)
    g = np.random.default_rng(0)
    validation.args, validation.accelerator, validation.codec = run.args, run.accelerator, None
    validation.split = SimpleNamespace(labels=np.eye(3)[np.arange(12) % 3], label_names="ABC")
    validation.chosen, validation.real_features = [3, 1, 4, 0, 9, 2, 6, 5], g.standard_normal((12, 5))
    generated = iter(g.standard_normal((2, 8, 5)))
    validation.features = lambda images: next(generated)
    monkeypatch.setattr(validation, "write_grid", lambda images, path: None)
    found = [validation(run, Path("unused")) for _ in range(2)]
    return run, asked, found, validation.real_features, np.random.default_rng(0)


def kinds(run, asked):
    return {"weights": "ema" if asked["net"] is run.ema else "model",
            "labels": "null" if not asked["labels"].any() else "own", **asked["options"]}


@pytest.mark.parametrize("flags, name, value", [
    (("--validation-weights", "model"), "weights", "model"), (("--validation-labels", "null"), "labels", "null"),
    (("--num-sampling-steps", "1000"), "steps", 1000), (("--cfg-scale", "1"), "cfg_scale", 1),
    (("--unguided-state", "whole"), "unguided_state", "whole")])
def test_a_validation_option_changes_one_thing(monkeypatch, flags, name, value):
    ours, theirs = (kinds(*validate(monkeypatch, *more)[:2]) for more in ((), flags))
    assert ours["weights"] == "ema" and ours["labels"] == "own" and ours["unguided_state"] == "hidden"
    assert theirs == {**ours, name: value} != ours


def test_the_released_kid_is_never_reset(monkeypatch):
    _, asked, fresh, real, g = validate(monkeypatch)
    g.standard_normal((12, 5))
    first, second = g.standard_normal((2, 8, 5))
    assert fresh == pytest.approx([polynomial_mmd(real, first), polynomial_mmd(real, second)])
    _, asked_again, released, _, _ = validate(monkeypatch, "--validation-kid", "accumulated")
    few = real[[3, 1, 4, 0, 9, 2, 6, 5]]
    both = kid(np.concatenate([few, few]), np.concatenate([first, second]), 2, 100, 0)[0]
    assert released == pytest.approx([kid(few, first, 2, 100, 0)[0], both])
    assert asked["options"] == asked_again["options"]


# ---- sampling without guidance


class Living(torch.nn.Module):
    """Notes the state it is given; returns another. The rules of inheritance are GeCA's own."""

    initial_state, inherit, out_channels, hidden = GeCA.initial_state, GeCA.inherit, 4, 3

    def __init__(self):
        super().__init__()
        self.given = []

    def draw_seed(self, n, generator):
        return torch.stack([torch.randn(4, generator=g) for g in generator])

    def forward(self, x, t, y, state, generator):
        self.given.append((state, [torch.rand((), generator=g).item() for g in generator]))
        return torch.zeros(len(x), 4, 3, 3), state + 1


@pytest.mark.parametrize("scale, differs", [(1, True), (1.5, False)])
def test_the_whole_state_is_inherited_only_without_guidance(scale, differs):
    calls = []
    for rule in ("hidden", "whole"):
        model, state = Living(), None
        denoise = GuidedDenoiser(model, torch.ones(2, 3), scale, (generators(2), generators(2, seed=1)), rule)
        for _ in range(2):
            _, state = denoise(torch.zeros(2, 2, 3, 3), torch.zeros(2), state)
        calls.append(model.given)
    (first, draws), (second, later) = calls[1]
    assert first.shape == second.shape and torch.equal(second, first + 1) == differs
    assert torch.equal(calls[0][1][0], second) != differs and torch.equal(calls[0][1][0][:, 4:], second[:, 4:])
    assert [c[1] for c in calls[0]] == [draws, later]  # which cells fire does not depend on the rule
