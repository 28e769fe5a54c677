"""The benchmark compares results before it times them, and says what it measured. Nothing here is timed."""

import json
import sys

import pytest
import torch
from conftest import call_script, largest_relative

from automaton import reference
from benchmarks import bench


def test_all_variants_do_the_same_work():
    """Every variant of a training step finds the same result and the same gradients."""
    case, found = bench.Case("GeCA-XS", 4, 2, "cpu"), []
    case.y += 1  # labels that are asked for: their table has gradients too
    for variant in bench.variants("GeCA-XS", "train"):
        case.model.zero_grad()
        out, _ = case.call(variant)(case.x, torch.tensor([5, 5]), case.y, None, case.generators("cells"))
        out.square().sum().backward()
        found.append([out.detach(), *(p.grad.clone() for p in case.model.parameters())])
    assert len(found) == 4
    for other in found[1:]:
        assert all(largest_relative(a, b) < 1e-4 for a, b in zip(other, found[0], strict=True))


def test_impossible_settings_are_one_line(tmp_path):
    for more in (("--models", "DiT-S/8", "--cells", 4), ("--json", tmp_path / "no" / "b.json"),
                 *([("--precision", "fp16")] if not torch.cuda.is_available() else [])):
        done = call_script("benchmarks/bench.py", "--no-memory", "--rounds", 1, *more)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr


def test_operations_are_those_of_the_matrix_products():
    case = bench.Case("GeCA-XS", 8, 1, "cpu")
    counts = {variant: bench.operations(case, "forward", variant) for variant in ("plain", "dense", "asynchronous")}
    width, mlp, channels, state, cells = 384, 64, 44, 40, 64
    per_cell = 2 * (width * (4 * width + 2 * mlp) + width * (channels + state))  # embedding, q k v, out, MLP, update
    assert 0.9 < counts["dense"] / (12 * cells * per_cell) < 1.1
    assert 0.45 < counts["asynchronous"] / counts["dense"] < 0.75  # half, the first step, and rows that fill up
    assert counts["plain"] > counts["dense"]


def test_results_that_differ_are_not_timed(monkeypatch):
    case = bench.Case("GeCA-XS", 4, 1, "cpu")
    bench.check_agreement(case, ["plain", "dense", "asynchronous"])
    monkeypatch.setattr(reference, "forward", lambda model, x, *rest: (torch.cat([x, x], 1), None))
    with pytest.raises(RuntimeError, match="dense differs from plain"):
        bench.check_agreement(case, ["plain", "dense"])


def test_the_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "product_speed", lambda device, precision: 1e11)  # measuring it takes seconds
    monkeypatch.setattr(bench, "copy_speed", lambda device: 1e10)
    monkeypatch.setattr(sys, "argv", ["bench.py", "--models", "GeCA-XS", "DiT-S", "--cells", "4", "--rounds", "1",
                                      "--no-memory", "--train-batch", "2", "--json", str(tmp_path / "b.json")])
    bench.main()
    rows = json.loads((tmp_path / "b.json").read_text())["results"]["fp32"]["rows"]
    assert [(r["model"], r["task"], r["variant"]) for r in rows] == [
        (model, task, variant) for model in ("GeCA-XS", "DiT-S") for task in bench.TASKS
        for variant in bench.variants(model, task)]
    assert all(r["seconds"] > 0 and r["flops"] > 0 for r in rows) and capsys.readouterr().out.count("floor") == 2


def test_memory_is_that_of_the_task():
    small, large = (bench.memory_of("GeCA-XS", "train", "plain", cells, 1, "cpu", "fp32") for cells in (8, 24))
    assert large > 2 * small > 0
