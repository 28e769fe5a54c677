"""Phantom B-scans: what a seed fixes, who has which label, and that findings show where they should."""

from collections import defaultdict

import numpy as np
import pytest
from PIL import Image

from dataset.sources import phantom
from dataset.sources.phantom import FINDINGS, LABELS, SIDE, draw_labels, draw_scan, read

SEEDS = range(6)


def reduce(scan, side=64):
    """(SIDE, SIDE) -> float (side, side), by averaging."""
    scan = Image.fromarray(np.asarray(scan, np.float32))
    return np.asarray(scan.resize((side, side), Image.Resampling.BOX), float)


def pair(label, seed):
    """The same scan without and with a finding, as floats."""
    return draw_scan({"NOR"}, seed).astype(float), draw_scan({label}, seed).astype(float)


def retina_of(labels, seed):
    """The columns and boundaries that `draw_scan(labels, seed)` renders."""
    eye = phantom.Eye.draw(phantom._rng("eye", seed))
    retina = phantom._healthy_retina(eye, phantom._rng("pose", seed, 0))
    for label in labels - {"NOR"}:
        FINDINGS[label](retina, phantom._rng(label, seed))
    return retina, phantom._boundaries(retina)


def in_retina(labels, seed):
    """Mask (SIDE, SIDE) of the neurosensory retina, 6 pixels inside its inner surface and the RPE."""
    _, boundaries = retina_of(labels, seed)
    y = np.arange(SIDE)[:, None]
    return (y > boundaries[phantom.SURFACE] + 6) & (y < boundaries[phantom.RPE] - 10)


def test_a_scan_is_a_function_of_its_arguments():
    scan = draw_scan({"DR", "EXU"}, 5, scan=2)
    assert scan.shape == (SIDE, SIDE) and scan.dtype == np.uint8
    np.testing.assert_array_equal(scan, draw_scan(["EXU", "DR"], (5,), scan=2))
    for seed, number in ((6, 2), (5, 3), ((5, 0), 2)):
        assert np.abs(scan.astype(float) - draw_scan({"DR", "EXU"}, seed, number)).mean() > 3


def test_scans_of_one_eye_differ_in_speckle_and_streams_never_coincide():
    corners = [draw_scan({"NOR"}, 1, scan)[-16:, :16].astype(float) for scan in (0, 1)]  # choroid, faded
    assert abs(np.corrcoef(corners[0].ravel(), corners[1].ravel())[0, 1]) < 0.5
    assert phantom._rng("DR", 5).random() != phantom._rng("DR", 5, 0).random()


@pytest.mark.parametrize("size", [32, 64, 100, 300])
def test_any_size_shows_the_same_scan(size):
    scan = draw_scan({"CSC"}, 1, size=size)
    assert scan.shape == (size, size)
    assert np.abs(reduce(scan, 32) - reduce(draw_scan({"CSC"}, 1), 32)).mean() < 3


@pytest.mark.parametrize("labels, size, message", [
    ({"NOR", "AMD"}, 64, "NOR alone"), ({"DME"}, 64, "DME"), ({"AMD"}, 31, "at least 32"),
])
def test_what_cannot_be_drawn_is_refused(labels, size, message):
    with pytest.raises(ValueError, match=message):
        draw_scan(labels, 0, size=size)


def test_image_i_does_not_depend_on_the_count_but_on_the_seed():
    few, more = (list(read(count, 32, seed=4).records) for count in (3, 9))
    assert (len(few), len(more)) == (3, 9)
    for a, b in zip(few, more, strict=False):
        assert (a.patient, a.name, a.labels) == (b.patient, b.name, b.labels)
        assert (a.draw().mode, a.draw().tobytes()) == ("L", b.draw().tobytes())
    other = next(read(1, 32, seed=5).records)
    assert other.draw().tobytes() != few[0].draw().tobytes()


def test_patients_have_one_to_four_scans_and_one_set_of_labels_per_eye(monkeypatch):
    drawn = []

    def blank(labels, *_):  # who has what does not need pixels
        drawn.append(labels)
        return np.zeros((SIDE, SIDE), np.uint8)

    monkeypatch.setattr(phantom, "draw_scan", blank)
    records = list(read(400).records)
    for record in records:
        record.draw()
    rows = [(record.patient, record.name, record.labels) for record in records]
    assert len({file for _, file, _ in rows}) == 400
    assert [{name for name, y in zip(LABELS, labels, strict=True) if y} for *_, labels in rows] == drawn
    assert rows[0][1].startswith("p0000_O") and rows[0][1].endswith("_1")
    scans, labels_of_eye, eyes = defaultdict(int), defaultdict(set), defaultdict(set)
    for name, file, labels in rows:
        scans[name] += 1
        assert file.startswith(name)
        eyes[name].add(file.split("_")[1])
        labels_of_eye[name, file.split("_")[1]].add(labels)
    complete = list(scans.values())[:-1]
    assert set(complete) == {1, 2, 3, 4}
    assert all(len(labels) == 1 for labels in labels_of_eye.values())
    assert {len(e) for e in eyes.values()} == {1, 2}
    assert set().union(*eyes.values()) == {"OD", "OS"}


def test_labels_are_skewed_exclusive_and_all_present():
    drawn = [draw_labels(np.random.default_rng(i)) for i in range(3000)]
    share = {label: np.mean([label in labels for labels in drawn]) for label in LABELS}
    assert LABELS == ("NOR", "AMD", "WAMD", "DR", "CSC", "PED", "MEM", "FLD", "EXU", "CNV", "RVO")
    assert all(labels == {"NOR"} for labels in drawn if "NOR" in labels)
    assert 0.33 < share["NOR"] < 0.42
    assert share["NOR"] > share["AMD"] > share["CSC"] > share["CNV"] > 0.02
    assert 1.35 < np.mean([len(labels) for labels in drawn if "NOR" not in labels]) < 1.65


