"""The pictures of a life (generation/growth.Life): a still strip and an animation; and those of damage and recovery.

Sizes are in pixels at the size shown: a page 830 wide, as wide as a README. Letters are 12 pixels high there. Files
have twice as many pixels (strip) or as many (animation).
"""

import textwrap
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from evaluation.pictures import drawn

WIDTH, MARGIN, GAP = 830, 150, 4  # of a page, of the row titles, between tiles
LINE, LETTERS = 15, 8.6  # pixels between lines of text; size of letters in points (12 pixels)
INK, FAINT, MARK = "#212529", "#868e96", "#f2059f"  # text, thin lines, frames and outlines
EMPTY, FIRES, REACHED, SOURCE = (233, 236, 239), (232, 89, 12), (116, 192, 252), (81, 207, 102)  # cells


class ChannelColours:
    """Colours for the channels of cells: their three main axes as red, green and blue.

    The axes (principal components) and the range of each are measured once, on cells of all times, and stay: equal
    channels have equal colours in every picture.
    """

    def __init__(self, grids):
        """grids: arrays (channels, h, w) of all times."""
        cells = np.concatenate([grid.reshape(len(grid), -1).T for grid in grids]).astype(float)  # (cells, channels)
        self.mean = cells.mean(0)
        _, _, axes = np.linalg.svd(cells - self.mean, full_matrices=False)
        axes = axes[:3]  # (up to 3, channels)
        self.axes = axes * np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(1)])[:, None]  # a sign of its own
        self.low, self.high = np.percentile((cells - self.mean) @ self.axes.T, [1, 99], axis=0)

    def __call__(self, grid):
        """(channels, h, w) -> uint8 (h, w, 3)."""
        values = (grid.reshape(len(grid), -1).T - self.mean) @ self.axes.T  # (h·w, up to 3)
        values = (values - self.low) / np.maximum(self.high - self.low, 1e-12)
        colours = np.zeros((len(values), 3))
        colours[:, : values.shape[1]] = values.clip(0, 1)
        return (255 * colours).round().astype(np.uint8).reshape(*grid.shape[1:], 3)


def painted(*layers):
    """Masks (h, w) and their colours, each over those before it -> uint8 (h, w, 3)."""
    picture = np.empty((*layers[0][0].shape, 3), np.uint8)
    picture[:] = EMPTY
    for mask, colour in layers:
        picture[mask] = colour
    return picture


def shaded(weights, most):
    """Weights (h, w) from white (0) to dark violet (`most`) -> uint8 (h, w, 3)."""
    return (255 * matplotlib.colormaps["Purples"](np.clip(weights / most, 0, 1))[..., :3]).round().astype(np.uint8)


def edges(region):
    """The outline of a region (h, w) of cells: segments ((x, y), (x, y)) in units of cells."""
    padded = np.pad(region, 1)
    across = np.argwhere(padded[:-1, 1:-1] != padded[1:, 1:-1])  # (row, column) of the cells below a horizontal edge
    down = np.argwhere(padded[1:-1, :-1] != padded[1:-1, 1:])
    return [((x, y), (x + 1, y)) for y, x in across] + [((x, y), (x, y + 1)) for y, x in down]


# ---- pages


class Row(NamedTuple):
    """A row of tiles with a title at its left. Tiles are uint8 (h, w, 3), or None for an empty place."""

    title: str
    tiles: list
    cells: bool = False  # one pixel is one cell: sharp edges, lines between them
    marks: tuple = ()  # (row, column) of cells that are framed
    region: np.ndarray | None = None  # bool (h, w): cells whose outline is drawn ...
    outlined: tuple = ()  # ... in the tiles of these numbers


class Block(NamedTuple):
    """Rows with common columns, below a heading. All rows have as many tiles as there are captions."""

    heading: str
    captions: list
    rows: list


class Page:
    """A figure with the coordinates of its pixels."""

    def __init__(self, height, scale=1):
        self.figure = Figure(figsize=(WIDTH / 100, height / 100), dpi=100 * scale, facecolor="white")
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0), autoscale_on=False)
        self.axes.axis("off")

    def text(self, x, y, text, colour=INK, **more):
        self.axes.text(x, y, text, color=colour, **{"size": LETTERS, "va": "top", "linespacing": 1.2, **more})

    def tile(self, picture, x, y, width, height, cells=False, marks=(), region=None):
        """A picture with its upper left corner at (x, y); `marks` and `region` as in Row."""
        self.axes.imshow(picture, extent=(x, x + width, y + height, y), aspect="auto", zorder=1,
                         interpolation="nearest" if cells else "bilinear")
        self.axes.add_patch(Rectangle((x, y), width, height, fill=False, lw=0.4, ec=FAINT, zorder=2))
        side_y, side_x = height / picture.shape[0], width / picture.shape[1]
        for row, column in marks:
            self.axes.add_patch(Rectangle((x + column * side_x, y + row * side_y), side_x, side_y, fill=False,
                                          ec=MARK, lw=1.3, zorder=3))
        if region is not None:
            side = np.array([width / region.shape[1], height / region.shape[0]])
            lines = [np.array(edge) * side + (x, y) for edge in edges(region)]
            self.axes.add_collection(LineCollection(lines, colors=MARK, linewidths=1.2, zorder=3))

    def pixels(self):
        """-> PIL image."""
        return drawn(self.figure)


