"""Growing, watched: what is recorded is what happened, what is drawn is what was recorded; damage hits what it says."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT, call_script, fill, generators, succeeded
from helpers import noise_images
from PIL import Image
from test_automaton import inputs, small_geca

from automaton import grow, watch
from automaton.attention import neighbourhood_attention
from automaton.rule import HEAD_WIDTH
from dataset.vae import open_codec
from evaluation import growth as pictures
from evaluation.recovery import in_pixels, recovery
from generation import checkpoint as checkpoints
from generation import growth
from generation.damage import Damage, damaged_cells
from generation.sampling import SamplingOptions, sample_latents
from models import MODELS

CELLS, LABELS = 4, ["A", "B", "C"]
OPTIONS = SamplingOptions(steps=3, cfg_scale=2.0, batch_size=1)


@pytest.fixture(scope="module")
def codec(tiny_vae):
    return open_codec(tiny_vae)


@pytest.fixture(scope="module")
def life(codec):
    return live(codec)


def small_net(name="GeCA-XS"):
    return fill(MODELS[name](input_size=CELLS, num_classes=len(LABELS))).eval().requires_grad_(False)


def live(codec, net=None, options=OPTIONS, grid=(CELLS, CELLS), **more):
    net = net or small_net()
    return growth.live(net, codec, torch.eye(3)[:1], 5, grid, options, "cpu", growth.visited(options), **more)


def save_checkpoint(path, tiny_vae, name="GeCA-XS"):
    """A checkpoint that grow.py and sample_ddp.py take; 4 x 4 cells of a tiny autoencoder."""
    codec = open_codec(tiny_vae)
    checkpoints.save(path, {
        "ema": small_net(name).state_dict(), "label_names": LABELS, "codec": codec.identity, "step": 7,
        "args": {"model": name, "image_size": CELLS * codec.factor, "vae": tiny_vae, "fold": 0, "num_classes": 3,
                 "in_channels": 4},
        "model_args": {"model": name, "input_size": CELLS, "num_classes": len(LABELS), "in_channels": 4}})
    return path


# ---- inside a call


def one_call(n=1, h=5, w=6, rate=0.5):
    """A net in float64, and a call of it."""
    model, (x, t, y) = small_geca(steps=5).double(), inputs(n, h, w)
    model.update_rate = rate
    x, y = x.double(), y.double()
    state = model.initial_state(n, h, w, torch.randn(n, 4, generator=torch.Generator().manual_seed(2)).double())
    return model, x, state, model.condition(t, y), model.draw_fire(n, h * w, generators(n))


@torch.no_grad()
def test_states_end_where_the_call_ends_and_change_where_cells_fire():
    model, x, state, c, fire = one_call(n=2)
    states = watch.states(model, x, state, c, fire)
    assert torch.equal(states[0], state) and torch.equal(states[-1], grow(model, x, state, c, fire))
    changed = (states[1:] != states[:-1]).any(2).flatten(2)  # (steps, N, L)
    assert torch.equal(changed, fire) and 0 < fire.float().mean() < 1


def test_light_grows_by_one_cell_per_step_where_all_cells_fire():
    y, x = np.indices((7, 9))
    for cell in ((3, 4), (0, 0)):
        distance = np.maximum(abs(y - cell[0]), abs(x - cell[1]))
        fire = torch.ones(5, 63, dtype=torch.bool)
        for k, region in enumerate(watch.reached(fire, (7, 9), cell)):
            assert np.array_equal(region, distance <= k)
        for k, region in enumerate(watch.sources(fire, (7, 9), cell)):
            assert np.array_equal(region, distance <= 5 - k)


@torch.no_grad()
def test_the_light_cone_of_the_seed_is_what_changes_with_it():
    model, x, state, c, fire = one_call()
    other = state.clone()
    other[:, :4, 2, 3] += 1
    before, after = (watch.states(model, x, start, c, fire)[:, 0] for start in (state, other))
    regions = watch.reached(fire[:, 0], (5, 6), (2, 3))
    assert torch.equal((before != after).any(1), regions) and not regions[1].all()


def test_a_cell_depends_on_another_where_that_one_reaches_it():
    """The two light cones are one relation, seen from its two ends, from any step on."""
    *_, fire = one_call()
    fire, end = fire[:, 0], (1, 4)
    for k, region in enumerate(watch.sources(fire, (5, 6), end)):
        reaches = [bool(watch.reached(fire[k:], (5, 6), start)[-1][end]) for start in np.ndindex(5, 6)]
        assert region.flatten().tolist() == reaches and (k == 5) == (sum(reaches) == 1)


@torch.no_grad()
@pytest.mark.parametrize("cell", [(0, 0), (2, 3), (4, 5)])
def test_attention_of_a_cell_is_what_it_attends_with(cell):
    """Values that say where they come from make the automaton's own attention tell its weights."""
    model, x, state, c, _ = one_call()
    state = state + torch.randn(state.shape, generator=torch.Generator().manual_seed(4)).double()
    weights = watch.attention_weights(model, x, state, c, cell)  # (1, heads, 3, 3)
    m = model.modulation(c)
    cells = model.base(x), state.flatten(2).transpose(1, 2), m
    q, k = (part.view(1, 5, 6, model.heads, HEAD_WIDTH) for part in (model.query(*cells)[1], model.cache(*cells).k))
    where = torch.eye(30, HEAD_WIDTH).double().view(1, 5, 6, 1, HEAD_WIDTH).expand_as(k)  # cell n: 1 in channel n
    seen = neighbourhood_attention(q, k, where)[0, cell[0], cell[1]][:, :30].view(-1, 5, 6)  # (heads, H, W)
    padded = torch.nn.functional.pad(seen, (1, 1, 1, 1))[:, cell[0]:cell[0] + 3, cell[1]:cell[1] + 3]
    y, x = np.indices((3, 3)) + np.array(cell)[:, None, None] - 1
    inside = torch.as_tensor((y >= 0) & (y < 5) & (x >= 0) & (x < 6))
    torch.testing.assert_close(weights[0].double() * inside, padded, atol=1e-6, rtol=0)
    torch.testing.assert_close(weights.sum((2, 3)), torch.ones(1, model.heads))


