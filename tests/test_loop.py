"""The loop of a training: --max-minutes bounds all of it, other flags are noted; trackers; the plot."""

import json
import sys
import types
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import call_script, succeeded
from helpers import message_of, noise_images
from PIL import Image

import train
from core import runs, trackers
from core.cli import Parser, integer
from core.runtime import AGREE_EVERY
from evaluation import curves
from generation import loop as loops
from generation import validation as validations
from generation.checkpoint import Checkpoint
from generation.cost import duration
from generation.loop import Loop, LoopOptions, time_for_validation
from generation.sampling import SamplingOptions
from generation.validation import Validation, ValidationOptions


class Clock:
    """time.monotonic() that goes on only where a test says so."""

    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    for module in (loops, validations):
        monkeypatch.setattr(module.time, "monotonic", clock)
    return clock


# ---- the time limit


class FakeTraining:
    """Steps of a given length; two in an epoch."""

    def __init__(self, clock, step_seconds):
        self.clock, self.step_seconds = clock, step_seconds
        self.accelerator, self.net = Accelerator(cpu=True), torch.nn.Linear(1, 1)
        self.ema = self.bare_net = self.net
        self.step, self.minutes, self.best_kid, self.time_share = 0, 0.0, float("inf"), 0.0
        self.batch, self.steps_per_epoch, self.total_steps = 4, 2, 1000
        self.validated, self.gradient_norm, self.shares = [], None, []
        self.optimiser = SimpleNamespace(param_groups=[{"lr": 1e-3}])
        self.statistics = SimpleNamespace(loss=torch.tensor([2.0, 4.0]), means=lambda accelerator: {"loss": 0.5})

    @property
    def epoch(self):
        return self.step // self.steps_per_epoch

    def train_step(self, measure):
        self.clock.now += self.step_seconds
        self.step += 1
        self.shares.append(self.time_share)

    def restart_statistics(self):
        pass

    def state(self):
        return {"minutes": self.minutes}


class FakeValidation:
    """Takes as long as it says, or longer, but not beyond the deadline."""

    options, chosen, floor = SimpleNamespace(sampling=SimpleNamespace(steps=25)), [0], (0.01, 0.02)
    features = SimpleNamespace(name="retina")

    def __init__(self, clock, expected, takes=None):
        self.clock, self.expected, self.takes, self.calls = clock, expected, takes or expected, 0

    def seconds(self, net):
        return self.expected

    def __call__(self, net, before, deadline):
        self.calls += 1
        if self.clock.now + self.takes > deadline:
            self.clock.now = deadline
            return None
        self.clock.now += self.takes
        return 0.5 / self.calls, noise_images(1)

    def write_grid(self, images, path):
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(images[0]).save(path)
        return images[0]


def train_for(tmp_path, clock, step=1.0, validation=10, takes=None, **options):
    """Let a loop run -> training, validation, records of metrics.jsonl, log, seconds it took."""
    options = LoopOptions(**{"max_minutes": 2.0, "validate_every": 1000, "log_every": 50, "ckpt_every": 1000,
                             "both_weights": False} | options)
    training, fake = FakeTraining(clock, step), FakeValidation(clock, validation, takes)
    started = clock.now
    reserve = time_for_validation(options, fake, None, started)
    log = runs.RunLog(tmp_path / "run", True, tracker="none")
    assert Loop(options, training, fake, log, {}, SimpleNamespace(asked=None), started, reserve).run() is False
    records = [{name: value for name, value in record.items() if name != "crc32"} for record in map(
        json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())]
    return training, fake, records, (tmp_path / "run" / "log.txt").read_text(), clock.now - started


def test_the_last_validation_is_within_the_time_limit(tmp_path, clock):
    training, fake, records, log, took = train_for(tmp_path, clock)
    assert 120 - 10 - 2 * AGREE_EVERY < training.step <= 110 and fake.calls == 1 and took <= 120
    assert records[-1] == {"step": training.step, "kid": 0.5, "kid_averaged": 0.5, "kid_floor": 0.01,
                           "kid_floor_std": 0.02}
    assert "after --max-minutes 2" in log and training.minutes == 2  # nothing is left for the same command again
    assert training.shares[-1] == pytest.approx(1, abs=0.1)  # the learning rate has fallen to its end


def test_validations_on_the_way_count_too(tmp_path, clock):
    """One after each 20 steps of a second, 15 seconds long: there is no room for the one that would delay the last."""
    training, fake, *_, took = train_for(tmp_path, clock, validation=15, validate_every=10)
    assert took == 120 and fake.calls == 3 and training.step == 120 - 3 * 15