def page(blocks, note="", scale=2):
    """Lay out blocks one below the other -> Page. `note`: a remark at the foot."""
    heights = [_block_height(block) for block in blocks]
    lines = textwrap.wrap(note, 125)
    result = Page(sum(heights) + LINE * len(lines) + 6, scale)
    y = 0
    for block, height in zip(blocks, heights, strict=True):
        _draw(result, block, y)
        y += height
    result.text(GAP, y, "\n".join(lines), FAINT)
    return result


def _tile_size(block):
    """Width and height of the tiles of a block, whose pictures have one aspect."""
    height, width = next(tile.shape[:2] for row in block.rows for tile in row.tiles if tile is not None)
    side = (WIDTH - MARGIN) / len(block.captions) - GAP
    return side, side * height / width


def _block_height(block):
    rows = [max(_tile_size(block)[1], LINE * len(_wrapped(row.title))) for row in block.rows]
    return sum(rows) + GAP * len(rows) + 2 * LINE + 24


def _wrapped(title):
    return textwrap.wrap(title, 21)


def _draw(result, block, y):
    width, height = _tile_size(block)
    result.text(GAP, y + 6, block.heading, weight="bold", size=LETTERS + 1)
    y += LINE + 14
    for i, caption in enumerate(block.captions):
        result.text(MARGIN + i * (width + GAP) + width / 2, y - 1, caption, ha="center")
    y += LINE + 2
    for row in block.rows:
        title = _wrapped(row.title)
        tall = max(height, LINE * len(title))
        result.text(MARGIN - 8, y + tall / 2, "\n".join(title), ha="right", va="center")
        for i, tile in enumerate(row.tiles):
            if tile is not None:
                side = min(width / tile.shape[1], height / tile.shape[0])  # of a pixel: tiles keep their aspect
                w, h = side * tile.shape[1], side * tile.shape[0]
                result.tile(tile, MARGIN + i * (width + GAP) + (width - w) / 2, y + (tall - h) / 2, w, h, row.cells,
                            row.marks, row.region if i in row.outlined else None)
        y += tall + GAP


# ---- a life


def strip(life, asked, shown_inside, columns=9, note=""):
    """The life as a still -> Page: over diffusion time, and below it the steps of one call, at t = `shown_inside`.

    `asked`: the labels in words.
    """
    wide = _aspect(life) > 1.5
    moments = _evenly(life.moments, 5 if wide else columns)
    colours = channel_colours(life)
    blocks = [Block("Diffusion, from noise (t = 999) to image (t = 0)", [f"t = {moment.t}" for moment in moments],
                    _rows_over_time(moments, asked, colours))]
    if colours:
        moment = next(m for m in life.moments if m.t == shown_inside)
        blocks.append(_inside_block(life, moment, colours, range(0, len(moment.inside.answers), 1 + wide)))
    return page(blocks, note)


def _aspect(life):
    return life.image.shape[1] / life.image.shape[0]


def _evenly(items, count):
    return [items[i] for i in np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)]


def channel_colours(life):
    """ChannelColours of all that a life has recorded; None for a model without hidden channels."""
    if life.moments[0].inside is None:
        return None
    return ChannelColours([grid for moment in life.moments for grid in moment.inside.hidden])


def _rows_over_time(moments, asked, colours):
    rows = [Row("the noisy image xₜ, input of the model", [m.noisy for m in moments]),
            Row("the finished image, as predicted from it", [m.predicted for m in moments])]
    if any(m.unconditional is not None for m in moments):  # at some times it may not be asked (--cfg-interval)
        rows += [Row(f"… by the copy that is asked for {asked}", [m.conditional for m in moments]),
                 Row("… by the copy that is asked for nothing", [m.unconditional for m in moments])]
    if colours:
        rows.append(Row("hidden channels of the cells, as colours", [colours(m.inside.hidden[-1]) for m in moments],
                        cells=True))
    return rows


