"""scripts/study_memorisation.py: few training images of whole patients; what a line keeps is what is drawn."""

import json
from types import SimpleNamespace

import pytest
from conftest import call_script, succeeded

from core.errors import UserError
from dataset.root import read_split
from scripts import study_memorisation as study

PATIENTS = [f"p{number // 3}" for number in range(120)]  # three images of each


def test_images_are_those_of_whole_patients():
    rows = study.first_patients(PATIENTS, 62)
    assert len(rows) == 62 and rows == sorted(set(rows))
    kept = [PATIENTS[row] for row in rows]
    assert sorted(kept.count(name) for name in set(kept)) == [2] + [3] * 20  # the last one lost an image
    assert set(study.first_patients(PATIENTS, 32)) < set(rows)  # fewer images: a part of the same
    assert rows != list(range(62))


@pytest.mark.parametrize("count", [121, 31])
def test_too_few_images(count):
    with pytest.raises(UserError, match="expected 32 to that many"):
        study.first_patients(PATIENTS[:count], count if count > 120 else 32)


def row(model, steps, kid):
    scores = {"kid": {"retina": {"value": kid, "interval": [kid - 0.1, kid + 0.1]}}, "fid": {}, "gg": -1.0,
              "gg_interval": [-2, 0], "copies": 0.1, "copies_interval": [0.05, 0.2], "copies_expected": 0.1,
              "authentic": 60.0}
    return {"model": model, "images": 148, "steps": steps, "error": 0.06, "training_error": 0.05, **scores,
            "floor": scores}


def test_lines_are_drawn(tmp_path):
    file = tmp_path / "points.jsonl"
    rows = [row(model, steps, 0.2) for model in ("GeCA-XS", "DiT-S") for steps in (720, 360)]
    file.write_text("".join(json.dumps(line) + "\n" for line in rows))
    axes = study.plot(file).axes
    assert {panel.get_title() for panel in axes} - {""} == {title for title, *_ in study.panels(["retina"])}
    curves = {line.get_label(): line.get_xydata().tolist() for line in axes[0].get_lines()}
    assert curves["GeCA-XS"] == curves["DiT-S"] == [[360, 200], [720, 200]]
    assert "real test images" in curves


def test_the_root_holds_the_kept_images_alone(tmp_path):
    data = tmp_path / "data"
    succeeded(call_script("prepare_data.py", "--source", "phantom", "--count", "80", "--image-size", "32", "--output",
                          str(data)))
    args = study.parser().parse_args(["--data", str(data), "--output", str(tmp_path / "out"), "--images", "32"])
    root = study.subset(args)
    kept, all_of_them = read_split(root, "train_0"), read_split(data, "train_0")
    assert len(kept) == 32 < len(all_of_them) and set(kept.patients) < set(all_of_them.patients)
    assert read_split(root, "val_0").filenames == read_split(data, "val_0").filenames
    assert all(path.is_file() for path in kept.paths)
    assert study.subset(args) == root


@pytest.mark.parametrize("step", [8, 12])
def test_a_checkpoint_is_kept_for_its_own_step_alone(tmp_path, monkeypatch, step):
    """`train` to 8 steps, in a folder whose run may be beyond them already."""
    last = tmp_path / "train" / "GeCA-XS-148" / "000-GeCA-XS-0" / "checkpoints" / "last_ckpt.pt"
    last.parent.mkdir(parents=True)
    last.write_text("weights")
    monkeypatch.setattr(study, "call", lambda command: None)
    monkeypatch.setattr(study.checkpoints, "load", lambda file: SimpleNamespace(step=step))
    args = study.parser().parse_args(["--output", str(tmp_path)])
    if step == 8:
        assert study.train("GeCA-XS", 8, tmp_path, args).read_text() == "weights"
    else:
        with pytest.raises(UserError, match="is at step 12, expected 8"):
            study.train("GeCA-XS", 8, tmp_path, args)
        assert not (tmp_path / "weights").exists()
