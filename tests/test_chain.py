"""From a user's files to the two tables: the commands of docs/DATA.md, word by word, on 20 images."""

import csv
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, call_script, succeeded
from PIL import Image

SECTION = (ROOT / "docs" / "DATA.md").read_text().partition("## From images to tables")[2].partition("\n## ")[0]
COMMANDS = re.search(r"```sh\n(.*?)```", SECTION, re.DOTALL)[1].splitlines()
FROM_FOLDERS = re.search(r"`(python prepare_data.py --source folder [^`]*)`", SECTION)[1]


def draw_scans(folder, name_of):
    """20 pictures of two kinds, bright above or below, as a microscope would name them; -> their names and kinds."""
    kinds, draw = ["healthy", "ill"], np.random.default_rng(0)
    rows = []
    for i in range(20):
        kind, pixels = kinds[i % 2], draw.integers(0, 60, (80, 96), dtype=np.uint8)
        pixels[i % 2 * 40:][:40] += 150
        path = folder / name_of(i, kind)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        rows.append((path.name, kind, f"P{i // 2 + 1}"))
    return rows


def of_a_table(folder):
    rows = draw_scans(folder / "scans", lambda i, kind: f"scan {i}.JPG")
    with open(folder / "labels.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=";").writerows([("picture", "diagnosis", "patient"), *rows])
    return COMMANDS[0]


def of_folders(folder):
    draw_scans(folder / "scans", lambda i, kind: f"{kind}/{i}.png")
    return FROM_FOLDERS


def run(command):
    """A line of the documentation, its wildcards expanded, in the current folder -> what it printed."""
    _, script, *words = shlex.split(command)
    words = [found for word in words for found in (sorted(map(str, Path().glob(word))) if "*" in word else [word])]
    done = call_script(script, *words)
    succeeded(done)
    return done.stdout + done.stderr


@pytest.mark.parametrize("source", [of_a_table, of_folders])
def test_from_files_to_tables(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = [run(command) for command in (source(tmp_path), *COMMANDS[1:])]
    assert "20 images" in said[0] and len(said) == 9
    with open("data/mine/train_0.csv", encoding="utf-8") as file:
        assert {"healthy", "ill"} <= set(next(csv.reader(file)))
    (scored,) = Path("scored/mine").iterdir()
    row = json.loads((scored / "results.json").read_text())
    assert "GeCA-XS" in json.dumps(row)
    gain = json.loads(Path("classified/mine/GeCA-XS/results.json").read_text())
    assert len(list(Path("synthetic/mine").glob("*/gen_samples*/*.png"))) == len(
        Path("data/mine/train_0.csv").read_text().splitlines()) - 1
    assert gain["folds"]
    first, second = (Path(f"tables/mine/table{n}.md").read_text() for n in (1, 2))
    assert "GeCA-XS" in first and "GeCA-XS" in second