# ---- a life


@pytest.mark.parametrize("name", ["GeCA-XS", "DiT-S"])
@pytest.mark.parametrize("more", [(), ("--sampler", "dpmpp"), ("--cfg-scale", 1), ("--cfg-interval", 300, 900)],
                         ids=["ddpm", "dpmpp", "unguided", "interval"])
def test_the_image_is_bit_for_bit_that_of_the_sampler(name, more, tiny_vae, tmp_path):
    file = save_checkpoint(tmp_path / "c.pt", tiny_vae, name)
    flags = ("--ckpt", file, "--labels", "A,C", "--labels", "B", "--count", 1, 2, "--num-sampling-steps", 3,
             "--global-seed", 9, "--per-proc-batch-size", 1, *more)
    succeeded(call_script("sample_ddp.py", *flags, "--sample-dir", tmp_path / "s"))
    succeeded(call_script("grow.py", *flags, "--number", 2, "--slow", 1, "--output", tmp_path / "g"))
    (sampled,) = tmp_path.glob("s/*/asked/000002.png")
    assert np.array_equal(Image.open(sampled), Image.open(tmp_path / "g" / "image.png"))
    made = {path.name for path in (tmp_path / "g").iterdir()}
    assert made == {"growth.webp", "growth.gif", "strip.png", "strip.pdf", "image.png"}


def test_watching_changes_nothing_and_what_was_seen_is_what_happened(codec):
    """The recorded calls, run again, give what they gave; with the last step the answer is the prediction."""
    net, times = small_net(), growth.visited(OPTIONS)

    def sampled():
        return sample_latents(net, torch.eye(3)[:1], [5], CELLS, OPTIONS, "cpu")

    with growth.Recorder(net, times[1:]) as recorder:
        watched = sampled()
    assert torch.equal(watched, sampled()) and not net._forward_hooks and not net._forward_pre_hooks
    assert [*recorder.calls] == times[1:]
    for call in recorder.calls.values():
        state = grow(net, call.x, call.start, net.condition(call.t, call.y), call.fire)
        assert torch.equal(state, call.state)
    life = live(codec, net)
    assert [moment.t for moment in life.moments] == times
    for moment in life.moments:
        assert np.array_equal(moment.inside.answers[-1], moment.predicted)
        assert moment.inside.answers.shape[0] == net.steps + 1 == len(moment.inside.fire) + 1
    assert np.array_equal(life.moments[-1].inside.fire.reshape(net.steps, -1), recorder.calls[0].fire[:, 0])


def test_the_halves_are_those_of_the_guidance(codec):
    """At scale 0 the guided prediction is that of the unconditional copy; without guidance there is but one copy."""
    free = live(codec, options=SamplingOptions(steps=3, cfg_scale=0.0, batch_size=1)).moments[1]
    assert np.array_equal(free.predicted, free.unconditional) and (free.predicted != free.conditional).any()
    alone = live(codec, options=SamplingOptions(steps=3, cfg_scale=1.0, batch_size=1)).moments[1]
    assert np.array_equal(alone.predicted, alone.conditional) and alone.unconditional is None


