"""How evaluate.py shows its numbers: as text, and as one HTML page that needs no other file.

Both are made from the dict that is written to results.json; nothing is computed here.
"""

import base64
import html
import io

NONE = "–"


def columns(report):
    """(heading, row -> text) for every column that some row has a value for."""
    found = [("set", lambda r: r["name"]), ("images", lambda r: str(r["images"]))]
    for space in report["spaces"]:
        found += [(f"KID[{space}] ×1e-3", lambda r, s=space: _kid(r, s)),
                  ("95 % interval of KID", lambda r, s=space: _interval(r["kid"].get(s, {}).get("interval"), 1e3)),
                  (f"FID[{space}]", lambda r, s=space: number(r["fid"].get(s), 2)),
                  ("precision, recall", lambda r, s=space: _fidelity(r, s, "precision", "recall")),
                  ("density, coverage", lambda r, s=space: _fidelity(r, s, "density", "coverage"))]
    found += [("LPIPS", lambda r: _spread(r.get("lpips"))),
              (f"GG[{report['gg_space']}]", lambda r: number((r.get("gg") or {}).get("gap"), 2)),
              ("95 % interval of GG", lambda r: _interval((r.get("gg") or {}).get("gap_interval"), 1)),
              ("copies", lambda r: _copies(r.get("memorisation"))),
              ("AuthPct", lambda r: number((r.get("memorisation") or {}).get("authentic_percent"), 1)),
              ("AUC of labels", lambda r: number((r.get("conditioning") or {"macro": {}})["macro"].get("auc"), 3))]
    return [(head, value) for head, value in found if any(value(row) != NONE for row in report["rows"])]


def number(value, digits):
    """A number as text; the huge ones that copies lead to, with an exponent."""
    return NONE if value is None else f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.1e}"


def _kid(row, space):
    value = row["kid"].get(space)
    return NONE if value is None else f"{1e3 * value['mean']:.2f} ± {1e3 * value['std']:.2f}"


def _interval(bounds, scale):
    return NONE if bounds is None else " to ".join(number(scale * value, 1) for value in bounds)


def _fidelity(row, space, *names):
    value = row["fidelity"].get(space)
    return NONE if value is None else ", ".join(f"{value[name]:.2f}" for name in names)


def _spread(value):
    return NONE if value is None else f"{value['mean']:.3f} ± {value['std']:.3f}"


def _copies(value):
    """Share of samples that are near training images, and what would be expected."""
    if value is None:
        return NONE
    exact = len(value["exact_duplicates"]["copies"])
    near = value["close"]
    return f"{100 * near['value']:.0f} % ({100 * near['expected']:.0f} %)" + (f", {exact} exact" if exact else "")


def text(report):
    """The table, and below it what several folders say together."""
    shown = columns(report)
    lines = [[head for head, _ in shown], *([value(row) for _, value in shown] for row in report["rows"])]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = ["  ".join(f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}"
                         for i, (cell, w) in enumerate(zip(line, widths, strict=True))).rstrip() for line in lines]
    return "\n".join([heading(report), *aligned, *remarks(report)])


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
    shown = columns(report)
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(value(row))}</td>" for _, value in shown) + "</tr>"
                    for row in report["rows"])
    table = ("<div class=wide><table><tr>" + "".join(f"<th>{html.escape(head)}</th>" for head, _ in shown)
             + f"</tr>{cells}</table></div>")
    figures = "".join(f"<figure><img alt='' src='{_inline(image)}'><figcaption>{html.escape(caption)}</figcaption>"
                      "</figure>" for caption, image in pictures)
    said = "".join(f"<p>{html.escape(line)}</p>" for line in [*remarks(report), *report["warnings"]])
    about = html.escape("\n".join([f"versions: {report['versions']}", *(
        f"{name}: {space['identity']}; {space['preprocessing']}" for name, space in report["networks"].items())]))
    title = html.escape(heading(report))
    return (f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
            f"<h1>Generated images against real ones</h1><p>{title}</p>{table}{said}{_reading(report)}"
            f"{bars(report)}{figures}<footer><pre>{about}</pre></footer></html>\n")


def _reading(report):
    """What the columns mean, in the words a reader of the table needs."""
    lines = ["The first row is real against real: no generator need come closer (the noise floor).",
             "KID: mean ± deviation over random subsets, lower is better; the interval is a bootstrap over images.",
             "Precision and density: do samples look real? Recall and coverage: are all kinds of real images there?",
             "GG, the generalisation gap: above 0 the samples are no nearer to training than to validation images; far "
             "below 0 they are copies."]
    if any(row.get("memorisation") for row in report["rows"]):
        lines.append("Copies: share of samples nearer to a training image than all but a few per cent of the real "
                     "validation images are (in brackets: expected without copying). AuthPct: per cent of samples "
                     "farther from their nearest training image than that is from its own nearest neighbour; compare "
                     "with the real row.")
    if any(row.get("lpips") for row in report["rows"]):
        lines.append("LPIPS: distance between random samples, higher is more varied; the real row is the aim.")
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"


def bars(report):
    """For each label one bar per set: AUC against the requested labels, or without a classifier their share."""
    names, judged = report["data"]["labels"], [r for r in report["rows"] if r.get("conditioning")]
    rows = judged or [r for r in report["rows"] if r["label_share"] is not None]
    if not rows:
        return ""
    title = ("Does an image show the labels it was asked for? AUC of a classifier trained on real images"
             if judged else "Share of images with each label")
    parts = []
    for name in names:
        values = [r["conditioning"]["labels"][name]["auc"] if judged else r["label_share"][name] for r in rows]
        drawn = "".join(f"<div class='bar{' real' if r['kind'] == 'real' else ''}' style='width:{100 * (v or 0):.1f}%' "
                        f"title='{html.escape(r['name'])}: {number(v, 3)}'></div>"
                        for r, v in zip(rows, values, strict=True))
        texts = ", ".join(number(v, 2) for v in values)
        parts.append(f"<div>{html.escape(name)}</div><div>{drawn}<small>{texts}</small></div>")
    order = html.escape(" · ".join(r["name"] for r in rows))
    return f"<h2>{title}</h2><p>In this order: {order}</p><div class=bars>{''.join(parts)}</div>"


def _inline(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
