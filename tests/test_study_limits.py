"""scripts/study_limits.py: one thing is changed at a time, and only while it is; what lines hold is what is drawn."""

import json

import numpy as np
import pytest
from conftest import ROOT, call_script, succeeded

from core.files import read_jsonl
from metrics.uncertainty import paired_difference
from scripts import study_limits as study


def columns(images):
    """A feature space without a network: brightness of every eighth column."""
    return np.asarray(images, np.float32).mean((1, 3))[:, ::8] / 64


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A study of the bundled automaton on phantoms, two steps and two knobs -> its Study and its lines."""
    data = tmp_path / "data"
    succeeded(call_script("prepare_data.py", "--source", "phantom", "--count", "60", "--image-size", "64", "--output",
                          str(data)))
    monkeypatch.setattr(study, "open_features", lambda name: columns)
    monkeypatch.setattr(study, "PLAIN", {"steps": 2, "sampler": "ddim", "cfg_scale": 1.5})
    monkeypatch.setattr(study, "KNOBS", {"cfg_scale": (1.5, 3.0)})
    monkeypatch.setattr(study, "CELLS", {"update_rate": (0.5, 1.0), "automaton_steps": (12, 3)})
    args = study.parser().parse_args(["--ckpt", str(ROOT / "assets/geca-xs-phantom"), "--data", str(data), "--seeds",
                                      "1", "--features", "columns", "--output", str(tmp_path / "out")])
    (tmp_path / "out" / "features").mkdir(parents=True)
    found = study.Study(args)
    return found, list(found.lines())


def test_one_thing_is_changed_at_a_time(made, tmp_path):
    found, rows = made
    by = {(row["knob"], row["value"]): row for row in rows}
    assert len(by) == 9 and (found.model.net.update_rate, found.model.net.steps) == (0.5, 12)
    for same in (("cfg_scale", 1.5), ("update_rate", 0.5), ("automaton_steps", 12)):  # what it is anyway
        assert by[same]["kid"] == by["nothing", "plain"]["kid"] and by[same]["difference"]["columns"]["value"] == 0
    for other in (("cfg_scale", 3.0), ("update_rate", 1.0), ("automaton_steps", 3)):
        assert by[other]["kid"] != by["nothing", "plain"]["kid"]
    features = {name: np.load(tmp_path / "out" / "features" / f"{name}-columns.npy")
                for name in ("real", "plain", "cfg_scale-3.0")}
    expected = paired_difference(features["real"], features["cfg_scale-3.0"], features["plain"])
    assert by["cfg_scale", 3.0]["difference"]["columns"]["value"] == pytest.approx(expected.value)

    file = tmp_path / "points.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_jsonl(file, "", study.POINT) == rows
    panels = {axes.get_title(): axes for axes in study.plot(file).axes if axes.get_title()}
    assert {*panels} == {"guidance", "update rate at inference", "automaton steps at inference"}
    dots = panels["guidance"].get_lines()[0].get_xydata()
    assert dots[1] == pytest.approx([3.0, 1e3 * (by["nothing", "plain"]["kid"]["columns"]["value"] + expected.value)])