def test_a_model_without_cells_has_a_life_without_an_inside(codec):
    life = live(codec, small_net("DiT-S"))
    assert all(moment.inside is None for moment in life.moments)
    assert len(pictures.frames(life, "A")) == 3 and len(pictures.strip(life, "A", 0).axes.images) == 4 * 3


def test_another_grid_is_drawn_and_said(codec):
    life = live(codec, grid=(2, 6), cell=(1, 5))
    assert life.image.shape == (16, 48, 3) and life.moments[0].inside.fire.shape[1:] == (2, 6)
    page = pictures.strip(life, "A", 0, note="trained on 4 × 4")
    assert "trained on 4 × 4" in [text.get_text() for text in page.axes.texts]


# ---- pictures


def test_colours_are_the_main_axes_and_stay():
    """A cell has the colour of its channels, wherever and whenever it is; along the widest axis reds differ most."""
    r = np.random.default_rng(0)
    axes = np.linalg.qr(r.standard_normal((6, 6)))[0]
    times = [((r.standard_normal((16, 6)) * [9, 3, 1, 0.1, 0.1, 0.1]) @ axes.T).T.reshape(6, 4, 4) for _ in range(30)]
    colours = pictures.ChannelColours(times)
    assert np.allclose(abs(colours.axes @ axes[:, :3]), np.eye(3), atol=0.1)
    together = np.concatenate([times[3], times[20]], axis=2)
    assert np.array_equal(colours(together), np.concatenate([colours(times[3]), colours(times[20])], axis=1))
    assert np.array_equal(colours(times[3][:, 2:3, 1:2]), colours(times[3])[2:3, 1:2])
    assert np.ptp(np.concatenate([colours(t) for t in times])[..., 0]) == 255


def test_outline_by_hand():
    region = np.array([[0, 1, 1], [0, 0, 0]], bool)
    assert sorted(pictures.edges(region)) == sorted([
        ((1, 0), (2, 0)), ((2, 0), (3, 0)), ((1, 1), (2, 1)), ((2, 1), (3, 1)), ((1, 0), (1, 1)), ((3, 0), (3, 1))])


def test_every_step_of_the_slow_calls_is_a_frame(life, tmp_path):
    shown = pictures.frames(life, "A", slow=2)
    assert len(shown) == 2 * 13 + 1
    pictures.save_animation(tmp_path / "a.webp", shown, "webp")
    with Image.open(tmp_path / "a.webp") as animation:
        assert animation.n_frames == len(shown) and animation.size == shown[0][0].size


def test_captions_are_legible_and_within_the_page(life):
    """12 pixels at the size shown, which is that of a README; nothing is cut off at a side."""
    damaged = pictures.Pair("GeCA-XS", life, life, damaged_cells("hole", (CELLS, CELLS), 0).numpy(), 333)
    for page in (pictures.strip(life, "A, B and C", 500), pictures.recovery_strip([damaged], "random")):
        page.pixels()
        whole = page.figure.bbox
        for text in page.axes.texts:
            box = text.get_window_extent()
            assert text.get_size() * 100 / 72 > 11
            assert box.x0 >= 0 and box.x1 <= whole.x1 and box.y0 >= 0 and box.y1 <= whole.y1, text.get_text()


# ---- damage


@pytest.mark.parametrize("kind, count", [("hole", 4), ("half", 8), ("random", 8)])
def test_damage_changes_the_chosen_cells_at_that_moment_and_no_other(kind, count):
    net, times = small_net(), growth.visited(OPTIONS)
    mask = damaged_cells(kind, (CELLS, CELLS), seed=1)
    assert mask.sum() == count
    records = []
    for damage in (None, Damage(mask, at=times[1] + 3, seed=0, ids=[5])):
        with growth.Recorder(net, times) as recorder:
            sample_latents(net, torch.eye(3)[:1], [5], CELLS, OPTIONS, "cpu", before_step=damage)
        records.append(recorder.calls)
    assert damage.at_step == times[1]
    (whole, hurt) = records
    assert torch.equal(whole[times[0]].x, hurt[times[0]].x) and torch.equal(whole[times[0]].out, hurt[times[0]].out)
    before, after = whole[times[1]], hurt[times[1]]
    assert torch.equal((before.x != after.x).any(1), mask.expand(2, -1, -1))
    hidden, dead = (call.start[:, net.out_channels:] for call in (before, after))
    assert torch.equal(hidden * ~mask, dead) and hidden[..., mask].any()
    assert (whole[times[2]].x != hurt[times[2]].x).any()


