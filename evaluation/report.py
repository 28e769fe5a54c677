"""How evaluate.py shows its numbers: as text, and as one HTML page that needs no other file.

Both are made from the dict that is written to results.json; nothing is computed here.
"""

import base64
import html
import io
import json

from core.errors import UserError
from core.files import write_atomically, write_text
from core.text import aligned
from dataset.samples import PICTURE

NONE = "–"


def columns(report):
    """(heading, row -> text) for every column that some row has a value for."""
    shown = [("set", lambda row: row["name"]), ("images", lambda row: str(row["images"]))]
    for space in report["spaces"]:
        shown += _columns_of(space)
    shown += [("LPIPS", lambda row: _spread(row["lpips"])),
              (f"GG[{report['gg_space']}]", lambda row: _gap(row["gg"])),
              ("95 % interval of GG", lambda row: _gap_interval(row["gg"])),
              ("copies", lambda row: _copies(row["memorisation"])),
              ("AuthPct", lambda row: _authentic(row["memorisation"])),
              ("AUC of labels", lambda row: _auc(row["conditioning"]))]
    return [(head, text_of) for head, text_of in shown if any(text_of(row) != NONE for row in report["rows"])]


def _columns_of(space):
    """The columns that each feature space has."""
    return [(f"KID[{space}] ×1e-3", lambda row: _kid(row["kid"][space])),
            ("95 % interval of KID", lambda row: _interval(row["kid"][space]["interval"], 1e3)),
            (f"FID[{space}]", lambda row: number(row["fid"][space], 2)),
            ("precision, recall", lambda row: _two(row["fidelity"][space], "precision", "recall")),
            ("density, coverage", lambda row: _two(row["fidelity"][space], "density", "coverage"))]


def number(value, digits):
    """A number as text; the huge ones that copies lead to, with an exponent."""
    return NONE if value is None else f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.1e}"


def _kid(score):
    return f"{1e3 * score['mean']:.2f} ± {1e3 * score['std']:.2f}"


def _interval(bounds, scale):
    return NONE if bounds is None else " to ".join(number(scale * value, 1) for value in bounds)


def _two(scores, first, second):
    return f"{scores[first]:.2f}, {scores[second]:.2f}"


def _spread(score):
    return NONE if score is None else f"{score['mean']:.3f} ± {score['std']:.3f}"


def _gap(score):
    return NONE if score is None else number(score["gap"], 2)


def _gap_interval(score):
    return NONE if score is None else _interval(score["gap_interval"], 1)


def _copies(memorisation):
    """Share of samples that are near training images, what would be expected, and how many are exact copies."""
    if memorisation is None:
        return NONE
    near, exact = memorisation["close"], len(memorisation["exact_duplicates"]["copies"])
    return f"{100 * near['value']:.0f} % ({100 * near['expected']:.0f} %)" + (f", {exact} exact" if exact else "")


def _authentic(memorisation):
    return NONE if memorisation is None else number(memorisation["authentic_percent"], 1)


def _auc(conditioning):
    return NONE if conditioning is None else number(conditioning["macro"]["auc"], 3)


def text(report):
    """The table, and below it what several folders say together."""
    shown = columns(report)
    table = aligned([[head for head, _ in shown], *([text_of(row) for _, text_of in shown] for row in report["rows"])])
    return "\n".join([heading(report), table, *remarks(report)])


def heading(report):
    data = report["data"]
    return (f"{data['root']}, fold {data['fold']}, {report['image_size']} pixels, seed {report['seed']}; against the "
            f"{data['validation_images']} images of val_{data['fold']}; KID over {report['subsets']} subsets")


def remarks(report):
    """One line for each comparison of two folders and each group of folders that differ in their seed."""
    lines = []
    for pair in report["paired"]:
        lines.append(f"{pair['a']} against {pair['b']}: KID[{pair['space']}] differs by "
                     f"{1e3 * pair['difference']:.1f}e-3, p = {pair['p']:.2g} ({pair['images']} pairs of one label)")
    for group in report["over_seeds"]:
        values = ", ".join(f"{name} {v['mean']:.4g} ± {v['std']:.2g}" for name, v in group["values"].items())
        lines.append(f"{group['name']} over {group['runs']} folders: {values}")
    return lines


