"""Training batches: decoded images kept in memory, changed at random, made ahead of their use in threads."""

from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as change

from core.random import generator
from dataset.images import load_image

ROTATION = 15  # degrees, either way
ZOOM = 0.8  # the smallest side of a crop, as a share of the image
LIGHT = 0.2  # brightness and contrast, either way, as shares


class ImageStore:
    """Decoded image files, uint8 (S, S, 3): kept up to `limit` bytes, read again beyond.

    Every image is asked for as often as any other, so those that came first are kept.
    """

    def __init__(self, paths, size, limit):
        self.paths, self.size, self.kept = paths, size, {}
        self.room = int(limit // (3 * size * size))

    def __getitem__(self, i):
        image = self.kept.get(i)
        if image is None:
            image = load_image(self.paths[i], self.size)
            if len(self.kept) < self.room:
                self.kept[i] = image
        return image

    def stack(self, indices, workers=1):
        """uint8 (n, S, S, 3), read in threads."""
        with ThreadPoolExecutor(workers) as pool:
            return np.stack(list(pool.map(self.__getitem__, indices)))


def geometric(image, g):
    """A little of everything that leaves the diagnosis: uint8 (S, S, 3) -> the same, drawn from the generator g.

    Rotation, then a crop that is enlarged again, mirror, brightness, contrast (the paper names these kinds, not how
    much of each; black is what comes in from outside).
    """
    def uniform(low, high):
        return low + (high - low) * float(torch.rand((), generator=g))

    image = torch.tensor(image).permute(2, 0, 1)  # (3, S, S)
    size = image.shape[-1]
    image = change.rotate(image, uniform(-ROTATION, ROTATION), InterpolationMode.BILINEAR)
    side = round(size * uniform(ZOOM, 1))
    top, left = (int(torch.randint(size - side + 1, (), generator=g)) for _ in range(2))
    image = change.resized_crop(image, top, left, side, side, [size, size], InterpolationMode.BILINEAR, antialias=True)
    if uniform(0, 1) < 0.5:
        image = change.horizontal_flip(image)
    image = change.adjust_brightness(image, uniform(1 - LIGHT, 1 + LIGHT))
    image = change.adjust_contrast(image, uniform(1 - LIGHT, 1 + LIGHT))
    return image.permute(1, 2, 0).numpy()


AUGMENTATIONS = {"geometric": geometric, "none": lambda image, g: image}


class Batches:
    """Which images step number s sees, and what they look like then: functions of (seed, fold, s) alone.

    Each pass through the images is one seeded shuffle, its remainder dropped.
    """

    def __init__(self, store, batch, augment, seed, fold):
        self.store, self.batch, self.seed, self.fold = store, batch, seed, fold
        self.augment = AUGMENTATIONS[augment]
        self.per_pass = len(store.paths) // batch

    def images_of_step(self, step):
        """(number of the pass, numbers of the images of the batch)."""
        number, place = divmod(step, self.per_pass)
        order = torch.randperm(len(self.store.paths), generator=generator(self.seed, "epoch", self.fold, number))
        return number, order[place * self.batch:(place + 1) * self.batch].tolist()

    def __call__(self, step, rank=0, processes=1):
        """This process's share of a batch: image numbers, uint8 (n, S, S, 3)."""
        number, images = self.images_of_step(step)
        mine = images[rank::processes]
        pixels = [self.augment(self.store[i], generator(self.seed, "augment", self.fold, number, i)) for i in mine]
        return mine, torch.from_numpy(np.stack(pixels))


def ahead(make, numbers, workers):
    """Yield make(n) for each n in order, up to `workers` of them made ahead in threads."""
    pool, waiting = ThreadPoolExecutor(workers), deque()
    try:
        for n in numbers:
            waiting.append(pool.submit(make, n))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