def test_two_models_are_damaged_alike():
    x = torch.zeros(2, 4, 4, 4)
    (a, _), (b, _) = (Damage(damaged_cells("half", (4, 4), 0), 500, 3, [7, 8])(x, None, 499) for _ in range(2))
    assert torch.equal(a, b) and (a[0] != a[1]).any() and not a[..., :2].any()


def test_recovery_by_hand():
    """A difference of 30 grey levels inside and none outside; another image differs everywhere."""
    images, mask = noise_images(3) // 2, np.zeros((16, 16), bool)
    mask[:4] = True
    hurt = images.copy()
    hurt[:, :4] += 30
    found = recovery(hurt, images, images + 60, mask, lambda x: np.stack([x[:, 0, 0, 0] * 0 + 1.0, x[:, 0, 0, 0] * 1.0],
                                                                          1))
    assert found["inside"] == pytest.approx(30) and found["outside"] == 0
    assert found["inside_of_another"] == found["outside_of_another"] == pytest.approx(60)
    assert found["inside_psnr"] == pytest.approx(20 * np.log10(255 / 30)) and found["features"] > 0
    assert recovery(images, images, hurt, mask, lambda x: x.reshape(len(x), -1) * 1.0)["features"] == pytest.approx(0)
    assert in_pixels(np.array([[True, False]]), 2).tolist() == [[True, True, False, False]] * 2


def test_models_are_compared_under_the_same_damage(tiny_vae, tmp_path):
    files = [save_checkpoint(tmp_path / f"{name}.pt", tiny_vae, name) for name in ("GeCA-XS", "DiT-S")]
    out = succeeded(call_script("grow.py", "--ckpt", *files, "--labels", "A", "--count", 3, "--num-sampling-steps", 3,
                                "--per-proc-batch-size", 2, "--damage", "half", "--damage-at", 400, 999, "--output",
                                tmp_path / "r"))
    rows = json.loads((tmp_path / "r" / "recovery.json").read_text())
    assert [(row["model"], row["at"], row["images"]) for row in rows] == [
        ("GeCA-XS", 400, 3), ("GeCA-XS", 999, 3), ("DiT-S", 400, 3), ("DiT-S", 999, 3)]
    assert all(row["inside"] > 0 for row in rows) and "half at t = 999" in out
    made = {path.name for path in (tmp_path / "r").iterdir()}
    assert made == {f"recovery.{kind}" for kind in ("json", "webp", "gif", "png", "pdf")}


# ---- mistakes


@pytest.mark.parametrize("name, flags, words", [
    ("GeCA-XS", ("--cell", 1, 4), ("--cell 1 4: outside of the grid of 4 x 4 cells", "X from 0 to 3")),
    ("GeCA-XS", ("--cell", 2, 0, "--grid", 2, 9), ("outside of the grid of 2 x 9",)),
    ("DiT-S", ("--cell", 1, 1), ("--cell 1 1: DiT-S is no cellular automaton",)),
    ("DiT-S", ("--grid", 4, 8), ("--grid 4 8: DiT-S works on 4 x 4 only",)),
    ("GeCA-XS", ("--labels", "Z"), ("knows no 'Z'", "A B C")),
    ("GeCA-XS", ("--number", 16), ("--number 16", "expected 0 to 15")),
    ("GeCA-XS", ("--damage", "hole", "--sampler", "dpmpp"), ("not with --sampler dpmpp", "ddim")),
    ("GeCA-XS", ("--ckpt", "c.pt", "c.pt"), ("--ckpt: found 2, expected one",)),
    ("GeCA-XS", ("--vae", "retina"), ("--vae retina", "was trained with")),
], ids=str)
def test_mistakes_are_one_line(name, flags, words, tiny_vae, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / "c.pt", tiny_vae, name)
    done = call_script("grow.py", "--ckpt", "c.pt", *(() if "--labels" in flags else ("--labels", "A")), *flags)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and not (tmp_path / "growth").exists()
    assert all(word in done.stderr for word in words), done.stderr


def test_labels_are_asked_for(tiny_vae, tmp_path):
    done = call_script("grow.py", "--ckpt", save_checkpoint(tmp_path / "c.pt", tiny_vae))
    assert done.returncode == 2 and "--labels: is missing" in done.stderr


def test_the_pictures_of_the_readme_are_small():
    shown = [ROOT / "docs" / "images" / name for name in ("growth.webp", "growth-strip.png")]
    assert sum(path.stat().st_size for path in shown) <= 1_500_000
