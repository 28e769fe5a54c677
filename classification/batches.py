"""Training batches: decoded images kept in memory, augmented at random, prefetched in threads."""

from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from core.random import generator
from dataset.images import load_image

ROTATION = 15  # degrees, either way
ZOOM = 0.8  # the smallest side of a crop, as a share of the image
LIGHT = 0.2  # change of brightness and of contrast, either way, as a share


class ImageStore:
    """Decoded image files, uint8 (S, S, 3), of which up to `limit` bytes are kept in memory.

    Every image is used as often as any other, so the first ones are kept and the others read again each time.
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
    """Change an image at random, but not so much that its diagnosis is lost: uint8 (S, S, 3) -> the same; generator g.

    Rotation (the corners become black), then a crop that is enlarged again, mirror, brightness, contrast. The paper
    names these kinds but not how much of each.
    """
    def uniform(low, high):
        return low + (high - low) * float(torch.rand((), generator=g))

    image = torch.tensor(image).permute(2, 0, 1)  # (3, S, S)
    size = image.shape[-1]
    image = F.rotate(image, uniform(-ROTATION, ROTATION), InterpolationMode.BILINEAR)
    side = round(size * uniform(ZOOM, 1))
    top, left = (int(torch.randint(size - side + 1, (), generator=g)) for _ in range(2))
    image = F.resized_crop(image, top, left, side, side, [size, size], InterpolationMode.BILINEAR, antialias=True)
    if uniform(0, 1) < 0.5:
        image = F.horizontal_flip(image)
    image = F.adjust_brightness(image, uniform(1 - LIGHT, 1 + LIGHT))
    image = F.adjust_contrast(image, uniform(1 - LIGHT, 1 + LIGHT))
    return image.permute(1, 2, 0).numpy()


AUGMENTATIONS = {"geometric": geometric, "none": lambda image, g: image}


class Batches:
    """The batch of each step: its images and their augmentation are functions of (seed, fold, step) alone.

    An epoch shows every image once, in an order drawn from the seed; what does not fill a last batch is dropped.
    (--steps-per-epoch changes when the network is validated, not which images a step sees.)
    """

    def __init__(self, store, batch, augment, seed, fold):
        self.store, self.batch, self.seed, self.fold = store, batch, seed, fold
        self.augment = AUGMENTATIONS[augment]
        self.steps_per_epoch = len(store.paths) // batch

    def images_of_step(self, step):
        """(epoch, indices of the images of the batch)."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = torch.randperm(len(self.store.paths), generator=generator(self.seed, "epoch", self.fold, epoch))
        return epoch, order[place * self.batch:(place + 1) * self.batch].tolist()

    def share(self, step, rank=0, processes=1):
        """One process's share of a batch: indices of n images, uint8 (n, S, S, 3)."""
        epoch, images = self.images_of_step(step)
        mine = images[rank::processes]
        pixels = [self.augment(self.store[i], generator(self.seed, "augment", self.fold, epoch, i)) for i in mine]
        return mine, torch.from_numpy(np.stack(pixels))


def prefetch(make, steps, workers):
    """Yield make(step) for each step, in order; up to `workers` of the next ones are made meanwhile, in threads."""
    pool, waiting = ThreadPoolExecutor(workers), deque()
    try:
        for step in steps:
            waiting.append(pool.submit(make, step))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
