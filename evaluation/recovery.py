"""How far a damaged image has found back: its distance to the undamaged sample of the same seed, in numbers."""

import numpy as np


def recovery(images, undamaged, others, mask, features):
    """Distances of finished images to the undamaged ones, and those of unrelated samples to them for comparison.

    images, undamaged, others: uint8 (N, H, W, 3), the last of the same labels from other noise; mask (H, W) bool, the
    damaged pixels; features: a feature space (evaluation/features.py). Returns name -> mean over the images:

    inside, outside             root mean square difference of pixels (0..255) within the damaged place and beside it
    features                    1 − cosine of the feature vectors of whole images
    *_of_another                the same of `others`: what no recovery at all would come to
    inside_psnr                 20 · log10(255 / inside), in dB
    """
    seen = features(undamaged)
    values = {}
    for end, compared in (("", images), ("_of_another", others)):
        difference = (compared.astype(float) - undamaged.astype(float)) ** 2  # (N, H, W, 3)
        values["inside" + end] = np.sqrt(difference[:, mask].mean((1, 2)))
        values["outside" + end] = np.sqrt(difference[:, ~mask].mean((1, 2)))
        values["features" + end] = 1 - cosine(seen, features(compared))
    numbers = {name: float(value.mean()) for name, value in values.items()}
    return numbers | {"inside_psnr": float(20 * np.log10(255 / max(numbers["inside"], 1e-6)))}


def cosine(a, b):
    """Of the rows of two arrays (N, D) -> (N,)."""
    return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


def in_pixels(mask, factor):
    """Cells (h, w) -> pixels (h · factor, w · factor)."""
    return mask.repeat(factor, axis=0).repeat(factor, axis=1)