def test_a_validation_that_takes_longer_than_expected_is_cut_short(tmp_path, clock):
    _, _, records, log, took = train_for(tmp_path, clock, validation=10, takes=40)
    assert took == 120 and not any("kid" in record for record in records)
    assert "--max-minutes 2 are over, validation of the averaged weights left out" in log
    assert torch.load(tmp_path / "run" / "checkpoints" / "last_ckpt.pt", weights_only=True)["minutes"] == 2


def test_a_limit_without_time_to_train_is_refused(tmp_path, clock):
    assert message_of(lambda: train_for(tmp_path, clock, validation=130)).startswith(
        "--max-minutes 2: 0 s are gone and a validation takes about 130 s, so no time is left to train; give more")
    assert not (tmp_path / "run").exists()


def test_without_a_limit_all_steps_are_made_and_both_weights_scored(tmp_path, clock):
    training, fake, records, log, _ = train_for(tmp_path, clock, max_minutes=0, both_weights=True)
    assert training.step == 1000 and fake.calls == 2 and "complete: epoch 500" in log
    assert records[-1]["kid"] == records[-1]["kid_averaged"] == 0.5 and records[-1]["kid_raw"] == 0.25
    assert training.best_kid == 0.5  # averaged weights decide


# ---- validation


def validation(monkeypatch, clock, first=5.0, step=2.0, decode=3.0, samples=6, batch=4, **options):
    """A validation whose sampler takes these seconds for a first step, each further one, and the pictures."""
    def sample(net, codec, labels, ids, cells, sampling, device, bar, on_step):
        for start in range(0, len(ids), sampling.batch_size):
            part = ids[start:start + sampling.batch_size]
            for k in range(sampling.steps):
                clock.now += step if k else first
                on_step(part, None)
            clock.now += decode
            yield part, noise_images(len(part))

    monkeypatch.setattr(validations, "sample_images", sample)
    monkeypatch.setattr(validations, "load_images", lambda paths, size, workers: np.stack(paths))

    class Split(list):
        def __init__(self, n, seed):
            super().__init__(range(n))
            self.paths = list(np.random.default_rng(seed).standard_normal((n, 5)))
            self.labels = np.zeros((n, 2), int)

    def features(images):
        return images if images.ndim == 2 else images.reshape(len(images), -1)[:, :5].astype(float)

    sampling = SamplingOptions(steps=25, batch_size=batch)
    return Validation(Split(12, 0), Split(50, 1), features, None, 4, 2, ValidationOptions(sampling, samples, **options),
                      Accelerator(cpu=True))


def test_a_trial_tells_how_long_a_validation_takes(monkeypatch, clock):
    """The first step, slow as first steps are, counts once for each of two batches."""
    trial = validation(monkeypatch, clock).seconds(None)
    started = clock.now
    validation(monkeypatch, clock)(None, [])
    assert trial == clock.now - started == 2 * (5 + 24 * 2 + 3)


def test_a_validation_ends_at_its_deadline(monkeypatch, clock):
    """The first batch takes 56 seconds, both 112."""
    started = clock.now
    assert validation(monkeypatch, clock)(None, [], started + 60) is None
    assert clock.now - started == 56 + 5  # the step in which time was up
    assert validation(monkeypatch, clock)(None, [], clock.now + 112) is not None


def test_the_noise_floor_is_what_real_images_score(monkeypatch, clock):
    """Eight sets of six of the 50 training images, drawn as the validation images are: 0, give or take."""
    mean, std = validation(monkeypatch, clock).floor
    assert abs(mean) < 4 * std / 8**0.5 and std > 0
    assert validation(monkeypatch, clock, samples=12, batch=12).floor is not None
    assert validation(monkeypatch, clock, score="accumulated").floor is None


# ---- going on with other flags


def go_on(before, *now, features="f"):
    """What a run whose checkpoint has the flags `before` makes of those of now -> lines, history, best KID."""
    parser = train.parser()
    required = ["--data-path", "D", "--feature-path", "F"]
    old, new = (parser.parse_args([*required, *flags]) for flags in (before, now))
    training = SimpleNamespace(step=7, history=[], best_kid=0.1, validated=[1])
    checkpoint = Checkpoint(args=train.plain(old), model_args={}, features="f")
    return list(train.go_on(new, training, checkpoint, SimpleNamespace(identity=features))), training


def test_what_changes_is_noted():
    lines, training = go_on(["--epochs", "3"], "--epochs", "5", "--lr", "0.5", "--log-every", "3")
    assert lines == ["from step 7 on: epochs 3 (now 5), lr 0.0001 (now 0.5)"] and training.best_kid == 0.1
    assert training.history == [{"step": 7, "changed": {"epochs": [3, 5], "lr": [1e-4, 0.5]}}]


def test_another_validation_has_another_best():
    lines, training = go_on([], "--val-samples", "9")
    assert training.best_kid == float("inf") and training.validated == []
    assert lines == ["validation is not what it was: the best KID starts anew",
                     "from step 7 on: val_samples 24 (now 9)"]
    assert go_on([], features="g")[1].best_kid == float("inf")
    assert go_on([], "--validate-every", "3", "--no-both-weights")[1].best_kid == 0.1


