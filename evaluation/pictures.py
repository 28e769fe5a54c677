"""The pictures of an evaluation: real images beside generated ones, samples below their nearest training images."""

from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from core.random import generator
from dataset.images import load_image
from dataset.pictures import caption, stack

SHOWN = 8  # images of each set, and pairs in a row


@dataclass(frozen=True)
class Gallery:
    """Rows of pictures with titles; the pictures of a column belong together."""

    titles: list  # of the m rows
    images: list  # m lists of n uint8 (H, W, 3), None for an empty place
    captions: list  # m lists of n texts

    def picture(self):
        """All of it as a PIL image, at most SHOWN columns wide."""
        return stack(self.images, self.titles, self.captions, min(SHOWN, len(self.images[0])))

    @property
    def matched(self):
        """Whether the pictures of each column have the same caption, that is, show the same labels."""
        return all(captions == self.captions[0] for captions in self.captions)


def side_by_side(real, generated, label_names, image_size, seed):
    """Real images on top, generated ones below, under each what it shows -> Gallery.

    `real`: LabelledImages, `generated`: a list of them. Which images: chosen at random, but each label combination once
    before any comes twice. Columns share their labels where there are samples of them.
    """
    def order(n, *purpose):
        return torch.randperm(n, generator=generator(seed, "picture", *purpose)).tolist()

    def images_of(images, indices):
        return [None if i is None else load_image(images.paths[i], image_size) for i in indices]

    def captions_of(images, indices):
        return ["" if i is None else caption(images.labels[i], label_names) if images.labels is not None
                else "labels unknown" for i in indices]

    sets = [real, *generated]
    chosen = [different(real.labels, order(len(real), "real"))[:SHOWN]]
    for i, s in enumerate(generated):
        chosen.append(match(real.labels[chosen[0]], s.labels, order(len(s), i)))
    return Gallery(["real", *(s.name for s in generated)], [*map(images_of, sets, chosen)],
                   [*map(captions_of, sets, chosen)])


def different(labels, order):
    """Reorder `order` so that the first image of each label combination comes before every repetition."""
    first = {tuple(labels[i]): i for i in reversed(order)}.values()
    return [i for i in order if i in first] + [i for i in order if i not in first]


def match(wanted, labels, order):
    """For each row of `wanted` (n, K) the index of an image with these labels, else of another, else None."""
    free, chosen = list(order), []
    for row in wanted:
        hit = next((i for i in free if labels is not None and np.array_equal(labels[i], row)), None)
        chosen.append(hit)
        if hit is not None:
            free.remove(hit)
    return [free.pop(0) if i is None and free else i for i in chosen]


def closest(pairs, generated_paths, training_paths, image_size):
    """Training images above the samples that are nearest to them, and below these their distance -> Gallery.

    pairs: dicts as in results.json, of `sample` and `training` (indices of files), `distance` and `lpips` (or None).
    """
    images = [[load_image(training_paths[pair["training"]], image_size) for pair in pairs],
              [load_image(generated_paths[pair["sample"]], image_size) for pair in pairs]]
    captions = [f"distance {pair['distance']:.3g}" +
                (f", LPIPS {pair['lpips']:.2f}" if pair["lpips"] is not None else "") for pair in pairs]
    return Gallery(["training", "generated"], images, [[""] * len(pairs), captions])


def drawn(figure):
    """A matplotlib figure as a PIL image."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
