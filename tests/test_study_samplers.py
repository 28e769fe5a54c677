"""scripts/study_samplers.py: points of one model are compared image by image."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import gaussian

from metrics.uncertainty import paired_difference
from scripts import study_samplers

ABOUT = {"model": "GeCA-XS", "step": 7, "images": 20, "seed": 0, "cfg_scale": 1.5, "kid": 0.1, "kid_std": 0.01}


@pytest.fixture
def study(tmp_path):
    """Two points with features, one without, and the noise floor."""
    found = study_samplers.Study.__new__(study_samplers.Study)
    found.args = SimpleNamespace(output=tmp_path, reference=("ddim", 25))
    found.file, found.real = tmp_path / "points.jsonl", gaussian(0, 25)
    found.points = [{**ABOUT, "sampler": "ddim", "steps": 25}, {**ABOUT, "sampler": "dpmpp", "steps": 25},
                    {**ABOUT, "sampler": "ddpm", "steps": 25}, {**ABOUT, "model": "real", "sampler": "-", "steps": 0}]
    (tmp_path / "features").mkdir()
    for seed, point in enumerate(found.points[:2], 1):
        np.save(found.features_of(point), gaussian(seed, 20, shift=0.3 * seed))
    return found


@pytest.mark.parametrize("reference, other, sign", [(("ddim", 25), 1, 1), (("dpmpp", 25), 0, -1)])
def test_points_are_compared_with_the_reference(study, reference, other, sign):
    study.args.reference = reference
    study.compare()
    value, p, low, high = paired_difference(study.real, gaussian(2, 20, shift=0.6), gaussian(1, 20, shift=0.3))
    ends = [low, high] if sign > 0 else [-high, -low]
    found = study.points[other]["paired"]
    assert found["reference"] == "{} {}".format(*reference)
    assert (found["difference"], found["p"]) == pytest.approx((sign * value, p))
    assert found["interval"] == pytest.approx(ends)
    assert [i for i, point in enumerate(study.points) if "paired" in point] == [other]
    assert [json.loads(line) for line in study.file.read_text().splitlines()] == study.points
    assert f"{1e3 * sign * value:+.1f} (" in study_samplers.table(study.points)
