"""Shared by all tests: the repository on the path, one thread, the reference vectors."""

import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)


def made_weight(key, shape):
    """The value of a state-dict entry in the reference vectors: a function of its name and shape."""
    r = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
    value = 1 + 0.02 * r if key.endswith("norm.weight") else (0.05 if len(shape) >= 2 else 0.02) * r
    return torch.tensor(value * (0.02 if key.startswith("final_layer.linear") else 1), dtype=torch.float32)


def fill(model):
    """Give a model the weights of the reference vectors."""
    model.load_state_dict({key: made_weight(key, tuple(v.shape)) for key, v in model.state_dict().items()})
    return model


@pytest.fixture(scope="session")
def golden():
    """name -> tensor: computed once by the published code, float32 (tables float64), on CPU."""
    with np.load(ROOT / "tests" / "reference_vectors.npz") as file:
        return {name: torch.as_tensor(file[name]) for name in file}


def generators(n, seed=0):
    """One generator per image."""
    return [torch.Generator().manual_seed(1000 * seed + i) for i in range(n)]


def largest_relative(a, b):
    """Largest difference as a share of the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()
