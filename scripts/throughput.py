"""How long a step of a plan takes, from what was measured: logs of earlier steps, or a file of benchmarks/bench.py.

Nothing is guessed: where there is no measurement of this very task (model, grid, precision), there is no estimate.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from core.files import read_json, read_jsonl
from core.runs import METRICS
from core.schema import Number

POSITIVE = Number(1e-12, whole=False)
ROW = {"model": str, "task": str, "cells": int, "variant": str, "images": POSITIVE, "seconds": POSITIVE}
BENCHMARK = {"device": str, "results": {str: {"rows": [ROW]}}}  # schema of what benchmarks/bench.py writes


@dataclass(frozen=True)
class Estimate:
    """Hours on one device, of one kind: `unit` is "CPU hours" or "GPU hours"."""

    hours: float
    unit: str
    source: str

    def __str__(self):
        return f"{self.hours:.2f} {self.unit} (at the throughput of {self.source})"


class Throughput:
    """Images, or image-steps of sampling, per second and device."""

    def __init__(self, output, file, cells, flags):
        """`flags`: task of bench.py -> the words that start it; the measurement of their precision counts."""
        self.output, self.cells, self.file = Path(output), cells, file
        self.precisions = {task: precision_of(text) for task, text in flags.items()}
        self.benchmark = read_benchmark(file) if file else None

    def hours(self, work):
        """work: (task, model, number of images or image-steps) -> Estimate, or None without a measurement."""
        if work is None:
            return None
        task, model, number = work
        rate = self.of_runs(task, model) or self.of_benchmark(task, model)
        return rate and Estimate(number / rate[0] / 3600, f"{rate[1]} hours", rate[2])

    def of_runs(self, task, model):
        """(images per second and process, device, source) of runs that are in --output; None without any."""
        if task == "train":
            name = (model or "").replace("/", "-")
            folders = [path for path in self.output.glob(f"train/*/000-{name}-[0-9]*")
                       if re.fullmatch(rf"000-{re.escape(name)}-\d+", path.name)]  # of DiT-S, not DiT-S-4
        else:
            folders = self.output.glob("classify/*/fold-*") if task == "classify" else []
        rates = [rate for folder in sorted(folders) if (rate := rate_of(folder))]
        devices = {device for _, device in rates}
        if len(devices) != 1:
            return None
        return median(rate for rate, _ in rates), devices.pop(), f"{len(rates)} run(s) here"

    def of_benchmark(self, task, model):
        if self.benchmark is None:
            return None
        precision = self.precisions.get(task)
        rows = [row for row in self.benchmark["results"].get(precision, {}).get("rows", ())
                if (row["model"], row["task"], row["cells"]) == (model, task, self.cells)
                and row["variant"] in ("asynchronous", "model")]  # what the scripts use
        rate = max((row["images"] / row["seconds"] for row in rows), default=None)
        device = "GPU" if self.benchmark["device"].startswith("cuda") else "CPU"
        return rate and (rate, device, f"{Path(self.file).name}, {precision}")


def precision_of(text):
    """What `--mixed_precision fp16` of accelerate or `--precision bf16` of the samplers ask for; fp32 without."""
    asked = re.findall(r"--(?:mixed[_-])?precision[ =](\w+)", text) + re.findall(r"--(tf32)\b", text)
    return asked[-1] if asked and asked[-1] != "no" else "fp32"


def read_benchmark(file):
    """Raises UserError."""
    return read_json(file, "--throughput takes what benchmarks/bench.py --json writes", BENCHMARK)


def rate_of(folder):
    """Images per second and process, and device (CPU, GPU), that a run has logged; None where nothing is logged."""
    metrics, log = folder / "metrics.jsonl", folder / "log.txt"
    if not metrics.is_file() or not log.is_file():
        return None
    rates = [row.get("images_per_second") for row in read_jsonl(metrics, f"remove {folder}", METRICS)]
    rates = [rate for rate in rates if rate]
    started = re.findall(r"(\d+) process\(es\) on (\w+)", log.read_text(encoding="utf-8", errors="replace"))
    if not rates or not started:
        return None
    processes, device = started[-1]
    return median(rates) / int(processes), "GPU" if device == "cuda" else "CPU"