STYLE = """body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1150px; padding: 0 1em;
  color: #222 }
table { border-collapse: collapse; font-size: 13px } th, td { padding: .3em .7em; text-align: right }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere } tr:nth-child(even) { background: #f4f4f4 }
th { border-bottom: 2px solid #888; vertical-align: bottom } img { max-width: 100% } .wide { overflow-x: auto }
figcaption, footer { color: #555; font-size: 13px } pre { white-space: pre-wrap; font-size: 12px }
.bars { display: grid; grid-template-columns: 6em 1fr; gap: 2px 8px; font-size: 13px; max-width: 640px }
.bar { height: 9px; background: #3b75af } .bar.real { background: #aaa }"""


def page(report, pictures):
    """The report as one HTML page; pictures: (caption, PIL image) in the order in which they are shown."""
    figures = "".join(f"<figure><img alt='' src='{_inline(image)}'><figcaption>{html.escape(caption)}</figcaption>"
                      "</figure>" for caption, image in pictures)
    lines = "".join(f"<p>{html.escape(line)}</p>" for line in [*remarks(report), *report["warnings"]])
    about = html.escape("\n".join([f"versions: {report['versions']}", *(
        f"{name}: {space['identity']}; {space['preprocessing']}" for name, space in report["networks"].items())]))
    title = html.escape(heading(report))
    return (f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
            f"<h1>Generated images against real ones</h1><p>{title}</p>{_html_table(report)}{lines}{_reading(report)}"
            f"{bars(report)}{figures}<footer><pre>{about}</pre></footer></html>\n")


def _html_table(report):
    shown = columns(report)
    heads = "".join(f"<th>{html.escape(head)}</th>" for head, _ in shown)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(text_of(row))}</td>" for _, text_of in shown) + "</tr>"
                   for row in report["rows"])
    return f"<div class=wide><table><tr>{heads}</tr>{rows}</table></div>"


def _reading(report):
    """What the columns mean, in the words a reader of the table needs."""
    lines = ["The first row is real against real: no generator need come closer (the noise floor).",
             "KID: mean ± standard deviation over random subsets, lower is better; the interval is over images.",
             "Precision and density: do samples look real? Recall and coverage: are all kinds of real images there?",
             "GG, the generalisation gap: above 0 the samples are no nearer to training than to validation images; far "
             "below 0 they are copies."]
    if any(row["memorisation"] for row in report["rows"]):
        lines.append("Copies: share of samples nearer to a training image than all but a few per cent of the real "
                     "validation images are (in brackets: expected without copying). AuthPct: per cent of samples "
                     "farther from their nearest training image than that is from its own nearest neighbour; compare "
                     "with the real row.")
    if any(row["lpips"] for row in report["rows"]):
        lines.append("LPIPS: distance between random samples, higher is more varied; the real row is the aim.")
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"


def bars(report):
    """For each label one bar per set: AUC against the requested labels, or without a classifier their share."""
    title = "Does an image show the labels it was asked for? AUC of a classifier trained on real images"
    rows = [row for row in report["rows"] if row["conditioning"]]
    values = [{name: score["auc"] for name, score in row["conditioning"]["labels"].items()} for row in rows]
    if not rows:
        title = "Share of images with each label"
        rows = [row for row in report["rows"] if row["label_share"] is not None]
        values = [row["label_share"] for row in rows]
    if not rows:
        return ""
    parts = []
    for name in report["data"]["labels"]:
        drawn = "".join(_bar(row, value[name]) for row, value in zip(rows, values, strict=True))
        texts = ", ".join(number(value[name], 2) for value in values)
        parts.append(f"<div>{html.escape(name)}</div><div>{drawn}<small>{texts}</small></div>")
    order = html.escape(" · ".join(row["name"] for row in rows))
    return f"<h2>{title}</h2><p>In this order: {order}</p><div class=bars>{''.join(parts)}</div>"


def _bar(row, value):
    kind = " real" if row["kind"] == "real" else ""
    return (f"<div class='bar{kind}' style='width:{100 * (value or 0):.1f}%' "
            f"title='{html.escape(row['name'])}: {number(value, 3)}'></div>")


def _inline(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def write(folder, report, pictures):
    """Write results.json, results.txt, report.html and, of the first picture, real_vs_generated.png -> their names.

    Raises UserError.
    """
    files = {"results.json": json.dumps(report, indent=1, allow_nan=False) + "\n", "results.txt": text(report) + "\n",
             "report.html": page(report, pictures)}
    picture = f"{PICTURE}.png"
    try:
        for name, content in files.items():
            write_text(folder / name, content)
        write_atomically(folder / picture, lambda path: pictures[0][1].save(path, "PNG"))
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be written ({error})") from None
    return [*files, picture]