def _inside_block(life, moment, colours, shown):
    """The steps `shown` of one call, as a Block; 0 is its start."""
    inside, mean = moment.inside, moment.inside.attention.mean(1)  # over the heads: (K, 3, 3)
    rows = [Row("the image, if the answer were read now", [inside.answers[k] for k in shown]),
            Row("hidden channels, as colours", [colours(inside.hidden[k]) for k in shown], cells=True),
            Row("cells that fire (the others rest)",
                [painted((inside.fire[k - 1], FIRES)) if k else None for k in shown], cells=True),
            Row("cells that the seed cell (framed) can have reached",
                [painted((inside.reached[k], REACHED)) for k in shown], cells=True, marks=(life.seed_cell,)),
            Row("cells that can still affect the framed cell's answer",
                [painted((inside.sources[k], SOURCE)) for k in shown], cells=True, marks=(life.cell,)),
            Row(f"its attention to its 3×3 cells (white 0, dark {mean.max():.2f})",
                [shaded(mean[k - 1], mean.max()) if k else None for k in shown], cells=True)]
    return Block(f"Inside one of these calls, t = {moment.t}: the {len(inside.fire)} steps of the automaton",
                 ["start" if k == 0 else f"step {k}" if k == shown[1] else str(k) for k in shown], rows)


def frames(life, asked, slow=5, note=""):
    """The life in motion -> list of (PIL image, milliseconds). In `slow` of its calls every step is shown."""
    colours = channel_colours(life)
    slowly = {moment.t for moment in _evenly(life.moments, slow)} if colours else set()
    shown = []
    for moment in life.moments:
        if moment.t in slowly:
            ticks = range(len(moment.inside.answers))
            shown += [(_frame(life, moment, k, asked, colours, note), 130 if 0 < k < ticks[-1] else 450) for k in ticks]
        else:
            last = len(moment.inside.fire) if colours else None
            shown.append((_frame(life, moment, last, asked, colours, note), 130))
    return [*shown[:-1], (shown[-1][0], 3000)]


def _frame(life, moment, k, asked, colours, note):
    """One frame: the life at one diffusion step and, for an automaton, after k steps of its call."""
    inside, noisy = moment.inside, ("noisy image xₜ,\ninput of the model", moment.noisy, False)
    if inside:
        region = painted((inside.reached[k], REACHED), *([(inside.fire[k - 1], FIRES)] if k else []))
        tiles = [noisy, ("the image, if the\nanswer were read now", inside.answers[k], False),
                 ("hidden channels,\n3 main axes as colours", colours(inside.hidden[k]), True),
                 ("cells: reached by the seed\n(blue), firing (orange)", region, True)]
    else:
        tiles = [noisy, ("the image,\nas predicted from it", moment.predicted, False)]
        if any(m.unconditional is not None for m in life.moments):
            tiles += [(f"… by the copy that is\nasked for {asked}", moment.conditional, False),
                      ("… by the copy that is\nasked for nothing", moment.unconditional, False)]
    width = (WIDTH - GAP) / len(tiles) - GAP
    height = width / _aspect(life)
    lines = textwrap.wrap(note, 120)
    result = Page(height + 86 + LINE * len(lines), scale=1)
    for i, (title, picture, cells) in enumerate(tiles):
        x = GAP + i * (width + GAP)
        result.text(x + width / 2, 5, title, ha="center")
        if picture is not None:
            result.tile(picture, x, 41, width, height, cells)
    first, last = life.moments[0].t, life.moments[-1].t
    _progress(result, GAP, height + 50, f"diffusion time t = {moment.t}", (first - moment.t) / max(first - last, 1))
    if inside:
        _progress(result, WIDTH / 2 + GAP / 2, height + 50, f"step {k} of {len(inside.fire)} of the automaton",
                  k / len(inside.fire), FIRES)
    result.text(GAP, height + 84, "\n".join(lines), FAINT)
    return result.pixels()


def _progress(result, x, y, text, share, colour=(73, 80, 87)):
    """A line of text and below it how far it has come."""
    width = WIDTH / 2 - 2 * GAP
    result.text(x, y, text, size=LETTERS + 1)
    for part, shade in ((1, EMPTY), (share, colour)):
        result.axes.add_patch(Rectangle((x, y + 20), width * part, 6, color=np.array(shade) / 255, lw=0))


# ---- damage and recovery


class Pair(NamedTuple):
    """An undamaged life and a damaged one of the same model, labels and noise."""

    name: str  # of the model
    undamaged: object  # Life
    damaged: object
    mask: np.ndarray  # bool (h, w): the damaged cells
    at: int  # the diffusion step before which they were damaged


