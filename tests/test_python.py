"""A trained model from Python: what docs/PYTHON.md promises."""

import re

import numpy as np
import pytest
from conftest import ROOT, call_script, succeeded
from helpers import message_of
from PIL import Image

import generation

BUNDLED = ROOT / "assets" / "geca-xs-oct"
FAST = {"steps": 2, "sampler": "ddim"}
BLOCKS = [(page, code) for page in ("README.md", "docs/PYTHON.md")
          for code in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)]


@pytest.fixture(scope="module")
def model():
    return generation.load(BUNDLED)


@pytest.mark.parametrize("page, code", BLOCKS, ids=[page for page, _ in BLOCKS])
def test_the_examples_run(page, code, tmp_path, monkeypatch):
    """As they stand, but for the number of steps and the place of the clone."""
    monkeypatch.chdir(tmp_path)
    code = re.sub(r"(steps\W+)\d+", r"\g<1>2", code).replace('"assets', f'"{ROOT}/assets')
    found = {}
    exec(code, found)
    promised = re.search(r"images = .*# uint8 (\(.*\))", code)[1]
    assert str(found["images"].shape) == promised and found["images"].dtype == np.uint8
    for name in re.findall(r'save\("(.*?)"\)', code):
        assert np.asarray(Image.open(tmp_path / name)).std() > 10
    if page == "docs/PYTHON.md":
        assert found["life"].image.shape == found["images"].shape[1:]


def test_images_are_those_of_the_command_line(model, tmp_path):
    succeeded(call_script("sample_ddp.py", "--ckpt", BUNDLED, "--labels", "PDR,DME=0.5", "--count", 3, "--global-seed",
                          7, "--num-sampling-steps", 3, "--cfg-scale", 2, "--sample-dir", tmp_path))
    made = np.stack([Image.open(path) for path in sorted(tmp_path.glob("*/asked/*.png"))])
    options = {"seed": 7, "steps": 3, "cfg_scale": 2.0}
    images = model.sample({"PDR": 1, "DME": 0.5}, n=3, **options)
    assert images.shape == (3, 64, 64, 3) and np.array_equal(images, made)
    later = model.sample("PDR,DME=0.5", n=2, first=1, batch_size=1, **options).astype(int)
    assert abs(later - made[1:]).max() <= 1
    assert (model.sample("PDR,DME=0.5", n=1, **{**options, "seed": 8}) != made[:1]).any()


def test_a_life_ends_as_the_image_of_its_number(model):
    life = model.grow(["DME"], number=2, seed=3, moments=2, **FAST)
    assert np.array_equal(life.image, model.sample(["DME"], first=2, seed=3, **FAST)[0])
    assert [moment.t for moment in life.moments] == [999, 0] and life.nearest(400) == 0
    assert model.grow(["DME"], grid=(2, 3), **FAST).image.shape == (16, 24, 3)


def test_a_walk_has_the_draws_of_one_image(model):
    way = model.walk("NODR", ["DME"], n=3, number=4, batch_size=1, **FAST)
    ends = [model.sample(labels, first=4, **FAST)[0] for labels in ("NODR", "DME")]
    assert np.array_equal(way[0], ends[0]) and np.array_equal(way[2], ends[1]) and (way[0] != way[2]).any()


def test_a_model_says_what_it_is(model):
    assert model.labels == ["NODR", "NPDR", "PDR", "DME"] and (model.image_size, model.name) == (64, "GeCA-XS")
    assert "64 px, labels NODR NPDR PDR DME" in repr(model) and model.checkpoint.step == 2160


@pytest.mark.parametrize("call, words", [
    (lambda model: model.sample(["DR"]), "the model knows no 'DR'"),
    (lambda model: model.sample(["DME"], n=0), "n 0: expected at least 1"),
    (lambda model: model.walk("DME", "PDR", n=1), "n 1: expected at least 2"),
    (lambda model: model.sample(["DME"], step=5), "step: no such option, expected some of steps, sampler"),
    (lambda model: model.sample(["DME"], steps=0), "steps 0: expected a number from 1 to 1000"),
    (lambda model: model.sample(["DME"], sampler="dpm"), "sampler dpm: expected one of ddpm, ddim, dpmpp"),
    (lambda model: model.sample(["DME"], eta=0.5), "--eta 0.5: belongs to --sampler ddim"),
    (lambda model: model.grow(["DME"], cell=(8, 0)), "outside of the grid of 8 x 8 cells"),
    (lambda model: generation.load(BUNDLED, image_size=32), "was trained with --image-size 64"),
    (lambda model: generation.load(BUNDLED, size=32), "size: expected some of model"),
    (lambda model: generation.load(BUNDLED, weights="model"), "holds ema"),
    (lambda model: generation.load(ROOT / "nowhere.pt"), "no such file"),
], ids=range(12))
def test_mistakes_are_one_line(model, call, words):
    assert words in message_of(lambda: call(model))


def test_the_package_names_all_that_there_is():
    """pip install -e . finds every room and script."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())
    rooms = {path.parent.relative_to(ROOT) for path in ROOT.glob("**/__init__.py") if ".venv" not in path.parts}
    assert set(named["tool"]["setuptools"]["packages"]) == {".".join(room.parts) for room in rooms}
    assert set(named["tool"]["setuptools"]["py-modules"]) == {path.stem for path in ROOT.glob("*.py")}
    assert named["tool"]["setuptools"]["dynamic"]["dependencies"] == {"file": ["req.txt"]}