def test_flags_are_remembered_and_what_is_given_counts():
    known = {"fold": 3, "lr": 0.5, "data": "D", "gone": 1}
    parser = Parser("toy", released={"lr": 2.0}, memory=("resume", lambda name: known))
    parser.add_argument("--resume")
    parser.add_argument("--data", required=True, type=lambda text: f"<{text}>")
    parser.add_argument("--fold", type=integer(0), default=0)
    parser.add_argument("--lr", type=float, default=1.0)
    assert vars(parser.parse_args(["--resume", "R", "--lr", "0.1"])) == {
        "resume": "R", "data": "<D>", "fold": 3, "lr": 0.1, "as_released": False}
    assert parser.sources == {"fold": "--resume R", "data": "--resume R", "lr": "given", "resume": "given"}
    with pytest.raises(SystemExit):
        parser.parse_args(["--fold", "1"])  # what is required still is


# ---- trackers


def test_a_tracker_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    assert message_of(lambda: trackers.check("wandb")).startswith("--tracker wandb: the package is not installed; pip")
    trackers.check("none")


def test_a_run_is_one_run_of_wandb_however_often_it_goes_on(tmp_path, monkeypatch):
    """Through a stand-in of the package, which notes what it is asked for."""
    asked, logged = [], []
    run = SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: None)
    fake = types.ModuleType("wandb")
    fake.init, fake.Image = lambda **options: asked.append(options) or run, lambda pixels: pixels.shape
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for step in (0, 3):
        log = runs.RunLog(tmp_path, True, step, "wandb", {"lr": 0.1})
        log.metrics(step + 1, loss=0.5)
        log.picture(step + 1, "samples", np.zeros((4, 6, 3), np.uint8))
        log.close()
    assert asked[0] == asked[1] and asked[0]["config"] == {"lr": 0.1} and asked[0]["resume"] == "allow"
    assert logged == [(1, {"loss": 0.5}), (1, {"samples": [(4, 6, 3)]}), (4, {"loss": 0.5}),
                      (4, {"samples": [(4, 6, 3)]})]


def test_tensorboard_has_curves_and_pictures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = runs.RunLog(tmp_path, True)
    log.metrics(1, loss=0.5)
    log.picture(1, "samples", np.zeros((4, 6, 3), np.uint8))
    log.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [point.value for point in events.Scalars("loss")] == [0.5]
    assert [(picture.width, picture.height) for picture in events.Images("samples")] == [(6, 4)]
    runs.RunLog(tmp_path / "none", True, tracker="none").close()
    assert not list((tmp_path / "none").glob("events*"))


# ---- what it costs, and the plot


def test_durations_are_for_people():
    assert [duration(seconds) for seconds in (0.123, 42, 5 * 60, 5 * 3600, 40 * 86400)] == [
        "0.12 s", "42 s", "5 min", "5 h", "40 days"]


def test_smoothing_by_hand():
    assert curves.smoothed([4, 4, 4], 5) == pytest.approx([4, 4, 4])
    assert curves.smoothed([0, 1, 1], 2) == pytest.approx([0, 1 / 1.5, 1.5 / 1.75])
    assert curves.smoothed([0, 1, 1], 1) == pytest.approx([0, 1, 1])


def test_the_plot_shows_what_was_logged(tmp_path):
    for name, value in (("000-a", {}), ("001-b", {"gradient_norm": 1.0})):
        log = runs.RunLog(tmp_path / name, True, tracker="none")
        log.metrics(1, loss=0.5, loss_t0=0.2, kid=0.1, kid_raw=0.3, kid_floor=0.0, kid_floor_std=0.01, **value)
        log.metrics(2, loss=float("nan"), kid=0.05)
    logged = {name: curves.read(tmp_path / name) for name in ("000-a", "001-b")}
    assert logged["000-a"]["loss"].tolist() == [[1], [0.5]]
    assert logged["000-a"]["kid"].tolist() == [[1, 2], [0.1, 0.05]]
    figure = curves.plot(logged, 3)
    assert [axes.get_title() for axes in figure.axes] == [
        "training loss", "validation KID × 1e-3 (dashed: raw weights)", "norm of the gradient",
        "squared error by diffusion step, 000-a"]
    kid = figure.axes[1]
    assert [line.get_ydata().tolist() for line in kid.lines[:2]] == [[100, 50], [300]] and len(kid.patches) == 2
    succeeded(call_script("scripts/plot_runs.py", tmp_path / "000-a", "--output", tmp_path / "out" / "curves.png"))
    assert Image.open(tmp_path / "out" / "curves.png").size[0] > 500
