"""How long a step of a plan takes, from what was measured: logs of earlier steps, or a file of benchmarks/bench.py.

Nothing is guessed: where there is no measurement of this very task (model, grid, precision), there is no estimate.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from core.errors import UserError


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
        """(images per second and process, device, source) of runs that are in --output."""
        pattern = {"train": f"train/*/000-{(model or '').replace('/', '-')}-[0-9]*", "classify": "classify/*/fold-*"}
        rates, kinds = [], set()
        for folder in sorted(self.output.glob(pattern[task])) if task in pattern else ():
            if task == "train" and not re.fullmatch(r"\d+", folder.name.removeprefix(pattern[task][8:-6])):
                continue  # of DiT-S/4, not DiT-S
            found = rates_of(folder)
            if found:
                rates.append(median(found[0]) / found[1])
                kinds.add(found[2])
        return (median(rates), kinds.pop(), f"{len(rates)} run(s) here") if rates and len(kinds) == 1 else None

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
    found = re.findall(r"--(?:mixed[_-])?precision[ =](\w+)", text) + re.findall(r"--(tf32)\b", text)
    return found[-1] if found and found[-1] != "no" else "fp32"


def read_benchmark(file):
    """Raises UserError."""
    try:
        found = json.loads(Path(file).read_text())
        if not found["results"] or not all("rows" in part for part in found["results"].values()):
            raise ValueError("no tasks in it")
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--throughput {file}: not a file of benchmarks/bench.py --json ({error!r})") from None


def rates_of(folder):
    """Logged images per second, number of processes and device (CPU, GPU) of a run; None where nothing is logged."""
    metrics, log = folder / "metrics.jsonl", folder / "log.txt"
    if not metrics.is_file() or not log.is_file():
        return None
    rates = [json.loads(line).get("images_per_second") for line in metrics.read_text().splitlines()]
    started = re.findall(r"(\d+) process\(es\) on (\w+)", log.read_text())
    rates = [rate for rate in rates if rate]
    if not rates or not started:
        return None
    return rates, int(started[-1][0]), "GPU" if started[-1][1] == "cuda" else "CPU"
