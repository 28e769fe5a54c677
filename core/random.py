"""Randomness as a function of (seed, what the draw is for); the global stream is never used."""

import hashlib

import torch


def generator(seed, *where):
    """A CPU generator that is a function of `seed` and of what the draw is for, e.g. ("cells", image id).

    On the CPU, so that the same draw comes out on every device; keyed by purpose, so that no draw depends on
    how many were made before it, on the number of processes or on the batch size.
    """
    digest = hashlib.sha256(repr((seed, *where)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def on_device(tensor, device):
    """What was drawn on the CPU, on `device`; the host of a GPU does not wait for the copy."""
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def per_image(draw, shape, generators):
    """Stack `draw(*shape, generator=g)` over the generators g of n images: (n, *shape), on the CPU."""
    return torch.stack([draw(*shape, generator=g) for g in generators])