@pytest.mark.parametrize("label", LABELS[1:])
def test_a_finding_outweighs_speckle_at_64_pixels(label):
    """In the 5% of the scan that change most, a finding does far more than new speckle and choroid."""
    for seed in SEEDS:
        without, with_it = (reduce(scan) for scan in pair(label, seed))
        retina, _ = retina_of({"NOR"}, seed)
        other = reduce(np.clip(phantom._render(retina, phantom._rng("texture", 99)), 0, 255))
        top = 64 * 64 // 20
        finding = np.sort(np.abs(with_it - without), axis=None)[-top:].mean()
        speckle = np.sort(np.abs(other - without), axis=None)[-top:].mean()
        assert finding > 1.7 * speckle, (label, seed, finding, speckle)


def test_a_finding_leaves_the_rest_of_the_scan_as_it_was():
    without, with_it = pair("PED", 3)
    _, boundaries = retina_of({"PED"}, 3)
    vitreous = slice(0, int(boundaries[phantom.SURFACE].min()) - 4)
    np.testing.assert_array_equal(without[vitreous], with_it[vitreous])
    assert np.abs(without - with_it).max() > 60


@pytest.mark.parametrize("label, share", [("FLD", 0.08), ("DR", 0.03), ("RVO", 0.02)])
def test_cysts_darken_the_retina(label, share):
    for seed in SEEDS:
        without, with_it = pair(label, seed)
        eye = retina_of(set(), seed)[0].eye
        dark = eye.background + 16
        smooth = [reduce(scan, 128).repeat(2, 0).repeat(2, 1) for scan in (without, with_it)]
        healthy = (smooth[0][in_retina(set(), seed)] < dark).mean()
        assert (smooth[1][in_retina({label}, seed)] < dark).mean() > healthy + share, seed


def test_exudates_brighten_the_retina_and_shade_what_is_below():
    for seed in SEEDS:
        without, with_it = pair("EXU", seed)
        inside = in_retina({"EXU"}, seed)
        assert (with_it[inside] > 180).mean() > (without[inside] > 180).mean() + 0.03
        _, boundaries = retina_of({"EXU"}, seed)
        y, rpe = np.arange(SIDE)[:, None], boundaries[phantom.RPE]
        band = (y >= rpe) & (y < rpe + 5)
        assert with_it[band].mean() < 0.95 * without[band].mean()


@pytest.mark.parametrize("label, boundary, rise", [
    ("AMD", phantom.RPE, 9), ("PED", phantom.RPE, 30),
    ("CSC", phantom.RPE - 2, 30), ("WAMD", phantom.RPE - 1, 15),  # the tops of fluid and of material
    ("RVO", phantom.SURFACE, 20), ("FLD", phantom.SURFACE, 15), ("DR", phantom.SURFACE, 8),
])
def test_findings_lift_the_boundary_they_should(label, boundary, rise):
    for seed in SEEDS:
        (_, healthy), (_, lifted) = retina_of(set(), seed), retina_of({label}, seed)
        before, after = (b[phantom.BRUCH] - b[boundary] for b in (healthy, lifted))
        assert (after - before).max() > rise


def test_the_brightest_line_follows_the_rpe_over_a_detachment():
    for seed in SEEDS:
        _, with_it = pair("PED", seed)
        _, boundaries = retina_of({"PED"}, seed)
        column = int(np.argmax(boundaries[phantom.BRUCH] - boundaries[phantom.RPE]))
        top = int(boundaries[phantom.RPE, column])
        profile = with_it[:, max(0, column - 3) : column + 4].mean(1)
        assert abs(int(np.argmax(profile[top - 30 :])) - 30) < 12
        inside = profile[top + 9 : int(boundaries[phantom.BRUCH, column]) - 2].mean()
        assert inside < 0.6 * profile[top : top + 5].mean()


def test_rvo_affects_one_half_and_a_membrane_flattens_the_pit():
    for seed in SEEDS:
        retina, occluded = retina_of({"RVO"}, seed)
        _, healthy = retina_of(set(), seed)
        swelling = healthy[phantom.SURFACE] - occluded[phantom.SURFACE]
        swelling = swelling - (healthy[phantom.BRUCH] - occluded[phantom.BRUCH])
        left, right = swelling[retina.x < -40].mean(), swelling[retina.x > 40].mean()
        assert max(left, right) > 20 > 5 > min(left, right)
        _, covered = retina_of({"MEM"}, seed)
        thickness = [b[phantom.BRUCH] - b[phantom.SURFACE] for b in (healthy, covered)]
        fovea = np.abs(retina.x) < 6
        assert thickness[1][fovea].mean() > thickness[0][fovea].mean() + 12


def test_a_membrane_and_a_neovascular_mass_are_bright():
    for seed in SEEDS:
        without, with_it = pair("MEM", seed)
        _, b = retina_of({"MEM"}, seed)
        line = np.abs(np.arange(SIDE)[:, None] - b[phantom.SURFACE]) < 3
        _, healthy = retina_of(set(), seed)
        before = np.abs(np.arange(SIDE)[:, None] - healthy[phantom.SURFACE]) < 3
        assert with_it[line].mean() > 1.25 * without[before].mean()
        without, with_it = pair("CNV", seed)
        bright = reduce(with_it * in_retina({"CNV"}, seed)) > 125
        assert bright.sum() > 12 + (reduce(without * in_retina(set(), seed)) > 125).sum()
