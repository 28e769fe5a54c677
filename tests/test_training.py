"""What a training step draws; `--as-released` and the options it is made of: each changes what it says, no more."""

import copy
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import generators

import train
from core.errors import UserError
from dataset.latents import LatentCache
from dataset.sets import LabelledImages
from generation import validation as validation_module
from generation.checkpoint import Checkpoint, load, save
from generation.guidance import GuidedDenoiser, next_state, parse_heredity
from generation.training import Statistics, Training, ema_decay, learning_rate, min_snr_weight, update_ema
from metrics.kid import kid, polynomial_mmd
from models import GeCA
from sample_ddp import RELEASED, parser

REQUIRED = ["--data-path", "D", "--feature-path", "F"]
SPELT = ["--frozen-latents", "--no-ema-warmup", "--validation-weights", "model", "--no-both-weights",
         "--validation-labels", "null", "--validation-kid", "accumulated", "--val-samples", "24",
         "--num-sampling-steps", "1000", "--sampler", "ddpm", "--cfg-scale", "1", "--heredity", "whole"]


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


def training(*flags, model="GeCA-XS", load_from=None, side=2):
    """A run on six made-up latents, in batches of four."""
    args = train.parser().parse_args([*REQUIRED, "--global-batch-size", "4", "--epochs", "10", *flags])
    g = torch.Generator().manual_seed(0)
    cache = LatentCache(Path("cache"), {}, torch.randn(6, 2, 4, side, side, generator=g),
                        torch.full((6, 2, 4, side, side), 0.1), torch.ones(6, 3))
    return Training(model, cache, ["A", "B", "C"], train.training_options(args), Accelerator(cpu=True), load_from)


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
    for run in (ours, released):
        run.train_step()
    for (name, a), b, average, slow in zip(ours.net.named_parameters(), released.net.parameters(),
                                           ours.ema.parameters(), released.ema.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert torch.equal(average, a) or not torch.equal(average, slow), name
    assert ema_decay(0.9999, 0) == 0.1 and ema_decay(0.9999, 10**6) == 0.9999
    assert ema_decay(0.9999, 0, warmup=False) == 0.9999


def test_the_average_forgets_the_run_it_started_from():
    """--load-from: after some steps the average is that of the new weights; without warm-up it is the old model."""
    old = {name: torch.full_like(value, 5.0) for name, value in training().net.state_dict().items()}
    held = {}
    for warmup in ("--ema-warmup", "--no-ema-warmup"):
        run = training(warmup, load_from=old)
        with torch.no_grad():
            for p in run.net.parameters():
                p.zero_()
        run.optimiser.step = lambda: None  # the new weights stay 0: what is left in the average is the old model's
        for _ in range(30):
            run.train_step()
        held[warmup] = run.ema.final_layer.linear.weight.mean().item() / 5
    assert held["--ema-warmup"] < 1e-3 and held["--no-ema-warmup"] > 0.99


def test_the_average_by_hand():
    average, net = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    for layer, value in ((average, 1.0), (net, 11.0)):
        torch.nn.init.constant_(layer.weight, value)
    update_ema(average, net, 0.9)
    assert average.weight.item() == pytest.approx(2)


def test_further_averages_are_kept_and_restored():
    run = training("--more-ema-decays", "0.3")
    for _ in range(9):
        run.train_step()
    weight = "final_layer.linear.weight"
    state = copy.deepcopy(run.state())
    assert not torch.equal(state["averages"]["0.3"][weight], state["ema"][weight])  # warm-up is above 0.3
    again = training("--more-ema-decays", "0.3")
    again.restore(Checkpoint(args={}, **state))
    run.train_step()
    again.train_step()
    for decay in run.averages:
        for a, b in zip(run.averages[decay].parameters(), again.averages[decay].parameters(), strict=True):
            assert torch.equal(a, b)


# ---- optimisation


def test_learning_rates_by_hand():
    def rates(*flags, steps=(0, 1, 4, 9)):
        options = train.training_options(train.parser().parse_args([*REQUIRED, "--lr", "1", *flags]))
        return [learning_rate(options, step, step / 10) for step in steps]

    assert rates() == [1, 1, 1, 1]
    assert rates("--warmup", "4") == [0.25, 0.5, 1, 1]
    assert rates("--lr-schedule", "linear") == pytest.approx([1, 0.9, 0.6, 0.1])
    assert rates("--lr-schedule", "cosine", steps=(0, 5, 10)) == pytest.approx([1, 0.5, 0])
    assert rates("--lr-schedule", "linear", "--warmup", "2", steps=(0, 5)) == pytest.approx([0.5, 0.5])


def test_the_schedule_ends_with_the_training():
    run = training("--lr-schedule", "linear", "--lr", "0.01")
    run.step = run.total_steps - 1
    run.train_step()
    assert run.optimiser.param_groups[0]["lr"] == pytest.approx(0.01 / run.total_steps)
    run = training("--lr-schedule", "linear", "--lr", "0.01")
    run.time_share = 0.75  # --max-minutes: most of the time is gone
    run.train_step()
    assert run.optimiser.param_groups[0]["lr"] == pytest.approx(0.0025)


def test_gradients_are_clipped_and_their_norm_is_measured_before():
    changes = {}
    for flags in ((), ("--clip-norm", "1e-6")):
        run = training(*flags)
        run.optimiser.step = lambda run=run: changes.update(
            {run.options.clip_norm: (run.gradient_norm.item(), torch.cat([p.grad.flatten() for p in run.net.parameters()
                                                                          if p.grad is not None]).norm().item())})
        run.train_step(measure=True)
    (norm, free), (same_norm, clipped) = changes[0], changes[1e-6]
    assert norm == pytest.approx(free) and same_norm == pytest.approx(norm) and clipped == pytest.approx(1e-6, rel=1e-2)


def test_betas_reach_the_optimiser():
    assert training("--adam-betas", "0.8", "0.95").optimiser.param_groups[0]["betas"] == (0.8, 0.95)


@pytest.mark.parametrize("model, first, last", [("GeCA-XS", "cell_to_embedding", "final_layer.linear"),
                                                ("DiT-S", "x_embedder", "final_layer.linear"),
                                                ("LDM-B", "unet.conv_in", "unet.conv_out")])
def test_muon_has_the_matrices_inside(model, first, last):
    """Every trained parameter once: all matrices but the first layer, the last and the label table; the rest."""
    run = training("--optimizer", "muon", model=model, side=4)
    matrices, others = ({id(p) for p in group["params"]} for group in run.optimiser.param_groups)
    assert not matrices & others and run.optimiser.param_groups[1]["use_fallback"]
    trained = {key: p for key, p in run.net.named_parameters() if p.requires_grad}
    assert matrices | others == {id(p) for p in trained.values()}
    edges = {key for key, p in trained.items() if p.ndim > 1 and id(p) in others}
    assert edges == {"y_embedder.embedding_table.0.weight"} | {
        key for key in trained if key.startswith((first, last)) and key.endswith("weight")}


def test_a_muon_update_is_semi_orthogonal_and_of_adamws_size():
    """Singular values near lr · 0.2 · √max(rows, columns), whatever the gradient; elsewhere the first update of NAdamW.

    That is lr · (β1 + 1) for every weight that had a gradient.
    """
    run = training("--optimizer", "muon", "--lr", "0.01")
    before = copy.deepcopy(run.net.state_dict())
    run.train_step()
    after = run.net.state_dict()
    key = "final_layer.linear.weight"  # zero at first: nothing before it had a gradient, nor had the hidden channels
    assert (after[key] - before[key])[:4].abs().allclose(torch.tensor(0.019), atol=1e-3)
    run.train_step()  # now its gate has a gradient, after this step it is open
    before = copy.deepcopy(run.net.state_dict())
    run.train_step()
    key = "transformer.layers.0.1.fn.net.0.weight"  # (64, 384)
    values = torch.linalg.svdvals(run.net.state_dict()[key] - before[key]) / (0.01 * 0.2 * 384**0.5)
    assert values[0] < 1.2 and values[8] > 0.9  # sixteen cells: a gradient of low rank


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_restored_run_goes_on_as_it_would_have(optimizer, tmp_path):
    flags = ("--optimizer", optimizer, "--lr", "0.01")
    run, again = training(*flags), training(*flags)
    run.train_step()
    save(tmp_path / "last.pt", {**run.state(), "args": {"model": "GeCA-XS", "image_size": 16}})
    again.restore(load(tmp_path / "last.pt"))
    for either in (run, again):
        either.train_step()
    assert all(torch.equal(a, b) for a, b in zip(run.net.parameters(), again.net.parameters(), strict=True))


def test_min_snr_weighs_each_noise_level():
    """min(SNR, γ) / SNR: 1 where the noise is strong, γ / SNR where it is weak."""
    assert min_snr_weight(np.array([0.5, 0.9]), 5) == pytest.approx([1, 5 / 9])
    plain, weighted = training(), training("--min-snr", "5")
    for run in (plain, weighted):
        run.train_step()
    ratio = weighted.statistics.means(weighted.accelerator)["loss"] / plain.statistics.means(plain.accelerator)["loss"]
    assert 0 < ratio < 1
    same = [(a["loss_t4"], b["loss_t4"]) for a, b in [(plain.statistics.means(plain.accelerator),
                                                       weighted.statistics.means(weighted.accelerator))]
            if "loss_t4" in a]
    assert all(a == b for a, b in same)  # what is logged of the squared error is not weighted


def test_loss_is_logged_in_five_bins():
    statistics = Statistics("cpu")
    statistics.add(torch.tensor([1.0, 2, 3]), torch.tensor([0.5, 1, 4]), torch.tensor([0, 199, 999]))
    state = torch.tensor([1.0, 1, 5]).view(1, 3, 1, 1).expand(1, 3, 2, 2)  # the last channel is hidden
    statistics.add(torch.tensor([2.0]), torch.tensor([2.0]), torch.tensor([800]), state, 1)
    means = statistics.means(Accelerator(cpu=True))
    assert means == {"loss": 2, "loss_t0": 0.75, "loss_t4": 3, "state_rms": 3, "hidden_rms": 5}


# ---- heredity in training


def test_without_train_heredity_a_step_starts_from_one_cell():
    run = training()
    assert run.first_state(torch.zeros(2, 4, 2, 2), torch.zeros(2), torch.ones(2, 3), generators(2)) is None


def test_train_heredity_inherits_as_sampling_does():
    """At P = 1 the state is what `next_state` makes of a first pass on the same x_t and t, without a gradient."""
    run = training("--train-heredity", "1")
    x, t, y = torch.randn(2, 4, 2, 2), torch.tensor([3, 700]), torch.ones(2, 3)
    torch.nn.init.normal_(run.net.final_layer.linear.weight)
    state = run.first_state(x, t, y, generators(2))
    again = generators(2)
    for g in again:
        torch.rand((), generator=g)  # the coin
    seeds = run.net.draw_seed(2, again)
    _, first = run.net(x, t, y, None, generator=again)
    assert torch.equal(state, next_state(run.net, first, seeds, (2, 2)).detach()) and not state.requires_grad
    assert state[:, 8:].abs().sum() > 0 and torch.equal(state[:, :8, 1, 1], seeds)


def test_some_samples_inherit_and_others_do_not():
    run = training("--train-heredity", "0.5")
    torch.nn.init.normal_(run.net.final_layer.linear.weight)
    n = 64
    state = run.first_state(torch.randn(n, 4, 2, 2), torch.zeros(n), torch.ones(n, 3), generators(n))
    inherited = (state[:, 8:] != 0).flatten(1).any(1).float().mean().item()
    assert abs(inherited - 0.5) < 5 * 0.5 / n**0.5


def test_train_heredity_needs_a_state():
    with pytest.raises(UserError, match=r"--train-heredity 0\.5: DiT-S keeps no state"):
        training("--train-heredity", "0.5", model="DiT-S")


# ---- validation


def validate(monkeypatch, *flags):
    """What two validations ask of the sampler, and the KID they find: (labels, options), scores, real features."""
    args = train.parser().parse_args([*REQUIRED, "--val-samples", "8", *flags])
    asked, made, g = [], np.zeros((8, 4, 4, 3), np.uint8), np.random.default_rng(0)
    real, *generated = g.standard_normal((12, 5)), *g.standard_normal((2, 8, 5))

    def record(net, codec, labels, ids, cells, options, device, progress, on_step):
        asked.append((labels, options))
        yield ids, made

    monkeypatch.setattr(validation_module, "sample_images", record)
    monkeypatch.setattr(validation_module, "load_images", lambda paths, size, workers: paths)
    features = iter([real, *generated])
    split = LabelledImages(tuple("abcdefghijkl"), np.eye(3)[np.arange(12) % 3], tuple("ABC"))
    validation = validation_module.Validation(split, split, lambda images: next(features), None, 4, 2,
                                              train.validation_options(args), Accelerator(cpu=True))
    before = []
    scores = [validation(None, before)[0] for _ in range(2)]
    return asked[0], scores, real, generated, validation.chosen


def asked_for(monkeypatch, *flags):
    """What validation samples with these flags."""
    labels, options = validate(monkeypatch, *flags)[0]
    return {"labels": "own" if labels.any() else "null", **asdict(options)}


@pytest.mark.parametrize("flags, name, value", [
    (("--validation-labels", "null"), "labels", "null"),
    (("--num-sampling-steps", "1000"), "steps", 1000), (("--cfg-scale", "1"), "cfg_scale", 1),
    (("--heredity", "whole"), "heredity", "whole"),
    (("--sampler", "ddim"), "sampler", "ddim"), (("--shared-fire",), "shared_fire", True),
    (("--heredity", "none"), "heredity", "none"), (("--heredity", "below:550"), "heredity", "below:550")])
def test_a_validation_option_changes_one_thing(monkeypatch, flags, name, value):
    ours, theirs = asked_for(monkeypatch), asked_for(monkeypatch, *flags)
    assert ours["labels"] == "own" and ours["heredity"] == "published"
    assert theirs == {**ours, name: value} != ours


def test_the_released_kid_is_never_reset(monkeypatch):
    asked, fresh, real, (first, second), chosen = validate(monkeypatch)
    assert fresh == pytest.approx([polynomial_mmd(real, first), polynomial_mmd(real, second)])
    asked_again, released, *_ = validate(monkeypatch, "--validation-kid", "accumulated")
    few = real[chosen]
    both = kid(np.concatenate([few, few]), np.concatenate([first, second]), 2, 100, 0)[0]
    assert released == pytest.approx([kid(few, first, 2, 100, 0)[0], both])
    assert asked[1] == asked_again[1]


# ---- heredity in sampling


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
    for rule in ("published", "whole"):
        model, state = Living(), None
        denoise = GuidedDenoiser(model, torch.ones(2, 3), scale, (generators(2), generators(2, seed=1)), rule)
        for _ in range(2):
            _, state = denoise(torch.zeros(2, 2, 3, 3), torch.zeros(2), state)
        calls.append(model.given)
    (first, draws), (second, later) = calls[1]
    assert first.shape == second.shape and torch.equal(second, first + 1) == differs
    assert torch.equal(calls[0][1][0], second) != differs and torch.equal(calls[0][1][0][:, 4:], second[:, 4:])
    assert [c[1] for c in calls[0]] == [draws, later]  # which cells fire does not depend on the rule


@pytest.mark.parametrize("rule, inherited", [("published", [True, True, True]), ("none", [False, False, False]),
                                             ("below:550", [False, False, True])])
def test_heredity_by_step(rule, inherited):
    """Hidden channels live on, or every step starts from one cell; which cells fire is the same either way."""
    model, state = Living(), None
    denoise = GuidedDenoiser(model, torch.ones(2, 3), 1.5, (generators(2), generators(2, seed=1)), rule)
    for t in (999, 990, 550, 549):
        _, state = denoise(torch.zeros(2, 2, 3, 3), torch.full((2,), t), state)
    assert [bool(given[:, 4:].any()) for given, _ in model.given[1:]] == inherited
    reference = Living()
    denoise, state = GuidedDenoiser(reference, torch.ones(2, 3), 1.5, (generators(2), generators(2, seed=1))), None
    for t in (999, 990, 550, 549):
        _, state = denoise(torch.zeros(2, 2, 3, 3), torch.full((2,), t), state)
    assert [draws for _, draws in model.given] == [draws for _, draws in reference.given]
    assert all(torch.equal(a[:, :4], b[:, :4]) for (a, _), (b, _) in zip(model.given, reference.given, strict=True))


def test_heredity_that_does_not_exist():
    for text in ("below", "below:", "below:x", "below:1001", "half"):
        with pytest.raises(UserError, match=f"--heredity {text}: expected"):
            parse_heredity(text)
    assert parse_heredity("below:0550") == "below:550"
