"""Pictures for people: images side by side, with their labels written below them."""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PAPER, INK, GAP = "white", "black", 6  # colours, and the space between tiles in pixels


def grid(images, captions=None, columns=8, row_titles=None, tile=128):
    """Lay out n images of one size, row by row -> PIL image.

    images: uint8 (n, H, W, 3), or a list of n, in which None leaves a place empty. captions: n texts, written
    below the images, wrapped to their width. row_titles: texts at the left of the rows. Images smaller than
    `tile` pixels are enlarged by a whole factor, unsmoothed: one sees the pixels that the model made.
    """
    images = [None if image is None else np.asarray(image) for image in images]
    height, width = next(image.shape[:2] for image in images if image is not None)
    factor = max(1, math.ceil(tile / min(height, width)))
    height, width = factor * height, factor * width

    captions = [_wrap(text, width - GAP) for text in (captions or [""] * len(images))]
    row_titles = [_wrap(text, 100) for text in (row_titles or [])]
    margin = GAP + max((math.ceil(_text_size(text)[0]) + GAP for text in row_titles if text), default=0)
    caption_height = max((math.ceil(_text_size(text)[1]) + 2 for text in captions if text), default=0)
    columns, rows = min(columns, len(images)), math.ceil(len(images) / columns)
    step_x, step_y = width + GAP, height + caption_height + GAP

    picture = Image.new("RGB", (margin + columns * step_x, GAP + rows * step_y), PAPER)
    draw = ImageDraw.Draw(picture)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        if image is None:
            continue
        x, y = margin + i % columns * step_x, GAP + i // columns * step_y
        enlarged = image.repeat(factor, axis=0).repeat(factor, axis=1)
        picture.paste(Image.fromarray(enlarged), (x, y))
        draw.multiline_text((x, y + height + 1), caption, INK, _font(), spacing=1)
    for row, title in enumerate(row_titles[:rows]):
        y = GAP + row * step_y + (height - _text_size(title)[1]) // 2
        draw.multiline_text((GAP, y), title, INK, _font(), spacing=1)
    return picture


def stack(sets, titles, captions, columns=8):
    """Image i of every set in one column -> PIL image; sets and captions are m lists of n, titles m texts.

    Where n is larger than `columns`, the m rows begin again below.
    """
    images, texts, row_titles = [], [], []
    for start in range(0, len(sets[0]), columns):
        part = slice(start, start + columns)
        for pictures, text, title in zip(sets, captions, titles, strict=True):
            missing = columns - len(text[part])
            images += [*pictures[part], *[None] * missing]
            texts += [*text[part], *[""] * missing]
            row_titles.append(title)
    return grid(images, texts, columns, row_titles)


def pairs(real, generated, captions, columns=8):
    """Real images above the generated ones that share their caption; each uint8 (n, H, W, 3) -> PIL image."""
    return stack([real, generated], ["real", "generated"], [captions, captions], min(columns, len(captions)))


def caption(labels, names):
    """What an image shows: the names of its labels, soft ones with their values; labels (K,) from 0 to 1, K names."""
    return ", ".join(name if value == 1 else f"{name}={value:.2g}"
                     for name, value in zip(names, labels, strict=True) if value) or "no label"


def _font():
    return ImageFont.load_default()


def _text_size(text):
    """Width and height in pixels of a text of one or more lines, from the origin it is drawn at."""
    draw = ImageDraw.Draw(Image.new("L", (1, 1)))
    return draw.multiline_textbbox((0, 0), text, _font(), spacing=1)[2:]


def _wrap(text, width):
    """Break a text at its spaces so that no line is wider than `width` pixels; longer words are cut."""
    lines = [""]
    for word in text.split():
        while _text_size(word)[0] > width and len(word) > 1:
            word = word[:-1]
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if _text_size(longer)[0] <= width else [*lines, word]
    return "\n".join(lines)
