"""The report of evaluate.py as one HTML page that needs no other file, for wide screens and for phones.

Made from the dict that is written to results.json and from pictures; nothing is computed here. Every set of images has
a colour: real ones are grey.
"""

import base64
import colorsys
import html
import io
from dataclasses import dataclass, field

from PIL import Image

from core.files import json_text, text_writer, write_together
from core.text import p_value
from dataset.samples import PICTURE
from evaluation.names import way_of, weights_in_words
from evaluation.pictures import Gallery
from evaluation.report import NONE, columns, differing, heading, number, text

REAL = "#868e96"  # grey
TILE = (96, 160)  # pixels that a picture is wide on the page, at least and at most

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1150px; padding: 1em; color: #212529 }
h1 { font-size: 1.5em; line-height: 1.2; margin: .3em 0 } h2 { font-size: 1.15em; margin: 2em 0 .3em }
p { margin: .4em 0; max-width: 52em } small, figcaption, .about { color: #5c636a; font-size: 13px }
table { border-collapse: collapse; font-size: 13px } th, td { padding: .28em .6em; text-align: right }
th:first-child, td:first-child { text-align: left } tr { border-bottom: 1px solid #e9ecef }
td { white-space: nowrap } .words td, .gallery td { white-space: normal }
thead th { vertical-align: bottom; border-bottom: 2px solid #adb5bd }
tbody th { font-weight: normal; position: sticky; left: 0; background: #fff; min-width: 6.5em; max-width: 11em }
.words th, .words td { text-align: left; vertical-align: top } .words td { overflow-wrap: anywhere; min-width: 5em }
.wide { overflow-x: auto }
.named { display: inline-block; padding-left: 1.1em; text-indent: -1.1em }
.key { display: inline-block; text-indent: 0; width: .75em; height: .75em; border-radius: 2px; margin-right: .35em }
.warning { border-left: 4px solid #e8590c; background: #fff4e6; padding: .3em .8em; margin: .5em 0; font-size: 14px }
.chart { display: grid; grid-template-columns: minmax(6em, max-content) minmax(90px, 1fr) max-content; gap: 4px 10px;
  align-items: center; font-size: 13px; max-width: 820px }
.chart .axis { grid-column: 2; color: #5c636a; display: flex; justify-content: space-between }
.track { position: relative; height: 16px; background: #f1f3f5 }
.track i { position: absolute; top: 7px; height: 2px }
.track b { position: absolute; top: 3px; width: 10px; height: 10px; margin-left: -5px; border-radius: 50% }
.track s { position: absolute; top: 0; bottom: 0; width: 1px; background: #868e96 }
.labels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: 1em 2em }
.labels h3 { font-size: 14px; margin: .4em 0 }
.gallery td, .gallery th { padding: 3px; text-align: center; vertical-align: top; border: 0 }
.gallery tr { border: 0 } .gallery thead th { font-weight: normal; vertical-align: bottom; color: #5c636a }
.gallery tbody th { vertical-align: middle; text-align: left; font-size: 13px } .gallery img { display: block }
.pairs { display: flex; flex-wrap: wrap; gap: 10px } .pairs figure { margin: 0 }
.pairs img { display: block; border-top: 3px solid #868e96 }
.pairs img + img { border-color: var(--own) } .pairs figcaption { width: min-content; min-width: 100% }
.curves { display: flex; flex-wrap: wrap; gap: 10px } .curves img { width: 420px; max-width: 100% }
.strip img { width: 100%; min-width: 830px } figure { margin: .6em 0 } pre { white-space: pre-wrap; font-size: 12px }
@media (max-width: 600px) { body { padding: .7em } th, td { padding: .25em .4em } tbody th { max-width: 7.5em }
  td { white-space: normal; min-width: 5em } .gallery td, .words td { min-width: 0 } }
"""

READING = (
    ("KID", "distance to the real images, lower is better: mean ± standard deviation over random subsets, and a 95 % "
     "interval over images, made from half-samples"),
    ("FID", "the same for two Gaussians; with a few hundred images compare it only between equally many"),
    ("precision, density", "do the images look real?"),
    ("recall, coverage", "are all kinds of real images there?"),
    ("LPIPS", "distance between random samples: higher is more varied, and real images are the aim"),
    ("GG", "generalisation gap: above 0 the images are no nearer to the training than to the validation images; far "
     "below 0 they are copies"),
    ("copies", "share of images nearer to a training image than all but a few per cent of the real validation images "
     "are; in brackets what is expected without copying"),
    ("AuthPct", "per cent of images farther from their nearest training image than that is from its own nearest "
     "neighbour; compare with real images"),
    ("AUC of labels", "does a classifier trained on real images find the labels that were asked for? 0.5 is chance"))


@dataclass(frozen=True)
class Figures:
    """The pictures of a page."""

    sets: Gallery  # real images and, in a row each, those of the generators
    closest: dict  # name of a set -> Gallery of training images and the samples nearest to them
    lives: dict = field(default_factory=dict)  # name of a set -> (caption, PIL image): one of its images as it grows
    curves: list = field(default_factory=list)  # PIL images: what training has logged
    notes: list = field(default_factory=list)  # sentences on lives and curves that are not there


def write(folder, report, figures):
    """Write results.json, results.txt, report.html and real_vs_generated.png -> their names. Raises UserError."""
    texts = {"results.json": json_text(report), "results.txt": text(report) + "\n",
             "report.html": page(report, figures)}
    writers = {folder / name: text_writer(content) for name, content in texts.items()}
    picture = figures.sets.picture()
    write_together(writers | {folder / f"{PICTURE}.png": lambda path: picture.save(path, "PNG")})
    return [path.name for path in writers] + [f"{PICTURE}.png"]


def page(report, figures):
    """The report as one HTML page."""
    title, size = html.escape(heading(report)), report["image_size"]
    parts = [warnings(report), kids(report), _table(report), comparisons(report), sets_shown(report, figures, size),
             labels_shown(report), copies_shown(report, figures, size), training_shown(figures), made_by(report),
             _footer(report)]
    return (f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width, "
            f"initial-scale=1'><title>{title}</title><style>{STYLE}</style><h1>Generated images against real ones</h1>"
            f"<p class=about>{title}</p>{''.join(parts)}</html>\n")


# ---- small parts


def colours(report):
    """Name of a row -> its colour. Hues a golden angle apart: as far from each other as so many can be."""
    made = [row["name"] for row in report["rows"] if row["kind"] == "generated"]
    return dict.fromkeys([row["name"] for row in report["rows"]], REAL) | {n: colour(i) for i, n in enumerate(made)}


def colour(i):
    """The i-th colour for generated sets."""
    red, green, blue = colorsys.hls_to_rgb((210 + 137.508 * i) % 360 / 360, (0.42, 0.34)[i % 2], 0.7)
    return "#" + "".join(f"{round(255 * value):02x}" for value in (red, green, blue))


def _named(name, colour_of):
    """The name of a set behind a square of its colour, which stays on its line."""
    return (f"<span class=named><span class=key style='background:{colour_of.get(name, REAL)}'></span>"
            f"{html.escape(name)}</span>")


def _section(title, *parts):
    return f"<h2>{html.escape(title)}</h2>{''.join(parts)}" if any(parts) else ""


def _sentence(text_of):
    return f"<p class=about>{html.escape(text_of)}</p>"


def _rows(heads, rows, kind=""):
    """A table of HTML; heads and cells are HTML already. kind: "words" where the cells are not numbers."""
    top = "".join(f"<th>{head}</th>" for head in heads)
    body = "".join(f"<tr><th>{first}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
                   for first, *cells in rows)
    return f"<div class='wide {kind}'><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def _image(picture, width=None):
    """An <img> of a PIL image or array, itself in the page."""
    buffer = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(buffer, "PNG")
    size = f" width={width}" if width else ""
    return f"<img alt=''{size} src='data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}'>"


def _chart(rows, colour_of, scale=1, digits=0):
    """Points with intervals on one axis. rows: (name, value, [low, high] or None, images or None)."""
    ends = [scale * end for _, value, bounds, _ in rows for end in (value, *(bounds or ()))]
    low, high = min(0, *ends), max(0, *ends)
    span = (high - low) or 1
    lines = []
    for name, value, bounds, images in rows:
        def place(x):
            return f"{100 * (scale * x - low) / span:.2f}%"

        shade = colour_of.get(name, REAL)
        bar = ""
        if bounds:
            width = 100 * scale * (bounds[1] - bounds[0]) / span
            bar = f"<i style='left:{place(bounds[0])};width:{width:.2f}%;background:{shade}'></i>"
        shown = f"<b>{number(scale * value, digits)}</b>" + (
            f" <small>{number(scale * bounds[0], digits)} to {number(scale * bounds[1], digits)}</small>" if bounds
            else "")
        count = f" <small>{images} images</small>" if images is not None else ""
        lines.append(f"<div>{_named(name, colour_of)}{count}</div><div class=track><s style='left:{place(0)}'></s>{bar}"
                     f"<b style='left:{place(value)};background:{shade}'></b></div><div>{shown}</div>")
    axis = f"<div class=axis><span>{number(low, digits)}</span><span>{number(high, digits)}</span></div>"
    return f"<div class=chart>{''.join(lines)}{axis}</div>"


# ---- sections


def warnings(report):
    """What a reader should doubt, and what was left out."""
    return "".join(f"<div class=warning>{html.escape(line)}</div>" for line in report["warnings"])


def kids(report):
    """KID of every set with its interval, in each space."""
    parts = []
    for space in report["spaces"]:
        rows = [(row["name"], row["kid"][space]["mean"], row["kid"][space]["interval"], None)
                for row in report["rows"]]
        parts.append(_section(f"How far from the real images? KID[{space}] × 10⁻³, lower is better",
                              _chart(rows, colours(report), 1e3)))
    floor = any(row["kind"] == "real" for row in report["rows"])
    said = "Dot: mean over random subsets. Line: 95 % interval over images."
    if floor:
        said += (" Grey: other real images, scored as if they were generated. No generator need come closer "
                 "(the noise floor).")
    return "".join(parts) + _sentence(said) if parts else ""


def _table(report):
    """All scores: a row for each, a column for each set, so that it is narrow."""
    colour_of, (_, *shown) = colours(report), columns(report)
    heads = ["", *(_named(row["name"], colour_of) for row in report["rows"])]
    rows = [[html.escape(head), *(html.escape(text_of(row)) for row in report["rows"])] for head, text_of in shown]
    all_heads = " ".join(head for head, _ in shown)
    meant = "".join(f"<li><b>{name}</b>: {html.escape(says)}</li>" for name, says in READING
                    if name.partition(",")[0] in all_heads)
    return _section("All scores", _rows(heads, rows), f"<ul class=about>{meant}</ul>")


def comparisons(report):
    """Paired differences between generators, and means over seeds."""
    colour_of, pairs = colours(report), []
    for pair in report["paired"]:
        low, high = (1e3 * end for end in pair["interval"])
        nearer = pair["b"] if pair["difference"] > 0 else pair["a"]
        pairs.append([f"{_named(pair['a'], colour_of)} − {_named(pair['b'], colour_of)}",
                      f"{1e3 * pair['difference']:+.1f}", f"{low:+.1f} to {high:+.1f}", html.escape(p_value(pair["p"])),
                      f"{html.escape(nearer)} is nearer" if pair["p"] < 0.05 else "cannot be told apart",
                      html.escape(pair["space"])])
    said = ("Image by image: both were asked for the same labels with the same seed, so what a label does to both "
            "cancels. Below 0 the first is nearer. p is that of one comparison; among many, some are small by chance.")
    return (_section("Which generator is nearer to the real images?", _rows(
        ["", "difference of KID × 10⁻³", "95 % interval", "p", "", "space"], pairs), _sentence(said)) if pairs
        else "") + seeds(report)


def seeds(report):
    """Methods of which there are several runs: mean and spread of each score."""
    groups = report["over_seeds"]
    if not groups:
        return ""
    names = list(dict.fromkeys(name for group in groups for name in group["values"]))
    rows = []
    for group in groups:
        cells = []
        for name in names:
            scale, v = 1e3 if name.startswith("KID") else 1, group["values"].get(name)
            cells.append(NONE if v is None else f"{scale * v['mean']:.4g} ± {scale * v['std']:.2g}<br><small>"
                         f"{scale * v['low']:.4g} to {scale * v['high']:.4g}</small>")
        rows.append([f"{html.escape(group['name'])}<br><small>{group['runs']} runs {html.escape(differing(group))}"
                     "</small>", *cells])
    heads = ["", *(html.escape(name) + " × 10⁻³" * name.startswith("KID") for name in names)]
    return _section("Over several runs", _rows(heads, rows), _sentence(
        "Mean ± standard deviation over the runs, and below it the 95 % interval of the mean, which is wide for two."))


def sets_shown(report, figures, size):
    """Real images and those of each generator, a row each."""
    gallery, colour_of, width = figures.sets, colours(report), min(max(size, TILE[0]), TILE[1])
    real = gallery.captions[0]
    heads = "".join(f"<th>{html.escape(caption)}</th>" for caption in real)
    rows = []
    for title, images, captions in zip(gallery.titles, gallery.images, gallery.captions, strict=True):
        cells = "".join(
            "<td></td>" if image is None else f"<td>{_image(image, width)}" +
            (f"<small>{html.escape(said)}</small>" if said != asked else "") + "</td>"
            for image, said, asked in zip(images, captions, real, strict=True))
        rows.append(f"<tr><th>{_named(title, colour_of)}</th>{cells}</tr>")
    said = ("Above: real images with their labels. Below each: what the generators made when they were asked for the "
            "same labels." if gallery.matched else
            "Above: real images with their labels. Below each: generated images that were asked for the same labels "
            "or, where there is none or its labels are not known, another one with what is known of it.")
    return _section("What do they look like?", f"<div class='wide gallery'><table><thead><tr><th></th>{heads}</tr>"
                    f"</thead><tbody>{''.join(rows)}</tbody></table></div>", _sentence(
                        f"{said} Chosen by chance, each combination of labels once before any comes twice."))


def labels_shown(report):
    """For each label: KID of the images that have it, and what a classifier says of it, or their share."""
    colour_of, parts = colours(report), []
    for title, said, values in (
            (f"Label by label: KID[{(report['spaces'] or [''])[0]}] × 10⁻³ of the images with this label",
             "Against the real images with this label. Few images: wide intervals.", _kids_of),
            ("Label by label: does an image show what it was asked for?",
             "AUC of a classifier that was trained on real images: 1 is always, 0.5 is chance.", _aucs_of),
            ("Label by label: share of the images", "", _shares_of)):
        blocks = []
        for name in report["data"]["labels"]:
            rows, scale, digits = values(report, name)
            if rows:
                blocks.append(f"<div><h3>{html.escape(name)}</h3>{_chart(rows, colour_of, scale, digits)}</div>")
        if blocks:
            parts.append(_section(title, f"<div class=labels>{''.join(blocks)}</div>", _sentence(said) if said else ""))
    return "".join(parts)


def _kids_of(report, label):
    found = [(row["name"], row["kid_of_labels"][label]) for row in report["rows"] if row.get("kid_of_labels")]
    shown = [(name, score["kid"]["value"], score["kid"]["interval"], score["images"])
             for name, score in found if score["kid"]]
    return shown if {name for name, *_ in shown} & _generated(report) else [], 1e3, 0


def _generated(report):
    return {row["name"] for row in report["rows"] if row["kind"] == "generated"}


def _aucs_of(report, label):
    found = [(row["name"], row["conditioning"]["labels"][label]["auc"]) for row in report["rows"]
             if row["conditioning"]]
    return [(name, auc, None, None) for name, auc in found if auc is not None], 1, 2


def _shares_of(report, label):
    """Only where there is no other score of the labels."""
    if any(row["conditioning"] or row.get("kid_of_labels") for row in report["rows"]):
        return [], 1, 2
    return [(row["name"], row["label_share"][label], None, None) for row in report["rows"] if row["label_share"]], 1, 2


def copies_shown(report, figures, size):
    """The samples nearest to a training image, of each generator."""
    colour_of, width, parts = colours(report), min(max(size, TILE[0]), TILE[1]), []
    for name, gallery in figures.closest.items():
        pairs = "".join(f"<figure style='--own:{colour_of[name]}'>{_image(training, width)}{_image(sample, width)}"
                        f"<figcaption>{html.escape(said)}</figcaption></figure>"
                        for training, sample, said in zip(*gallery.images, gallery.captions[1], strict=True))
        parts.append(f"<h3>{_named(name, colour_of)}</h3><div class=pairs>{pairs}</div>")
    return _section("Are they copies? The samples nearest to a training image", _sentence(
        "Grey: the training image. Below it, in the colour of its generator: the sample. Distance: Euclidean, between "
        f"features of the space {report['gg_space']}; 0 is a copy."), *parts) if parts else ""


def training_shown(figures):
    """One growing image of each generator, and the curves of their training."""
    lives = "".join(f"<figure><figcaption>{html.escape(f'{name}: {said}')}</figcaption><div class='wide strip'>"
                    f"{_image(picture)}</div></figure>" for name, (said, picture) in figures.lives.items())
    curves = "".join(map(_image, figures.curves))
    notes = "".join(map(_sentence, figures.notes))
    explained = _sentence("Pale: as logged. Strong: smoothed. Bands: the noise floor of the validation's KID, where it "
                          "was logged.")
    return (_section("How an image comes to be", lives) if lives else "") + (_section(
        "How they were trained", f"<div class=curves>{curves}</div>", explained) if curves else "") + notes


def made_by(report):
    """What made each set: weights, sampling, folder."""
    colour_of = colours(report)
    rows = []
    for row in report["rows"]:
        about = row["about"]
        known = [f"{about['parameters'] / 1e6:.1f} M" if "parameters" in about else NONE,
                 weights_in_words(about) or NONE, way_of(about) if about else NONE, str(about.get("seed", NONE)),
                 about.get("checkpoint", NONE), row["folder"]]
        rows.append([_named(row["name"], colour_of), *map(html.escape, known)])
    return _section("What made them", _rows(
        ["", "parameters", "weights", "sampler", "sampling seed", "checkpoint, as seen from the folder", "folder"],
        rows, "words"), *map(_sentence, report["remarks"]))


def _footer(report):
    about = html.escape("\n".join([f"versions: {report['versions']}", *(
        f"{name}: {space['identity']}; {space['preprocessing']}" for name, space in report["networks"].items())]))
    return f"<footer class=about><pre>{about}</pre></footer>"