DAMAGES = {"hole": "a hole in the middle", "half": "the right half lost", "random": "half of the cells lost"}


def recovery_strip(pairs, damage, note="", columns=9):
    """Undamaged and damaged lives of one or more models (Pair) side by side, as a still -> Page."""
    wide = _aspect(pairs[0].undamaged) > 1.5
    columns, blocks = 5 if wide else columns, []
    for pair in pairs:
        after = [i for i, m in enumerate(pair.damaged.moments) if m.t <= pair.at]
        shown = [max(after[0] - 1, 0), *_evenly(after, columns - 2)]  # the step before, the damaged one, and on
        undamaged, damaged = ([life.moments[i] for i in shown] for life in (pair.undamaged, pair.damaged))
        rows = [Row("not damaged: the image as predicted", [*(m.predicted for m in undamaged), pair.undamaged.image]),
                Row(f"{DAMAGES[damage]}: the image as predicted", [*(m.predicted for m in damaged), pair.damaged.image],
                    region=pair.mask, outlined=range(1, columns)),
                Row("its noisy image xₜ: new noise where damaged", [*(m.noisy for m in damaged), None],
                    region=pair.mask, outlined=(1,))]
        captions = [*(f"t = {m.t}" for m in damaged), "finished"]
        blocks.append(Block(f"{pair.name}: damaged at t = {pair.at}", captions, rows))
    return page(blocks, note)


def recovery_frames(pairs, damage, note=""):
    """The same in motion -> list of (PIL image, milliseconds): the predicted images, undamaged above, damaged below."""
    shown = []
    for i, moment in enumerate(pairs[0].undamaged.moments):
        struck = [pair.damaged.moments[i].t <= pair.at for pair in pairs]
        first = any(struck) and (i == 0 or pairs[0].damaged.moments[i - 1].t > pairs[0].at)
        shown.append((_recovery_frame(pairs, i, moment.t, struck, damage, note), 1200 if first else 200))
    return [*shown[:-1], (shown[-1][0], 3000)]


def _recovery_frame(pairs, i, t, struck, damage, note):
    """The i-th recorded moment of all pairs."""
    side = min(230, (WIDTH - MARGIN) / len(pairs) - GAP)
    height = side / _aspect(pairs[0].undamaged)
    lines = textwrap.wrap(note, 120)
    result = Page(2 * height + 76 + LINE * len(lines), scale=1)
    titles = ["undamaged", DAMAGES[damage] if any(struck) else "not damaged yet"]
    for row, title in enumerate(titles):
        result.text(MARGIN - 8, 25 + row * (height + GAP) + height / 2, "\n".join(_wrapped(title)), ha="right",
                    va="center", colour=MARK if row and any(struck) else INK)
    for column, (pair, hurt) in enumerate(zip(pairs, struck, strict=True)):
        x = MARGIN + column * (side + GAP)
        result.text(x + side / 2, 5, pair.name, ha="center")
        for row, life in enumerate((pair.undamaged, pair.damaged)):
            result.tile(life.moments[i].predicted, x, 25 + row * (height + GAP), side, height,
                        region=pair.mask if row and hurt else None)
    first, last = pairs[0].undamaged.moments[0].t, pairs[0].undamaged.moments[-1].t
    _progress(result, MARGIN, 2 * height + 38, f"predicted image at diffusion time t = {t}",
              (first - t) / max(first - last, 1))
    result.text(GAP, 2 * height + 72, "\n".join(lines), FAINT)
    return result.pixels()


# ---- files


def save_page(path, result, kind):
    """Write a Page as PNG or PDF, to a file object or path."""
    result.figure.savefig(path, format=kind)


def save_animation(path, shown, kind):
    """Write frames [(PIL image, milliseconds)] as an animated webp or gif that runs for ever."""
    images, durations = [image for image, _ in shown], [ms for _, ms in shown]
    more = {"quality": 72, "method": 4} if kind == "webp" else {"optimize": True}
    if kind == "gif":  # one palette for all: colours must not flicker
        palette = _palette(images)
        images = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    images[0].save(path, format=kind, save_all=True, append_images=images[1:], duration=durations, loop=0, **more)


def _palette(images):
    """A palette of 255 colours for all these pictures."""
    chosen = _evenly(images, 12)
    whole = Image.new("RGB", (chosen[0].width, chosen[0].height * len(chosen)))
    for i, image in enumerate(chosen):
        whole.paste(image, (0, i * image.height))
    return whole.quantize(255, method=Image.Quantize.MEDIANCUT)
